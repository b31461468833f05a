"""Calls in progress: rows whose observations other rows may not wait for."""

import time
import traceback
from collections.abc import Sequence
from dataclasses import replace

from imagent_jax.chat import Call, MalformedCall
from imagent_jax.config import ToolsConfig
from imagent_jax.images.prepare import PreparedImage
from imagent_jax.rollout.engine import Engine
from imagent_jax.rollout.episode import Episode, Rules
from imagent_jax.tools import CallPool, fault
from imagent_jax.types import CallResult


class PendingCalls:
    """Calls in progress, by row, in the order in which they were made. Images that a call shows are prepared on its thread."""

    def __init__(self, rules: Rules, cfg: ToolsConfig):
        self.rules, self.timeout_s, self.patience_s = rules, cfg.timeout_s, cfg.patience_s
        self.pool = CallPool(cfg.workers, cfg.timeout_s)
        self.calling: dict[int, tuple[Call | MalformedCall, float]] = {}  # and the seconds that each may take
        self.late: set[int] = set()  # rows whose calls were waited for in vain
        self.results: dict[int, tuple[CallResult, list[PreparedImage]]] = {}

    def submit(self, row: int, episode: Episode, call: Call | MalformedCall) -> None:
        """Start a call."""
        environment, prepare = episode.environment, self.rules.prepare

        def shown(numbers: Sequence[int]) -> list[PreparedImage]:
            images = environment.images
            return [prepare(environment, images[number - 1], observed=True) for number in numbers]

        def seen(result: CallResult) -> tuple[CallResult, list[PreparedImage]]:
            try:
                return result, self.rules.ask(environment, lambda: shown(result.images))
            except BaseException:  # noqa: BLE001 - of an environment of the user's
                return fault(traceback.format_exc(), call), []

        def run() -> CallResult:
            began = time.perf_counter()
            try:
                result = replace(environment.step(call))
            except BaseException:  # noqa: BLE001 - of an environment of the user's
                result = fault(traceback.format_exc(), call)
            return replace(result, seconds=time.perf_counter() - began)

        try:
            limit_s = self.rules.ask(environment, lambda: environment.tools.limit_s(call)) or self.timeout_s
        except Exception:  # noqa: BLE001 - of an environment of the user's
            self.calling[row], self.results[row] = (call, self.timeout_s), (fault(traceback.format_exc(), call), [])
            return
        self.calling[row] = call, limit_s
        self.pool.submit(row, run, seen, limit_s)

    def due(self, engine: Engine) -> dict[int, tuple[CallResult, list[PreparedImage]]]:
        """Return the results that rows get next: those that called first, as soon as they are a quarter of the batch or nothing
        else is left to do. Their calls are waited for; while other rows could go on, only for `tools.patience_s`. What is
        slower than that comes whenever it is there."""
        self._poll()
        waiting = [b for b in self.calling if b not in self.late or b in self.results]
        if len(waiting) < engine.quarter and engine.live.any():
            return {}
        waiting = engine.fitting(waiting or self.calling)
        give_up = time.perf_counter() + self.patience_s
        while any(b not in self.results for b in waiting):
            self._poll(0.1)
            others = engine.live.any() or any(b in self.results for b in waiting)
            if others and time.perf_counter() > give_up:
                self.late.update(b for b in waiting if b not in self.results)
                break
        engine.clock.lap("tools")
        due = {b: self.results.pop(b) for b in waiting if b in self.results}
        for b in due:
            del self.calling[b]
        self.late.difference_update(due)
        return due

    def _poll(self, timeout_s: float = 0.0) -> None:
        for row, result in self.pool.poll(timeout_s):
            self.results[row] = (self._overdue(row), []) if result is None else result

    def _overdue(self, row: int) -> CallResult:
        call, limit_s = self.calling[row]
        name = call.name if isinstance(call, Call) else "reading a call"
        return replace(fault(f"{name} ran longer than {limit_s:g} s", call), seconds=limit_s)
