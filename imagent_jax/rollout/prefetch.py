"""What of the next step is done while this one trains."""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
from flax import nnx

from imagent_jax.config import RolloutConfig
from imagent_jax.data.pipeline import TaskIterator
from imagent_jax.rollout.batch import RolloutBatch
from imagent_jax.rollout.collect import Collector
from imagent_jax.types import Task


class Prefetcher:
    """The rollouts of a run, step by step. While a step trains, the tasks of the next are read and their prompts prepared;
    with `rollout.overlap` their rollouts are sampled too, by the weights from before the update.

    A rollout is a function of the seed, the step and the weights. Weights that a checkpoint holds are never overtaken, so a
    run that resumes from one of `run.checkpoint_every` goes on as it would have.
    """

    def __init__(self, collector: Collector, iterator: TaskIterator, cfg: RolloutConfig, seed: int):
        self.collector, self.iterator, self.cfg, self.seed = collector, iterator, cfg, seed
        self.thread = ThreadPoolExecutor(1, "rollouts")
        self.next: _Begun | None = None

    @property
    def place(self) -> Any:
        """The iterator's state before the first step that was not taken."""
        return self.next.place if self.next else self.iterator.get_state()

    def begin(self, step: int, params: nnx.State | None = None) -> None:
        """Begin `step` (counted from 0): its prompts, and with `params` its rollouts."""
        place, tasks = self.iterator.get_state(), next(self.iterator)
        opened, rollouts = None, None
        if params is None:
            opened = self.collector.open_in_background(tasks)
        else:
            weights, mesh = self.collector.weights(params), jax.sharding.get_mesh()
            rollouts = self.thread.submit(self._sample_on, mesh, step, tasks, weights)
        self.next = _Begun(place, tasks, opened, rollouts)

    def take(self, step: int, params: nnx.State) -> tuple[RolloutBatch, int]:
        """Return the rollouts of `step`, and by how many steps the weights that sampled them are old (0 or 1).

        Raises:
            Stopped: see `Collector`; the step is not taken.
        """
        if self.next is None:
            self.begin(step)
        _, tasks, opened, rollouts = self.next
        batch = rollouts.result() if rollouts else self._sample(step, tasks, self.collector.weights(params), opened)
        self.next = None
        return batch, int(rollouts is not None)

    def _sample(self, step: int, tasks: Sequence[Task], weights, opened=None) -> RolloutBatch:
        return self.collector.collect(
            weights, tasks, group_size=self.cfg.group_size, seed=self.seed * 1_000_003 + step,
            temperature=self.cfg.temperature, opened=opened,
        )  # fmt: skip

    def _sample_on(self, mesh, *args) -> RolloutBatch:
        with jax.set_mesh(mesh):  # this thread has none
            return self._sample(*args)

    def close(self) -> None:
        """Give up what was begun."""
        if self.next and self.next.rollouts:
            self.collector.stop.set()
            self.next.rollouts.exception()
        self.thread.shutdown()


class _Begun(NamedTuple):
    """A step that was begun: where the iterator was, its tasks, its prompts and its rollouts in progress."""

    place: Any
    tasks: Sequence[Task]
    opened: list[Future] | None
    rollouts: Future | None
