"""The trainer's side of a worker: sends code and images, and checks every byte that comes back."""

import contextlib
import json
import os
import select
import signal
import struct
import time
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from imagent_jax.config import SandboxConfig
from imagent_jax.types import ToolError

SHOWN_PIXELS = 1 << 24
"""Most pixels that a call may show, all images together."""
GARBLED = "the code wrote to the connection of its result; its variables are gone"
_HEADER, _START_S = 1 << 16, 30.0


class SandboxError(Exception):
    """The sandbox itself failed, by no act of the code: an environment error."""


class Ran(NamedTuple):
    """What a call came to.

    Attributes:
        text: what it printed, cut to the limit.
        shown: images that it showed, each with the number of the image it was made from, where that is known.
        error: None, or the exception that ended it, in a line.
    """

    text: str
    shown: list[tuple[Image.Image, int | None]]
    error: str | None


class Lost(Exception):
    """The worker closed its pipe."""


class Garbled(Exception):
    """The worker wrote what is no message."""


class Worker:
    """One trajectory's process. Variables of its code live until `close`. One call at a time."""

    def __init__(
        self,
        settings: SandboxConfig,
        pid: int,
        end: Callable[..., dict[str, Any] | None],
        requests: int,
        replies: int,
    ):
        self.pid, self.alive, self._ready = pid, True, False
        self._settings, self._requests, self._replies = settings, requests, replies
        os.set_blocking(requests, False)
        os.set_blocking(replies, False)
        weakref.finalize(self, close_all, (requests, replies))
        self._end_lost, self._end = partial(end, lost=True), weakref.finalize(self, _of_process, os.getpid(), end)

    def run(self, code: str, images: Sequence[Image.Image], room: int) -> Ran:
        """Run code. After an error that ends the worker, `alive` is False.

        Args:
            images: RGB images, `images[0]` is number 1; pixels are sent when the code asks for them.
            room: most images that it may show.

        Raises:
            ToolError: the code exceeded a limit or ended the process.
            SandboxError: the worker did not start, was lost by no act of the code, or the machine was too busy to run it.
        """
        self._await_start()
        waited = self._waited_s()
        self._deadline = time.monotonic() + self._settings.wall_s
        try:
            if self._poll(self._replies, select.POLLIN, 0):  # it has ended, or code of an earlier call wrote after its result
                raise Garbled if os.read(self._replies, 1) else Lost
            self._send({"code": code, "count": len(images), "room": room, "pixels": SHOWN_PIXELS})
            while set(message := read_message(self._read, self._settings.printed)) == {"want"}:
                number = message["want"]
                if type(number) is not int or not 1 <= number <= len(images):
                    raise Garbled
                image = images[number - 1]
                self._send({"size": image.size}, image.tobytes())
            return read_result(message, self._read, room, self._settings.printed)
        except TimeoutError:
            waited = self._waited_s() - waited
            self.close()
            raise too_long(self._settings.wall_s, waited) from None
        except Garbled:
            self.close()
            raise ToolError(GARBLED) from None
        except Lost:
            raise self._why_lost() from None

    def close(self) -> None:
        """Kill the process. A call that is running on another thread then fails."""
        self.alive = False
        self._end()

    def _await_start(self) -> None:
        """Wait until the worker says that it is confined."""
        if self._ready:
            return
        self._deadline = time.monotonic() + _START_S
        with contextlib.suppress(TimeoutError, Garbled, Lost):
            self._ready = read_message(self._read, self._settings.printed) == {"ready": True}
        if not self._ready:
            self.close()
            raise SandboxError("a worker did not start")

    def _waited_s(self) -> float:
        """Seconds that the process was ready to run and did not."""
        try:
            return int(Path(f"/proc/{self.pid}/schedstat").read_text().split()[1]) / 1e9
        except (OSError, IndexError):
            return 0.0

    def _why_lost(self) -> Exception:
        """The error that tells why the worker closed its pipe."""
        if not self._end.detach():
            return SandboxError("the trajectory was closed during a call")
        self.alive = False
        ended = self._end_lost()
        if ended is None:
            return SandboxError("the process that starts workers is gone")
        return why_ended(ended, self._settings.cpu_s)

    # ---- messages -------------------------------------------------------------------------------------------------------

    def _send(self, message: dict, payload: bytes = b"") -> None:
        text = json.dumps(message).encode()
        for part in (struct.pack("<I", len(text)) + text, payload):
            view = memoryview(part)
            while view:
                self._wait(self._requests, select.POLLOUT)
                try:
                    view = view[os.write(self._requests, view[: 1 << 16]) :]
                except BlockingIOError:
                    continue
                except BrokenPipeError:
                    raise Lost from None

    def _read(self, count: int) -> bytes:
        parts = bytearray()
        while len(parts) < count:
            self._wait(self._replies, select.POLLIN)
            try:
                part = os.read(self._replies, min(count - len(parts), 1 << 20))
            except BlockingIOError:
                continue
            if not part:
                raise Lost
            parts += part
        return bytes(parts)

    def _wait(self, pipe: int, event: int) -> None:
        """Wait until a pipe is ready, or raise TimeoutError at the deadline."""
        if not self._poll(pipe, event, max(self._deadline - time.monotonic(), 0)):
            raise TimeoutError

    @staticmethod
    def _poll(pipe: int, event: int, seconds: float) -> bool:
        poll = select.poll()
        poll.register(pipe, event)
        return bool(poll.poll(seconds * 1000))


# ---- what a worker says, and why it says nothing ------------------------------------------------------------------------


def read_message(read: Callable[[int], bytes], printed: int) -> dict:
    """Return the next message of a worker that may print `printed` characters. `read` returns so many bytes.

    Raises:
        Garbled: it is no message.
    """
    length = struct.unpack("<I", read(4))[0]
    if length > _HEADER + 12 * printed:
        raise Garbled
    try:
        message = json.loads(read(length))
    except (ValueError, RecursionError):
        raise Garbled from None
    if not isinstance(message, dict):
        raise Garbled
    return message


def read_result(message: dict, read: Callable[[int], bytes], room: int, printed: int) -> Ran:
    """Check a result, and read its pixels.

    Raises:
        Garbled: it is no result of at most `room` images.
    """
    text, error, shown = (message.get(name) for name in ("text", "error", "shown"))
    if not isinstance(text, str) or not isinstance(error, str | None) or not isinstance(shown, list) or len(shown) > room:
        raise Garbled
    sizes, pixels = [], 0
    for item in shown:
        if not isinstance(item, list) or len(item) != 3 or not all(type(side) is int and side > 0 for side in item[:2]):
            raise Garbled
        pixels += item[0] * item[1]
        if pixels > SHOWN_PIXELS or not (item[2] is None or type(item[2]) is int):
            raise Garbled
        sizes.append(item)
    made = [(Image.frombytes("RGB", (w, h), read(w * h * 3)), parent) for w, h, parent in sizes]
    return Ran(_plain(text)[: printed + 40], made, None if error is None else _plain(error)[:1000])


def too_long(wall_s: float, waited_s: float) -> Exception:
    """The error of code that ran longer than `wall_s`, of which it waited `waited_s` for a processor."""
    if waited_s > wall_s / 2:
        return SandboxError(f"the machine was too busy: code waited {waited_s:.1f} s for a processor")
    return ToolError(f"the code ran longer than {wall_s:g} s; it was stopped and its variables are gone")


def why_ended(ended: dict[str, Any], cpu_s: int) -> Exception:
    """The error of code whose process has ended, given its wait `status` (None: it was stopped) and the `cpu_s` that it used."""
    if ended["cpu_s"] >= cpu_s - 0.5:
        return ToolError(f"the code used more than {cpu_s} s of processor time; its variables are gone")
    if ended["status"] is not None and os.WIFSIGNALED(ended["status"]) and os.WTERMSIG(ended["status"]) == signal.SIGKILL:
        return SandboxError("the worker was killed from outside, as the system does where memory runs out")
    return ToolError("the code ended its process; its variables are gone")


def _plain(text: str) -> str:
    """Text without lone surrogates, which no tokenizer takes."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _of_process(owner: int, end: Callable[[], Any]) -> None:
    if os.getpid() == owner:  # not a fork of the trainer
        end()


def close_all(pipes: Sequence[int]) -> None:
    """Close descriptors."""
    for pipe in pipes:
        os.close(pipe)
