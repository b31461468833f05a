"""Curriculum: tasks that are always or never solved come again less often (the online form of DAPO's dynamic sampling)."""

from collections.abc import Mapping, Sequence
from typing import Any

from imagent_jax.data.check import RowError, TaskCheck
from imagent_jax.types import Task

MEMORY = 4
"""The newest measurement of a task has at least a weight of 1 / MEMORY in its running mean."""


def named_rate(meta: Mapping[str, Any]) -> float | None:
    """Return the pass rate that a row names; None: none.

    Raises:
        ValueError: it is no number from 0 to 1.
    """
    rate = meta.get("pass_rate")
    if rate is not None and (isinstance(rate, bool) or not (isinstance(rate, int | float) and 0 <= rate <= 1)):
        raise ValueError(f"has pass_rate {rate!r:.80}; a curriculum needs numbers from 0 to 1, or none")
    return rate


class RateCheck:
    """A check of tasks (`check.TaskCheck`) for a run with a curriculum: it also tries the pass rate that a row names."""

    def __init__(self, check: TaskCheck | None):
        self.check, self.fingerprint = check, f"{check.fingerprint if check else ''} pass_rate"

    def __call__(self, task: Task, sizes: Sequence[tuple[int, int]]) -> None:
        try:
            named_rate(task.meta)
        except ValueError as error:
            raise RowError("bad pass_rate", f"the row {error}") from error
        if self.check is not None:
            self.check(task, sizes)


class PassRates:
    """The measured pass rate of each task: the running mean of how many rollouts of a group were right.

    Args:
        group_size: G, rollouts of a group.
        floor: least chance that a task stays in an epoch, 0 to 1.

    Attributes:
        known: [measurements, pass rate] by the key of a task. JSON-serialisable; it can be replaced by a saved one.
    """

    def __init__(self, group_size: int, floor: float):
        self.group_size, self.floor = group_size, floor
        self.known: dict[str, list[float]] = {}

    def learn(self, key: str, share: float) -> None:
        """Add a measurement of a task: the share of a group's rollouts that was right, 0 to 1."""
        count, rate = self.known.get(key, (0, 0.0))
        self.known[key] = [count + 1, rate + (share - rate) / min(count + 1, MEMORY)]

    def chance(self, key: str, before: float | None = None) -> float:
        """Return how likely a task stays in an epoch: the probability that a group of G rollouts has right ones and wrong ones,
        1 - p**G - (1 - p)**G for a pass rate p, at least `floor`.

        Args:
            before: pass rate that the data set names; it counts until the task is measured. None: then the task stays.
        """
        rate = self.known[key][1] if key in self.known else before
        if rate is None:
            return 1.0
        return max(self.floor, 1.0 - rate**self.group_size - (1.0 - rate) ** self.group_size)

    def metrics(self) -> dict[str, float]:
        """Return `curriculum/measured`, the number of tasks measured, and `curriculum/chance`, their mean chance to stay."""
        chances = [self.chance(key) for key in self.known]
        return {"curriculum/measured": len(chances), "curriculum/chance": sum(chances) / max(1, len(chances))}
