"""Sidecar process: detects that another process of the job has died (started by `distributed.processes.Watch`).

The watcher is a separate process because JAX aborts the other processes shortly after process 0 is lost. It uses only
Python's standard library.

Arguments: a JSON object that maps each socket's file descriptor to the name of the process at its other end; the index of
the own process.
Standard input, written by the own process: "bye" for a normal exit, "failed" for an exit whose reason was already printed.
End of input without either means that the own process has died.
Standard output: "failed" or "died" when another process has ended without a normal exit.
"""

import contextlib
import json
import os
import select
import signal
import socket
import sys
import time

PEACE, SAID_WHY = b"\0", b"\1"
LINGER = 5.0
"""Seconds to wait, after the death of the own process, for a report about which process ended first."""


def watch(links: dict[socket.socket, str], leader: bool) -> tuple[str, bool] | None:
    """Wait for the end of the job and return which process failed.

    The leader (process 0) is linked to all other processes and relays their messages. The others are linked to the leader only.

    Args:
        links: socket to each linked process, and the name of that process.
        leader: whether the own process is process 0.
    Returns:
        The name of the process that ended abnormally and whether the process printed its reason; None after a normal end.
    """
    own, until = True, None
    while links:
        left = None if until is None else max(0.0, until - time.monotonic())
        ready = select.select([*links, *([0] if own else [])], [], [], left)[0]
        if not ready:
            return None
        for link in [link for link in links if link in ready]:
            said = b""
            with contextlib.suppress(OSError):
                said = link.recv(128)
            if said == PEACE:
                links.pop(link)
                continue
            failed = said[:1] == SAID_WHY
            name = said.removeprefix(SAID_WHY).decode() or links[link]
            for other in links:
                with contextlib.suppress(OSError):
                    other.sendall(PEACE if other is link else SAID_WHY * failed + name.encode())
            return name, failed
        if 0 in ready:
            word = {b"bye": PEACE, b"failed": SAID_WHY}.get(os.read(0, 8))
            for link in links:
                with contextlib.suppress(OSError):
                    link.sendall(word) if word else link.shutdown(socket.SHUT_WR)
            if word or leader:
                return None
            own, until = False, time.monotonic() + LINGER
    return None


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):  # a terminal signals the whole process group; the own process decides
        signal.signal(number, signal.SIG_IGN)
    names = json.loads(sys.argv[1])
    ended = watch({socket.socket(fileno=int(fd)): name for fd, name in names.items()}, leader=sys.argv[2] == "0")
    if ended:
        name, failed = ended
        what = "has failed; its own output says why" if failed else (
            "has ended before its time; start all processes again with --run.resume true"
        )  # fmt: skip
        print(f"\nerror: {name} {what}.", file=sys.stderr, flush=True)
        with contextlib.suppress(OSError):
            print("failed" if failed else "died", flush=True)
