"""What of the next step is done while this one trains."""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
from flax import nnx

from imagent_jax.config import Config
from imagent_jax.data.pipeline import TaskIterator
from imagent_jax.rollout.engine import RolloutBatch, RolloutEngine
from imagent_jax.types import Task


class Ahead:
    """The rollouts of a run, step by step. While a step trains, the tasks of the next are read and their prompts prepared;
    with `rollout.overlap` their rollouts are sampled too, by the weights from before the update.

    A rollout is a function of the seed, the step and the weights. Weights that a checkpoint holds are never overtaken, so a
    run that resumes from one of `run.checkpoint_every` goes on as it would have.
    """

    def __init__(self, engine: RolloutEngine, iterator: TaskIterator, cfg: Config):
        self.engine, self.iterator, self.cfg = engine, iterator, cfg
        self.thread = ThreadPoolExecutor(1, "rollouts")
        self.next: tuple[Any, Sequence[Task], Future | None] | None = None  # where it begins, its tasks, its rollouts

    @property
    def place(self) -> Any:
        """The iterator's state before the first step that was not taken."""
        return self.next[0] if self.next else self.iterator.get_state()

    def begin(self, step: int, params: nnx.State | None = None) -> None:
        """Begins `step` (counted from 0): its prompts, and with `params` its rollouts."""
        place, tasks, rollouts = self.iterator.get_state(), next(self.iterator), None
        if params is None:
            self.engine.open_ahead(tasks)
        else:
            weights, mesh = self.engine.weights(params), jax.sharding.get_mesh()
            rollouts = self.thread.submit(self._sample, step, tasks, weights, mesh)
        self.next = place, tasks, rollouts

    def take(self, step: int, params: nnx.State) -> tuple[RolloutBatch, int]:
        """The rollouts of `step`, and by how many steps the weights that sampled them are old (0 or 1).

        Raises:
            Stopped: see `RolloutEngine.stop`; the step is not taken.
        """
        if self.next is None:
            self.begin(step)
        _, tasks, rollouts = self.next
        batch = rollouts.result() if rollouts else self._sample(step, tasks, self.engine.weights(params))
        self.next = None
        return batch, int(rollouts is not None)

    def _sample(self, step: int, tasks: Sequence[Task], weights, mesh=None) -> RolloutBatch:
        r, seed = self.cfg.rollout, self.cfg.run.seed * 1_000_003 + step
        if mesh is None:
            return self.engine.rollout(weights, tasks, group_size=r.group_size, seed=seed, temperature=r.temperature)
        with jax.set_mesh(mesh):  # another thread's, which has none
            return self._sample(step, tasks, weights)

    def close(self) -> None:
        """Gives up what was begun."""
        if self.next and self.next[2]:
            self.engine.stop = lambda: True
            self.next[2].exception()
        self.thread.shutdown()
