"""Beside every process of a job of several (`hosts.Watch` starts it): says who has ended before its time.

A process of its own, for where process 0 is lost JAX aborts the others within a moment. It needs nothing but Python.
Arguments: the names at the other ends of its sockets, by file descriptor, in JSON. Its standard input is its process's: "bye" is
an end in peace, no more input is a death. It writes a line to standard output once another has ended.
"""

import contextlib
import json
import os
import select
import signal
import socket
import sys
import time

PEACE = b"\0"
LINGER = 5.0
"""Seconds to learn who ended first, once one's own process has."""


def watch(links: dict[socket.socket, str], leader: bool) -> str | None:
    """The name of the process that has ended before its time; None after an end in peace.

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
            name = said.decode() or links[link]
            for other in links:
                with contextlib.suppress(OSError):
                    other.sendall(PEACE if other is link else name.encode())
            return name
        if 0 in ready:
            peace = os.read(0, 8)
            for link in links:
                with contextlib.suppress(OSError):
                    link.sendall(PEACE) if peace else link.shutdown(socket.SHUT_WR)
            if peace or leader:
                return None
            own, until = False, time.monotonic() + LINGER
    return None


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):  # sent to all of a terminal; the process decides
        signal.signal(number, signal.SIG_IGN)
    names = json.loads(sys.argv[1])
    if name := watch({socket.socket(fileno=int(fd)): name for fd, name in names.items()}, leader=sys.argv[2] == "0"):
        print(f"\nerror: {name} has ended before its time; start all processes again with --run.resume true.",
              file=sys.stderr, flush=True)  # fmt: skip
        with contextlib.suppress(OSError):
            print("ended", flush=True)
