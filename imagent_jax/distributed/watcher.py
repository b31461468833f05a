"""Beside every process of a job of several (`hosts.Watch` starts it): says who has ended before its time.

A process of its own, for where process 0 is lost JAX aborts the others within a moment. It needs nothing but Python.
Arguments: the names at the other ends of its sockets, by file descriptor, in JSON. Its standard input is its process's: "bye" is
an end in peace, "failed" one that the process has given the reason of, no more input is a death. Once another has ended without
peace it writes "failed" or "died" to standard output.
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
"""Seconds to learn who ended first, once one's own process has."""


def watch(links: dict[socket.socket, str], leader: bool) -> tuple[str, bool] | None:
    """The name of the process that has ended before its time, and whether it has said why; None after an end in peace.

    The leader (process 0) is linked to all others and tells them; the others are linked to it alone.
    """
    own, until = True, None
    while links:
        left = None if until is None else max(0.0, until - time.monotonic())
        ready = select.select([*links, *([0] if own else [])], [], [], left)[0]
        if not ready:
            return None
        for link in (link for link in ready if link != 0):
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
    for number in (signal.SIGINT, signal.SIGTERM):  # sent to all of a terminal; the process decides
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
