"""The trainer's side of the sandbox: starts it, tests it, and talks to workers, whose every byte is checked."""

import contextlib
import importlib.util
import json
import os
import platform
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from imagent_jax.config import SandboxConfig
from imagent_jax.types import ToolError

_SHARED = (
    "no network, no other processes or threads, no signals, no descriptors but pipes; bounded CPU and wall time, memory, open "
    "files and output; clock and entropy from the seed"
)
BACKENDS = {
    "namespaces": "its own process, mount, network and IPC namespaces; a read-only root with Python and the libraries; files "
    f"only in a private memory folder of bounded size; {_SHARED}",
    "landlock": "reads Python and the libraries, and names and sizes of other files; writes only 'path_to_input_image.jpg' and "
    f"'path_to_output_image.jpg', each of bounded size; {_SHARED}",
}
"""How workers can be confined, best first, and what each enforces."""
LIBRARIES = ("numpy", "PIL", "cv2", "scipy")
SHOWN_PIXELS = 1 << 24
"""Most pixels that a call may show, all images together."""
_HEADER = 1 << 16
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
            pid = self._ask({"open": seed, "folder": folder}, [incoming, outgoing])["pid"]
        except BaseException:
            _release((requests, replies), folder)
            raise
        finally:
            os.close(incoming)
            os.close(outgoing)
        return Worker(self, pid, requests, replies, folder)

    def close(self) -> None:
        """End the process that starts workers, and all workers."""
        with self._lock:
            if self._process is not None:
                self._stop()
                self._process = None

    def end(self, pid: int, process: object, owner: int, lost: bool = False) -> dict[str, Any] | None:
        """Kill a worker and return its wait status (None unless it had ended before) and CPU seconds."""
        if os.getpid() != owner or self._process is not process:
            return None  # of a fork of the trainer, or gone with the process that started it
        with contextlib.suppress(SandboxError):
            return self._ask({"end": pid, "lost": lost}, [])

    def _ask(self, request: dict, descriptors: Sequence[int]) -> dict[str, Any]:
        with self._lock:
            if self._process is None:
                self._start()
            try:
                socket.send_fds(self._control, [json.dumps(request).encode()], descriptors)
                answer = json.loads(self._control.recv(4096) or b'{"error": "it ended"}')
            except OSError as error:
                answer = {"error": str(error)}
            if "error" in answer:
                self._stop()
                self._process = None
                raise SandboxError(f"the process that starts workers failed: {answer['error']}")
            return answer

    def _start(self) -> None:
        """Start the process that starts workers."""
        if sys.platform != "linux" or platform.machine() != "x86_64":
            raise SandboxError(f"it is for Linux on x86-64, and this is {platform.system()} on {platform.machine()}")
        own, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        limits = {name: value for name, value in vars(self.settings).items() if isinstance(value, int)}
        settings = {"backend": self.backend, "limits": limits} | places()
        command = [sys.executable, "-s", "-S", "-P", "-B", str(Path(__file__).with_name("zygote.py"))]
        environment = {"PYTHONHASHSEED": "0", "PYTHONUTF8": "1", "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
        with other:
            process = subprocess.Popen(
                [*command, str(other.fileno()), json.dumps(settings)], env=environment, pass_fds=[other.fileno()], cwd="/",
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
        self._process, self._control = process, own
        self._stop = weakref.finalize(self, _end_process, process, own, os.getpid())
        own.settimeout(_START_S)
        try:
            answer = json.loads(own.recv(4096) or b'{"error": "its process ended at the start"}')
        except OSError as error:
            answer = {"error": str(error)}
        own.settimeout(_ANSWER_S)
        if "error" in answer:
            self._stop()
            self._process = None
            raise SandboxError(answer["error"])

    def _test(self) -> None:
        """Try to break out.

        Raises:
            SandboxError: it does not start, or an attempt succeeds.
        """
        with tempfile.TemporaryDirectory() as folder:
            os.chmod(folder, 0o755)
            canary = Path(folder, "canary")
            canary.write_text("canary")
            values = {"canary": str(canary), "pid": os.getpid(), "memory": (self.settings.memory_mb + 8) << 20,
                      "disk": (self.settings.disk_mb << 20) + 1}  # fmt: skip
            probes = {name: code.format(**values) for name, code in _PROBES.items()}
            worker = self.open(0)
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


def _release(pipes: Sequence[int], folder: str | None) -> None:
    for pipe in pipes:
        os.close(pipe)
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)


def places() -> dict[str, list[str]]:
    """The folders of Python and of the libraries.

    Returns:
        `path`: for sys.path. `visible`: what workers see. `hidden`: other packages, inside of it. `readable`: for Landlock.
    Raises:
        ValueError: a library is missing.
    """
    standard = list(dict.fromkeys(os.path.realpath(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib")))
    hidden = [f"{folder}/{name}" for folder in standard for name in ("site-packages", "dist-packages")]
    packages = []
    for name in LIBRARIES:
        spec = importlib.util.find_spec(name)
        if spec is None or not spec.submodule_search_locations:
            raise ValueError(f"The tool 'python' needs {name}; pip install 'imagent-jax[sandbox]'.")
        packages.append(spec.submodule_search_locations[0])
    parents = list(dict.fromkeys(os.path.dirname(package) for package in packages))
    packages += [str(folder) for parent in parents for folder in Path(parent).glob("*.libs")]
    inner = [entry.path for folder in standard for entry in os.scandir(folder) if entry.path not in hidden]
    listed = [f"{folder}/" for folder in standard]
    return {"path": parents, "visible": standard + packages, "hidden": hidden, "readable": inner + packages + listed}


class _Lost(Exception):
    """The worker closed its pipe."""


class _Garbled(Exception):
    """The worker wrote what is no message."""


class Worker:
    """One trajectory's process. Variables of its code live until `close`. One call at a time."""

    def __init__(self, sandbox: Sandbox, pid: int, requests: int, replies: int, folder: str | None):
        self.pid, self.alive = pid, True
        self._settings, self._requests, self._replies = sandbox.settings, requests, replies
        os.set_blocking(requests, False)
        os.set_blocking(replies, False)
        self._release = weakref.finalize(self, _release, (requests, replies), folder)
        self._end = weakref.finalize(self, sandbox.end, pid, sandbox._process, os.getpid())
        self._lost = lambda: sandbox.end(pid, sandbox._process, os.getpid(), lost=True)

    def run(self, code: str, images: Sequence[Image.Image], room: int) -> Ran:
        """Run code. After an error that ends the worker, `alive` is False.

        Args:
            images: RGB images, `images[0]` is number 1; pixels are sent when the code asks for them.
            room: most images that it may show.

        Raises:
            ToolError: the code exceeded a limit or ended the process.
            SandboxError: the worker was lost by no act of the code.
        """
        self._deadline = time.monotonic() + self._settings.wall_s
        try:
            if self._poll(self._replies, select.POLLIN, 0):
                raise _Garbled  # code of an earlier call wrote after its result
            self._send({"code": code, "count": len(images), "room": room, "pixels": SHOWN_PIXELS})
            while set(message := self._receive()) == {"want"}:
                number = message["want"]
                if type(number) is not int or not 1 <= number <= len(images):
                    raise _Garbled
                image = images[number - 1]
                self._send({"size": image.size}, image.tobytes())
            return self._result(message, room)
        except TimeoutError:
            self.close()
            raise ToolError(
                f"the code ran longer than {self._settings.wall_s:g} s; it was stopped and its variables are gone"
            ) from None
        except _Garbled:
            self.close()
            raise ToolError("the code wrote to the connection of its result; its variables are gone") from None
        except _Lost:
            raise self._why_lost() from None

    def close(self) -> None:
        """Kill the process. A call that is running on another thread then fails."""
        self.alive = False
        self._end()

    def _why_lost(self) -> Exception:
        """The error that tells why the worker closed its pipe."""
        if not self._end.detach():
            return SandboxError("the trajectory was closed during a call")
        self.alive = False
        ended = self._lost()
        if ended is None:
            return SandboxError("the process that starts workers is gone")
        if ended["cpu_s"] >= self._settings.cpu_s - 0.5:
            return ToolError(f"the code used more than {self._settings.cpu_s} s of processor time; its variables are gone")
        if ended["status"] is not None and os.WIFSIGNALED(ended["status"]) and os.WTERMSIG(ended["status"]) == signal.SIGKILL:
            return SandboxError("the worker was killed from outside, as the system does where memory runs out")
        return ToolError("the code ended its process; its variables are gone")

    # ---- messages -------------------------------------------------------------------------------------------------------

    def _result(self, message: dict, room: int) -> Ran:
        """Check a result and read its pixels."""
        text, error, shown = (message.get(name) for name in ("text", "error", "shown"))
        if not isinstance(text, str) or not isinstance(error, str | None) or not isinstance(shown, list) or len(shown) > room:
            raise _Garbled
        sizes, pixels = [], 0
        for item in shown:
            if not isinstance(item, list) or len(item) != 3 or not all(type(side) is int and side > 0 for side in item[:2]):
                raise _Garbled
            pixels += item[0] * item[1]
            if pixels > SHOWN_PIXELS or not (item[2] is None or type(item[2]) is int):
                raise _Garbled
            sizes.append(item)
        made = [(Image.frombytes("RGB", (w, h), self._read(w * h * 3)), parent) for w, h, parent in sizes]
        return Ran(_plain(text)[: self._settings.printed + 40], made, None if error is None else _plain(error)[:1000])

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
                    raise _Lost from None

    def _receive(self) -> dict:
        length = struct.unpack("<I", self._read(4))[0]
        if length > _HEADER + 12 * self._settings.printed:
            raise _Garbled
        try:
            message = json.loads(self._read(length))
        except (ValueError, RecursionError):
            raise _Garbled from None
        if not isinstance(message, dict):
            raise _Garbled
        return message

    def _read(self, count: int) -> bytes:
        parts = bytearray()
        while len(parts) < count:
            self._wait(self._replies, select.POLLIN)
            try:
                part = os.read(self._replies, min(count - len(parts), 1 << 20))
            except BlockingIOError:
                continue
            if not part:
                raise _Lost
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


def _plain(text: str) -> str:
    """Text without lone surrogates, which no tokenizer takes."""
    return text.encode("utf-8", "replace").decode("utf-8")
