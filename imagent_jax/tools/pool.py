"""Work on threads with a time limit: one piece, or a pool that runs tool calls while the policy decodes."""

import math
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any


def limited(work: Callable[[], Any], timeout_s: float, remedy: str = "") -> Any:
    """Run `work` on a thread of its own and return its result. A thread that is late is left behind; it keeps no process alive.

    Raises:
        TimeoutError: it ran longer than `timeout_s` seconds. `remedy` ends the sentence.
        RuntimeError: it raised what is no exception, such as SystemExit. Exceptions of `work` are raised as they are.
    """
    done: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()

    def run() -> None:
        try:
            done.put((work(), None))
        except BaseException as error:  # noqa: BLE001 - raised in the caller
            done.put((None, error))

    threading.Thread(target=run, name="limited", daemon=True).start()
    try:
        result, error = done.get(timeout=min(timeout_s, threading.TIMEOUT_MAX))
    except queue.Empty:
        raise TimeoutError(f"longer than {timeout_s:g} s{remedy}") from None
    if error is not None:
        raise error if isinstance(error, Exception) else RuntimeError(repr(error)) from error
    return result


@dataclass(eq=False)
class _Job:
    key: Any
    work: Callable[[], Any]
    then: Callable[[Any], Any]
    timeout_s: float
    deadline: float = 0.0


class CallPool:
    """Runs work in daemon threads: `submit` work, then collect results by `poll` or `drain`.

    Args:
        workers: maximum number of pieces that run concurrently, not counting those past their limit.
        timeout_s: time limit per piece in seconds, counted from its start.

    Raises:
        ValueError: `workers` is below 1 or `timeout_s` is not positive.
    """

    def __init__(self, workers: int = 4, timeout_s: float = 10.0) -> None:
        if workers < 1 or timeout_s <= 0:
            raise ValueError(f"workers must be at least 1 and timeout_s above 0, got {workers} and {timeout_s}")
        self._workers, self._timeout_s = workers, timeout_s
        self._waiting: deque[_Job] = deque()
        self._running: list[_Job] = []
        self._ready: list[tuple[Any, Any]] = []
        self._finished: queue.SimpleQueue[tuple[_Job, Any]] = queue.SimpleQueue()

    @property
    def pending(self) -> int:
        """Number of results not yet returned."""
        return len(self._waiting) + len(self._running) + len(self._ready)

    def submit(
        self,
        key: Any,
        work: Callable[[], Any],
        then: Callable[[Any], Any] = lambda result: result,
        timeout_s: float | None = None,
    ) -> None:
        """Queue `work`; its result is returned together with `key`.

        Args:
            timeout_s: its time limit; default: that of the pool.
            then: called with the result in the same thread, without time limit; its return value replaces the result.

        Exceptions of `work` and `then` are raised by `poll` and `drain`.
        """
        self._waiting.append(_Job(key, work, then, timeout_s or self._timeout_s))
        self._start()

    def poll(self, timeout_s: float = 0.0) -> list[tuple[Any, Any]]:
        """Return the available results by key; None: time limit exceeded. Wait up to `timeout_s` seconds for the first result."""
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

    def drain(self) -> Iterator[tuple[Any, Any]]:
        """Yield all pending results as they become available."""
        while self.pending:
            yield from self.poll(self._timeout_s)

    def _start(self) -> None:
        while self._waiting and len(self._running) < self._workers:
            job = self._waiting.popleft()
            job.deadline = time.monotonic() + job.timeout_s
            self._running.append(job)
            threading.Thread(target=_run, args=(job, self._finished), name=f"tool-{job.key}", daemon=True).start()

    def _collect(self) -> None:
        """Settle finished jobs, then those past their deadline."""
        while True:
            try:
                self._settle(*self._finished.get_nowait())
            except queue.Empty:
                break
        now = time.monotonic()
        for job in [job for job in self._running if now >= job.deadline]:
            self._settle(job, None)

    def _settle(self, job: _Job, result: Any) -> None:
        if job not in self._running:
            return  # it was given up before it ended
        self._running.remove(job)
        self._start()
        if isinstance(result, BaseException):
            raise result
        self._ready.append((job.key, result))


def _run(job: _Job, finished: "queue.SimpleQueue[tuple[_Job, Any]]") -> None:
    try:
        result, late = job.work(), time.monotonic() >= job.deadline
        job.deadline = math.inf  # the rest is not the work's
        result = None if late else job.then(result)
    except BaseException as error:  # noqa: BLE001 - raised in the caller
        result = error
    finished.put((job, result))
