"""One process writes into a run's folder: a lock that the operating system releases when its holder ends, however it ends."""

import fcntl
import os
import socket
from pathlib import Path


class Lock:
    """An exclusive lock on a folder, which must exist, by a file `.lock` in it that names its holder.

    The lock stays with the folder when the folder is renamed. A file system without locks has none.

    Raises:
        ValueError: another holder is alive.
    """

    def __init__(self, folder: Path):
        self._file = open(folder / ".lock", "a+")  # noqa: SIM115 - open as long as the lock is held
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._file.seek(0)
            holder = self._file.read().strip() or "another process"
            self._file.close()
            raise ValueError(
                f"{folder} is being written by {holder}; wait for it, stop it, or choose another run.name."
            ) from error
        except OSError:  # a file system without locks; refusing would forbid to train there
            pass
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {socket.gethostname()}")
        self._file.flush()

    def release(self) -> None:
        """Release the lock. Nothing happens where it is released."""
        self._file.close()
