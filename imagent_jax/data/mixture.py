"""Mixtures: several sources of tasks, each with its own weight, answer type, tools, rewards and held-out split."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

from imagent_jax.config import DataConfig, SourceConfig, import_path
from imagent_jax.data.check import Fault, Progress, TaskCheck, Tasks
from imagent_jax.types import Task

Opener = Callable[[DataConfig, str, TaskCheck | None, Progress], Tasks]
"""Opens the tasks of a split from settings without a mixture, see `pipeline.open_tasks`."""


def next_source(drawn: Mapping[str, int], weights: Mapping[str, float]) -> str:
    """Return the source whose turn it is: the first with the least (drawn + 1/2) / weight (Webster's method).

    Args:
        drawn: tasks drawn from each source so far; only these sources are considered.
        weights: share of each source, above 0.
    """
    return min(drawn, key=lambda name: (drawn[name] + 0.5) / weights[name])


def of_source(task: Task, name: str, cfg: SourceConfig) -> Task:
    """Return a task as one of a source: with its name, also before the uid, and its tools, rewards and environment where the task
    has none."""
    tools = cfg.tools if task.tools is None else task.tools
    own = {"tools": tools, "reward": {**cfg.reward, **task.reward}, "environment": task.environment or cfg.environment}
    return replace(task, uid=f"{name}/{task.uid}", source=name, **own)


class SourceTasks(Tasks):
    """The tasks of a source of a mixture, see `of_source`."""

    def __init__(self, name: str, cfg: SourceConfig, tasks: Tasks):
        self.name, self.cfg, self.tasks = name, cfg, tasks

    def __len__(self) -> int:
        return len(self.tasks)

    def meta_of(self, index: int) -> Mapping[str, Any]:
        """See `Tasks.meta_of`."""
        return self.tasks.meta_of(index)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return of_source(self.tasks[index], self.name, self.cfg)


class Mixture(Tasks):
    """The tasks of several sources, each once, in an order that keeps the shares of their weights as long as tasks are left.

    Args:
        sources: tasks by name.
        weights: share of each source, above 0.

    Attributes:
        faults: omitted rows of all sources.
    """

    def __init__(self, sources: Mapping[str, Sequence[Task]], weights: Mapping[str, float], faults: Sequence[Fault] = ()):
        self.sources, self.weights, self.faults = dict(sources), dict(weights), tuple(faults)

    def __len__(self) -> int:
        return sum(map(len, self.sources.values()))

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        name, place = self._order[index]
        return self.sources[name][place]

    @cached_property
    def _order(self) -> list[tuple[str, int]]:
        order, drawn = [], dict.fromkeys(self.sources, 0)
        while drawn:
            name = next_source(drawn, self.weights)
            order.append((name, drawn[name]))
            drawn[name] += 1
            if drawn[name] == len(self.sources[name]):
                del drawn[name]
        return order


class _SourceCheck:
    """A check of rows that sees the tasks of a source as the run will."""

    def __init__(self, check: TaskCheck, name: str, cfg: SourceConfig):
        self.check, self.name, self.cfg = check, name, cfg
        self.fingerprint = f"{check.fingerprint} {cfg.tools} {cfg.environment}"

    def __call__(self, task: Task, sizes: Sequence[tuple[int, int]]) -> None:
        self.check(of_source(task, self.name, self.cfg), sizes)


def open_mixture(cfg: DataConfig, split: str, check: TaskCheck | None, progress: Progress, open_split: Opener) -> Mixture:
    """Return the tasks of a split of all sources in `cfg.mixture`.

    Args:
        open_split: opens one of them.
    Raises:
        ValueError: a source has no such split, or see `open_split`; the sentence names the source's settings.
    """
    sources, faults = {}, []
    for name, source in cfg.mixture.items():
        if source.environment:
            import_path(source.environment, f"data.mixture.{name}.environment")
        kind = source.answer_type or cfg.answer_type
        own = replace(cfg, mixture={}, name=source.name, path=source.path, test_path=source.test_path, answer_type=kind)
        try:
            tasks = open_split(own, split, check and _SourceCheck(check, name, source), progress)
        except ValueError as error:
            raise ValueError(re.sub(r"\bdata\.((?:test_)?path|name)\b", rf"data.mixture.{name}.\1", str(error))) from error
        sources[name] = SourceTasks(name, source, tasks)
        faults += tasks.faults
    return Mixture(sources, {name: source.weight for name, source in cfg.mixture.items()}, faults)
