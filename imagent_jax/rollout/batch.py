"""The result of `Collector.collect`, and joining of the results of several processes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import get_mesh

from imagent_jax.distributed import processes
from imagent_jax.model.features import COUNTS, EncodedImages, FeatureStore, Pages
from imagent_jax.model.interleave import Encoded
from imagent_jax.types import Task, Trajectory


class Grade(NamedTuple):
    """What is known of a finished group.

    Attributes:
        spread: whether its rewards differ, so that it trains.
        scores: of its trajectories, for `RolloutBatch.grades`.
    """

    spread: bool
    scores: Any


class Refill(NamedTuple):
    """Replacement of groups without spread by fresh ones (dynamic sampling; DAPO, arXiv 2503.14476, section 3.2).

    Attributes:
        spares: fresh tasks, of which the first are used.
        grade: grades a finished group. It is called once for each group, in the process that has its images.
    """

    spares: Sequence[Task]
    grade: Callable[[list[Trajectory]], Grade]


@dataclass
class RolloutBatch:
    """G trajectories per task, the encoded prompts and the encoded images of both.

    Attributes:
        prompt_vision: feature row of every prompt token (-1: text), int32 [S] per task.
        times: seconds by phase.
        replaced: groups without spread that fresh tasks replaced (`rollout.refill`). They do not train.
        unused: places of the spare tasks that were not started; the tasks and the spares are counted together.
        grades: what `Refill.grade` found of each group of `trajectories`, then of `replaced`; empty without refill.
        tools: names of the tools that could be called.
        decoded: see `Engine.decoded`.
    """

    tasks: list[Task]
    prompts: list[Encoded]
    prompt_vision: list[np.ndarray]
    trajectories: list[list[Trajectory]]
    store: EncodedImages
    times: dict[str, float]
    sampled_tokens: int
    image_token_id: int
    replaced: list[list[Trajectory]] = field(default_factory=list)
    unused: list[int] = field(default_factory=list)
    grades: list[Any] = field(default_factory=list)
    tools: tuple[str, ...] = ()
    decoded: int = 0


def join_batches(own: RolloutBatch) -> RolloutBatch:
    """Join the rollouts of all processes.

    Tasks and trajectories of other processes come without images. The n-th pages of all processes are stacked on the current mesh
    when page n is first shown; pixels are not transferred.
    """
    rows, count, place = own.store.rows, jax.process_count(), processes.place()

    def moved(vision):
        page, row = np.divmod(vision, rows)
        return np.where(vision >= 0, (page * count + place) * rows + row, -1).astype(np.int32)

    own.prompt_vision = [moved(vision) for vision in own.prompt_vision]
    for t in (t for group in own.trajectories for t in group):
        t.vision = moved(t.vision)
    light = replace(
        own,
        store=SimpleNamespace(**{name: getattr(own.store, name) for name in COUNTS}),
        tasks=[_without_images(task) for task in own.tasks],
        prompts=[prompt._replace(images=[]) for prompt in own.prompts],
        **{
            name: [[replace(t, images=None, task=_without_images(t.task)) for t in group] for group in getattr(own, name)]
            for name in ("trajectories", "replaced")
        },
    )
    everyone = processes.gather(light)
    for name in ("tasks", "trajectories", "replaced"):
        setattr(everyone[jax.process_index()], name, getattr(own, name))

    def chain(name):
        return [item for one in everyone for item in getattr(one, name)]

    def stacked(page: int) -> jax.Array:
        with processes.alone():
            part = own.store.pages[page] if page < len(own.store.pages) else own.store.blank()
        return processes.stack_rows(part)

    store = EncodedImages(own.store.model, Pages(own.store.pages.room, stacked, keep=False), count * rows, get_mesh())
    if isinstance(own.store, FeatureStore) and not own.store.frozen:
        store.packs = spread_packs(own.store)
    for name in COUNTS:
        setattr(store, name, sum(getattr(one.store, name) for one in everyone))
    graded = [grade for one in everyone for grade in one.grades[: len(one.trajectories)]]
    graded += [grade for one in everyone for grade in one.grades[len(one.trajectories) :]]
    return RolloutBatch(
        chain("tasks"),
        chain("prompts"),
        chain("prompt_vision"),
        chain("trajectories"),
        store,
        {name: max(one.times.get(name, 0.0) for one in everyone) for name in everyone[0].times},
        sum(one.sampled_tokens for one in everyone),
        own.image_token_id,
        chain("replaced"),
        chain("unused"),
        graded,
        own.tools,
        sum(one.decoded for one in everyone),
    )


def _without_images(task: Task) -> Task:
    return replace(task, images=(), parts=())


def spread_packs(own: FeatureStore) -> list[tuple[jax.Array, ...]]:
    """Join the n-th packs of all processes, each sharded over its process's devices. Processes with fewer packs add blanks."""
    most = max(processes.gather(len(own.packs)))
    packs = [*own.packs, *[own.blank_pack(own.sizes[-1])] * (most - len(own.packs))]
    return [tuple(map(processes.spread, pack)) for pack in packs]
