"""Prefetch: work on the next step while the current step trains."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
from flax import nnx

from imagent_jax.config import RolloutConfig
from imagent_jax.data.pipeline import Drawn, TaskIterator
from imagent_jax.rollout.batch import Grade, Refill, RolloutBatch
from imagent_jax.rollout.collect import Collector
from imagent_jax.types import Task, Trajectory


class Prefetcher:
    """Provides the rollouts of a run, step by step. While a step trains, the tasks of the next step are read and preprocessed.

    With `rollout.overlap`, the rollouts of the next step are sampled too, with the weights from before the update. The step after
    a checkpoint of `run.checkpoint_every` always uses the checkpoint's weights, so that a resumed run samples the same rollouts.
    Rollouts depend on the seed, the step and the weights only.

    With `rollout.refill`, a step draws that many spare tasks besides, which are opened ahead too. Those that it does not use are
    given back to the iterator.

    Args:
        grade: see `Refill`.
    """

    def __init__(
        self,
        collector: Collector,
        iterator: TaskIterator,
        cfg: RolloutConfig,
        seed: int,
        grade: Callable[[list[Trajectory]], Grade],
    ):
        self.collector, self.iterator, self.cfg, self.seed, self.grade = collector, iterator, cfg, seed, grade
        self.thread = ThreadPoolExecutor(1, "rollouts")
        self.next: _Begun | None = None

    @property
    def place(self) -> Any:
        """The iterator's state before the first step that has not been taken."""
        return self.next.place if self.next else self.iterator.get_state()

    def begin(self, step: int, params: nnx.State | None = None) -> "_Begun":
        """Start preprocessing the tasks of `step` (counted from 0), and with `params` also sampling its rollouts."""
        place, n = self.iterator.get_state(), self.cfg.groups
        tasks, drawn = self.iterator.draw(n + self.cfg.refill)
        opened, rollouts = None, None
        if params is None:
            opened = self.collector.open_in_background(tasks[:n], tasks[n:])
        else:
            weights, mesh = self.collector.weights(params), jax.sharding.get_mesh()
            rollouts = self.thread.submit(self._sample_on, mesh, step, tasks, weights)
        self.next = _Begun(place, tasks, drawn, opened, rollouts)
        return self.next

    def take(self, step: int, params: nnx.State) -> tuple[RolloutBatch, int]:
        """Return the rollouts of `step`, and the age, in updates, of the weights that sampled them (0 or 1).

        Raises:
            Stopped: see `Collector`; the step is not taken.
        """
        _, tasks, drawn, opened, rollouts = self.next or self.begin(step)
        batch = rollouts.result() if rollouts else self._sample(step, tasks, self.collector.weights(params), opened)
        self.next = None
        self.iterator.give_back([drawn[place] for place in batch.unused])
        return batch, int(rollouts is not None)

    def _sample(self, step: int, tasks: Sequence[Task], weights, opened=None) -> RolloutBatch:
        n = self.cfg.groups
        return self.collector.collect(
            weights,
            tasks[:n],
            group_size=self.cfg.group_size,
            seed=self.seed * 1_000_003 + step,
            temperature=self.cfg.temperature,
            opened=opened,
            refill=Refill(tasks[n:], self.grade) if self.cfg.refill else None,
        )

    def _sample_on(self, mesh, *args) -> RolloutBatch:
        with jax.set_mesh(mesh):  # the current mesh is thread-local
            return self._sample(*args)

    def close(self) -> None:
        """Stop work in progress and end the thread."""
        if self.next and self.next.rollouts:
            self.collector.stop.set()
            self.next.rollouts.exception()
        self.thread.shutdown()


class _Begun(NamedTuple):
    """A started step: iterator state before it, its tasks and spares, its preprocessed prompts and its rollouts in progress."""

    place: Any
    tasks: Sequence[Task]
    drawn: Sequence[Drawn]
    opened: list[Future] | None
    rollouts: Future | None
