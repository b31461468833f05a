"""Tool calls on daemon threads, each with a time limit."""

import math
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import Any

from imagent_jax.tools.calls import ParsedCall, fault
from imagent_jax.tools.context import ToolSettings, run_call
from imagent_jax.tools.protocol import ToolSet
from imagent_jax.tools.registry import ImageRegistry
from imagent_jax.tools.schema import Tool
from imagent_jax.types import CallResult, CallStatus


@dataclass(eq=False)
class _Job:
    key: Hashable
    registry: ImageRegistry
    tool: Tool
    call: ParsedCall
    deadline: float = 0.0


_See = Callable[[ImageRegistry, int], Any]
_Results = queue.SimpleQueue[tuple[_Job, CallResult | Exception, ImageRegistry]]


class CallPool:
    """Runs tool calls while the caller does other work: `submit` any number, then `poll` or `drain` for results.

    A registry belongs to one pending call at a time. Images join it when the result is handed out, on the caller's
    thread, so a call that timed out can never touch it.

    Args:
        tools, settings: as for ToolSet.execute.
        workers: calls that run at once.
        timeout_s: seconds a call may run, from the moment it starts.
        see: called with (registry, number) for each image that a call shows, on the call's thread; see `CallResult.seen`.
            What it raises, `poll` and `drain` raise.
    """

    def __init__(
        self, tools: ToolSet, settings: ToolSettings, workers: int = 4, timeout_s: float = 10.0, see: _See | None = None
    ) -> None:
        if workers < 1 or timeout_s <= 0:
            raise ValueError(f"workers must be at least 1 and timeout_s above 0, got {workers} and {timeout_s}")
        self._tools, self._settings, self._see = tools, settings, see
        self._workers, self._timeout_s = workers, timeout_s
        self._waiting: deque[_Job] = deque()
        self._running: list[_Job] = []
        self._ready: list[tuple[Hashable, CallResult]] = []
        self._finished: _Results = queue.SimpleQueue()

    @property
    def pending(self) -> int:
        """Calls submitted whose results have not been handed out."""
        return len(self._waiting) + len(self._running) + len(self._ready)

    def submit(self, key: Hashable, action_text: str, registry: ImageRegistry) -> None:
        """Start a call; `key` comes back with its result. Raises ValueError while `registry` has a call pending."""
        if any(job.registry is registry for job in [*self._waiting, *self._running]):
            raise ValueError("a registry has a call pending; run one call at a time on a registry")
        prepared = self._tools.prepare(action_text)
        if isinstance(prepared, CallResult):
            self._ready.append((key, prepared))
            return
        self._waiting.append(_Job(key, registry, *prepared))
        self._start()

    def poll(self, timeout_s: float = 0.0) -> list[tuple[Hashable, CallResult]]:
        """The results that are there, waiting up to `timeout_s` seconds for a first one if there are none."""
        give_up = time.monotonic() + timeout_s
        while True:
            self._collect()
            if self._ready or not self._running:
                break
            now = time.monotonic()
            if now >= give_up:
                break
            until = min(give_up, *(job.deadline for job in self._running))
            try:
                self._settle(*self._finished.get(timeout=max(until - now, 1e-4)))
            except queue.Empty:
                continue
        ready, self._ready = self._ready, []
        return ready

    def drain(self) -> Iterator[tuple[Hashable, CallResult]]:
        """Yield every pending result as it comes."""
        while self.pending:
            yield from self.poll(self._timeout_s)

    def _start(self) -> None:
        while self._waiting and len(self._running) < self._workers:
            job = self._waiting.popleft()
            job.deadline = time.monotonic() + self._timeout_s
            self._running.append(job)
            args = (job, job.registry.fork(), self._settings, self._see, self._finished)
            threading.Thread(target=_work, args=args, name=f"tool-{job.call.name}", daemon=True).start()

    def _collect(self) -> None:
        """Settle finished jobs, then fault overdue ones."""
        while True:
            try:
                self._settle(*self._finished.get_nowait())
            except queue.Empty:
                break
        now = time.monotonic()
        for job in [job for job in self._running if now >= job.deadline]:
            error = f"{job.call.name} ran longer than {self._timeout_s:g} s"
            self._settle(job, fault(error, job.call), job.registry)

    def _settle(self, job: _Job, result: CallResult | Exception, fork: ImageRegistry) -> None:
        if job not in self._running:
            return  # it was given up before it ended
        self._running.remove(job)
        self._start()
        if isinstance(result, Exception):
            raise result
        if result.status is CallStatus.EXECUTED:
            job.registry.adopt(fork)
        self._ready.append((job.key, result))


def _work(job: _Job, fork: ImageRegistry, settings: ToolSettings, see: _See | None, finished: _Results) -> None:
    result, fork = run_call(job.tool, job.call, fork, settings)
    job.deadline = math.inf  # the rest is not the tool's
    try:
        result.seen = [see(fork, number) for number in result.images] if see else []
    except Exception as error:  # noqa: BLE001 - the caller's own, and raised there
        result = error
    finished.put((job, result, fork))
