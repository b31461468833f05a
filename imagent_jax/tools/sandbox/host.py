"""The trainer's side of the sandbox: starts it, tests it, and starts workers."""

import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import weakref
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from imagent_jax.config import SandboxConfig
from imagent_jax.images import decode
from imagent_jax.tools.sandbox.confine import places
from imagent_jax.tools.sandbox.link import SandboxError, Worker, close_all
from imagent_jax.types import ToolError

_SHARED = (
    "no network, no other processes or threads, no signals, no descriptors but pipes; bounded CPU and wall time, memory, open "
    "files and output; clock and entropy from the seed"
)
BACKENDS: dict[str, str] = {
    "namespaces": "its own process, mount, network and IPC namespaces; a read-only root with Python and the libraries; files "
    f"only in a private memory folder of bounded size; {_SHARED}",
    "landlock": "reads Python and the libraries, and names and sizes of other files; writes only 'path_to_input_image.jpg' and "
    f"'path_to_output_image.jpg', each of bounded size; {_SHARED}",
}
"""How workers can be confined, best first, and what each enforces."""
_ZYGOTE = Path(__file__).with_name("zygote.py")
OWN = str(Path(decode.__file__).parent)
"""Folder of the modules of the package that workers import: they import nothing else of it."""
_START_S, _ANSWER_S = 120.0, 30.0

_PROBES = {
    "reads a file": "open({canary!r}).read()",
    "changes a file": "open({canary!r}, 'a')",
    "makes a file": "open({canary!r} + '2', 'w')",
    "sees the trainer's environment": "open('/proc/{pid}/environ', 'rb').read()",
    "sends signals": "import os; os.kill({pid}, 0)",
    "opens a socket": "import socket; socket.socket()",
    "starts a process": "import os; os.fork() or os._exit(0)",
    "runs a program": "import os; os.execv('/bin/true', ['true'])",
    "starts a thread": "import threading; threading.Thread(target=int).start()",
    "exceeds its memory": "bytearray({memory})",
    "exceeds its disk": "open('path_to_output_image.jpg', 'wb').truncate({disk})",
    "has the system's entropy": "import ctypes; assert ctypes.CDLL(None).getrandom(bytes(8), 8, 0) == 8",
}
_SELF_TEST = """
import json
failed = []
for name, code in json.loads({probes!r}).items():
    try:
        exec(code, {{}})
        failed.append(name)
    except Exception:
        pass
print("probed", len(failed), *failed, sep="; ")
"""


class Sandbox:
    """Starts workers. Starting it takes seconds once; a worker, milliseconds.

    Attributes:
        backend, enforces: how workers are confined, and what that means, in words.

    Raises:
        ValueError: no backend holds here, or a library is missing; the sentence says what to do.
    """

    def __init__(self, settings: SandboxConfig):
        self.settings, self._lock, self._process = settings, threading.Lock(), None
        reasons = []
        for backend in BACKENDS if settings.backend == "auto" else (settings.backend,):
            self.backend, self.enforces = backend, BACKENDS[backend]
            try:
                self._test()
                return
            except SandboxError as error:
                self.close()
                reasons.append(f"{backend}: {error}")
        raise ValueError(
            f"The tool 'python' finds no sandbox that holds here ({'; '.join(reasons)}); run on Linux 6.2 or newer on x86-64, "
            "where user namespaces or Landlock are permitted, or take 'python' out of tools.names."
        )

    def open(self, seed: int) -> "Worker":
        """Start a worker for a trajectory, whose clock and entropy come from `seed`.

        Raises:
            SandboxError: it does not start.
        """
        incoming, requests = os.pipe()
        replies, outgoing = os.pipe()
        folder = None
        try:
            if self.backend == "landlock":
                folder = tempfile.mkdtemp(prefix="imagent_sandbox_")
                for name in ("path_to_input_image.jpg", "path_to_output_image.jpg"):
                    Path(folder, name).touch()
            answer, process = self._ask({"open": seed, "folder": folder}, [incoming, outgoing])
        except BaseException:
            close_all((requests, replies))
            _remove(folder)
            raise
        finally:
            os.close(incoming)
            os.close(outgoing)
        return Worker(self.settings, answer["pid"], partial(self._end, answer["pid"], process, folder), requests, replies)

    def close(self) -> None:
        """End the process that starts workers, and all workers."""
        with self._lock:
            self._stop()

    def _end(self, pid: int, process: subprocess.Popen, folder: str | None, lost: bool = False) -> dict[str, Any] | None:
        """Kill a worker of `process` and remove its folder. If it is `lost`, returns its wait status (None unless it had ended by
        itself) and CPU seconds; None where it is gone with `process`."""
        try:
            return self._ask({"end": pid, "lost": lost}, [], process)[0]
        except SandboxError:
            return None
        finally:
            _remove(folder)

    def _ask(
        self, request: dict, descriptors: Sequence[int], process: subprocess.Popen | None = None
    ) -> tuple[dict[str, Any], subprocess.Popen]:
        """Return the answer of the process that starts workers, and that process. Start it, unless `process` is asked for."""
        with self._lock:
            if process is not None and self._process is not process:
                raise SandboxError("it is gone")
            running = self._process or self._start()
            try:
                socket.send_fds(self._control, [json.dumps(request).encode()], descriptors)
                answer = json.loads(self._control.recv(4096) or b'{"error": "it ended"}')
            except OSError as error:
                answer = {"error": str(error)}
            if "error" in answer:
                self._stop()
                raise SandboxError(f"the process that starts workers failed: {answer['error']}")
            return answer, running

    def _stop(self) -> None:
        if self._process is not None:
            self._end_process()
            self._process = None

    def _start(self) -> subprocess.Popen:
        """Start the process that starts workers, and return it."""
        if sys.platform != "linux" or platform.machine() != "x86_64":
            raise SandboxError(f"it is for Linux on x86-64, and this is {platform.system()} on {platform.machine()}")
        own, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        limits = {name: value for name, value in vars(self.settings).items() if isinstance(value, int)}
        settings = {"backend": self.backend, "limits": limits} | places(OWN)
        command = [sys.executable, "-s", "-S", "-P", "-B", str(_ZYGOTE)]
        environment = {"PYTHONHASHSEED": "0", "PYTHONUTF8": "1", "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
        with other:
            process = subprocess.Popen(
                [*command, str(other.fileno()), json.dumps(settings)],
                env=environment,
                pass_fds=[other.fileno()],
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        self._process, self._control = process, own
        self._end_process = weakref.finalize(self, _end_process, process, own, os.getpid())
        own.settimeout(_START_S)
        try:
            answer = json.loads(own.recv(4096) or b'{"error": "its process ended at the start"}')
        except OSError as error:
            answer = {"error": str(error)}
        own.settimeout(_ANSWER_S)
        if "error" in answer:
            self._stop()
            raise SandboxError(answer["error"])
        return process

    def _test(self) -> None:
        """Try to break out.

        Raises:
            SandboxError: it does not start, or an attempt succeeds.
        """
        with tempfile.TemporaryDirectory() as folder:
            os.chmod(folder, 0o755)
            canary = Path(folder, "canary")
            canary.write_text("canary")
            try_to_break_out(self, str(canary), os.getpid())


def try_to_break_out(sandbox: Any, canary: str, pid: int) -> None:
    """Run the probes in a worker of its own.

    Args:
        sandbox: a `Sandbox`, or another with its `settings` and `open`.
        canary: path of a file that exists outside of the sandbox.
        pid: number of a process outside of it.
    Raises:
        SandboxError: it does not start, or an attempt succeeds.
    """
    settings = sandbox.settings
    values = {"canary": canary, "pid": pid, "memory": (settings.memory_mb + 8) << 20, "disk": (settings.disk_mb << 20) + 1}
    probes = {name: code.format(**values) for name, code in _PROBES.items()}
    worker = sandbox.open(0)
    try:
        ran = worker.run(_SELF_TEST.format(probes=json.dumps(probes)), [], 0)
    except ToolError as error:
        raise SandboxError(f"its test did not run: {error}") from None
    finally:
        worker.close()
    if ran.text.strip() != "probed; 0":
        raise SandboxError(f"code in it {ran.text.strip().removeprefix('probed; ')[3:] or ran.error}")


def _end_process(process: subprocess.Popen, control: socket.socket, owner: int) -> None:
    control.close()
    if os.getpid() == owner:
        process.kill()
        process.wait()


def _remove(folder: str | None) -> None:
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)
