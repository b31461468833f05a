"""The tool `python`: runs code of the policy in the sandbox, on the trajectory's images."""

import threading

from imagent_jax.tools.context import ToolContext
from imagent_jax.tools.decorator import tool
from imagent_jax.tools.sandbox import Ran, Remote, RemoteWorker, Sandbox, Worker
from imagent_jax.tools.schema import Tool
from imagent_jax.types import ImageNumber, ToolError


class Session:
    """The worker of one trajectory. It is started by the first call, and by the next after one that ended it."""

    def __init__(self, sandbox: Sandbox | Remote, seed: int):
        self._sandbox, self._seed, self._lock = sandbox, seed, threading.Lock()
        self._worker: Worker | RemoteWorker | None = None
        self._closed = False

    def run(self, code: str, images: list, room: int) -> Ran:
        """See `Worker.run`."""
        with self._lock:
            if self._closed:
                raise RuntimeError("the trajectory has ended")
            if self._worker is None or not self._worker.alive:
                self._worker = self._sandbox.open(self._seed)
            worker = self._worker
        return worker.run(code, images, room)

    def close(self) -> None:
        """Kill the worker."""
        with self._lock:
            self._closed = True
            if self._worker is not None:
                self._worker.close()


def python_tool(sandbox: Sandbox | Remote) -> Tool:
    """Return the tool `python`, whose code runs in `sandbox`."""

    @tool
    def python(context: ToolContext, code: str) -> list[str | ImageNumber]:
        """Run Python. images[1] is Image 1 (PIL); show(image) shows a PIL image, an RGB array or a file. Variables are kept.
        There are numpy, PIL, cv2 and scipy; no network, threads or processes.

        Args:
            code: Python code; print what you want to read
        """
        session = context.state.keep("python", lambda: Session(sandbox, context.state.seed))
        registry = context.registry
        ran = session.run(code, [entry.pixels for entry in registry], max(context.settings.max_images - len(registry), 0))
        if ran.error is not None:
            raise ToolError(ran.error + (f"; printed before: {ran.text.strip()[:500]}" if ran.text.strip() else ""))
        shown = []
        for image, parent in ran.shown:
            known = parent is not None and 1 <= parent <= len(registry)
            shown.append(context.show(image, parent=parent if known else None, origin="python"))
        text = ran.text.strip() or ("" if shown else "The code printed nothing and showed nothing.")
        return [*([text] if text else []), *shown]

    return python
