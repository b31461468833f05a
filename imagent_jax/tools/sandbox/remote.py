"""The sandbox on another machine: a server that speaks SandboxFusion's `POST /run_code`.

The server keeps nothing between requests, so a request holds the trajectory's earlier calls too. The server runs `program.py`,
which confines a process as the Landlock backend does, runs the earlier calls in it again, and then the new one.
"""

import base64
import hashlib
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from imagent_jax.config import SandboxConfig
from imagent_jax.images import decode
from imagent_jax.tools.post import check_url, clean, post
from imagent_jax.tools.sandbox.host import try_to_break_out
from imagent_jax.tools.sandbox.link import (
    GARBLED,
    SHOWN_PIXELS,
    Garbled,
    Lost,
    Ran,
    SandboxError,
    read_message,
    read_result,
    too_long,
    why_ended,
)
from imagent_jax.types import ToolError

START_S = 20.0
"""Seconds that a server may take besides `wall_s`."""
_FOLDER = Path(__file__).parent
_MODULES = {name: _FOLDER / name for name in ("confine.py", "worker.py", "zygote.py")} | {"decode.py": Path(decode.__file__)}
_ENDS = {"late": bool, "waited_s": float, "status": int | None, "cpu_s": float}


class Remote:
    """Runs code on a server. Its first use is an attempt to break out.

    Raises:
        ValueError: the server does not answer, or what it runs is not confined; the sentence says what to do.
    """

    backend = "remote"
    enforces = "what 'landlock' enforces, on the server's machine; bounded wall time of a trajectory's calls, all together"

    def __init__(self, settings: SandboxConfig):
        check_url(settings.url, "sandbox.url", "http://127.0.0.1:8080/run_code")
        self.settings = settings
        try:
            try_to_break_out(self, canary="../request.json", pid=1)
        except SandboxError as error:
            raise ValueError(
                f"The server of sandbox.url gives no sandbox that holds ({str(error).rstrip('.')}); give its Python numpy, "
                "Pillow, OpenCV and SciPy, its machine Linux 6.2 on x86-64 with Landlock, or correct sandbox.url."
            ) from None

    def open(self, seed: int) -> "RemoteWorker":
        """Begin a trajectory, whose clock and entropy come from `seed`."""
        return RemoteWorker(self.settings, seed)

    def close(self) -> None:
        """Do nothing: a server keeps nothing."""


class RemoteWorker:
    """One trajectory's calls on a server. One call at a time; the same methods as `Worker`."""

    def __init__(self, settings: SandboxConfig, seed: int):
        self.alive = True
        self._settings, self._seed = settings, seed
        self._calls: list[dict[str, Any]] = []
        self._digests: list[Any] = []
        self._images: list[str] = []

    def run(self, code: str, images: Sequence[Image.Image], room: int) -> Ran:
        """Run code; see `Worker.run`. The time of the trajectory's earlier calls counts too.

        Raises:
            ToolError: the code exceeded a limit or ended the process.
            SandboxError: the server failed, was too busy, or did not repeat the earlier calls.
        """
        self._images += [_png(image) for image in images[len(self._images) :]]
        calls = [*self._calls, {"code": code, "count": len(images), "room": room, "pixels": SHOWN_PIXELS}]
        ended, said = self._ask(calls)
        stream, printed = io.BytesIO(said), self._settings.printed

        def read(count: int) -> bytes:
            if len(found := stream.read(count)) < count:
                raise Lost
            return found

        self.alive = False  # until all is well
        try:
            if read_message(read, printed) != {"ready": True}:
                raise SandboxError(f"{self._settings.url} did not start a worker.")
            digests = [read_message(read, printed).get("digest") for _ in self._calls]
            reply = said[stream.tell() :]
            ran = read_result(read_message(read, printed), read, room, printed)
            if stream.read(1):
                raise Garbled
        except Lost:
            if not said:
                raise SandboxError(f"{self._settings.url} did not start a worker.") from None
            s = self._settings
            raise (too_long(s.wall_s, ended["waited_s"]) if ended["late"] else why_ended(ended, s.cpu_s)) from None
        except Garbled:
            raise ToolError(GARBLED) from None
        if digests != self._digests:
            raise SandboxError(f"{self._settings.url} did not repeat the trajectory's earlier calls.")
        self.alive, self._calls, self._digests = True, calls, [*digests, hashlib.sha256(reply).hexdigest()]
        return ran

    def close(self) -> None:
        """End the trajectory."""
        self.alive = False

    def _ask(self, calls: list[dict[str, Any]]) -> tuple[dict[str, Any], bytes]:
        """Have the server run `program.py`. Returns how the process ended, and what it wrote.

        Raises:
            SandboxError: see `run`.
        """
        s = self._settings
        limits = {name: value for name, value in vars(s).items() if isinstance(value, int)}
        most = 3 * SHOWN_PIXELS + (1 << 17) + 16 * s.printed
        request = {"seed": self._seed, "limits": limits, "wall_s": s.wall_s, "most": most, "calls": calls}
        files = {name: path.read_bytes() for name, path in _MODULES.items()} | {"request.json": json.dumps(request).encode()}
        files |= {f"work/path_to_{which}_image.jpg": b"" for which in ("input", "output")}
        encoded = {name: base64.b64encode(data).decode() for name, data in files.items()}
        encoded |= {f"images/{number}.png": image for number, image in enumerate(self._images, 1)} or {"images/none": ""}
        body = {
            "language": "python",
            "code": (_FOLDER / "program.py").read_text(),
            "files": encoded,
            "fetch_files": ["result"],
            "run_timeout": s.wall_s + START_S,
        }
        answer = post(s.url, body, s.wall_s + START_S + 5, raises=SandboxError, setting="sandbox.url", most_bytes=2 * most)
        try:
            head, _, said = base64.b64decode(answer["files"]["result"], validate=True).partition(b"\n")
            ended = json.loads(head)
            if not all(isinstance(ended[name], kind) for name, kind in _ENDS.items()):
                raise TypeError(f"{head[:100]!r}")
            return ended, said
        except (KeyError, TypeError, ValueError) as error:
            raise SandboxError(f"{s.url} returned no result ({_said(answer) or repr(error)}).") from None


def _png(image: Image.Image) -> str:
    image.save(out := io.BytesIO(), "PNG", compress_level=1)
    return base64.b64encode(out.getvalue()).decode()


def _said(answer: Any) -> str:
    """The last line that the program wrote, or what the server says of it."""
    answer = answer if isinstance(answer, dict) else {}
    run = answer["run_result"] if isinstance(answer.get("run_result"), dict) else {}
    lines = [line for text in (run.get("stderr"), answer.get("message")) for line in str(text or "").splitlines()[-1:]]
    return clean(" ".join(lines))[:300]
