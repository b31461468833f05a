"""The result of `Collector.collect`, and joining of the results of several processes."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace

import jax
import numpy as np
from jax.sharding import get_mesh

from imagent_jax.distributed import processes
from imagent_jax.model.features import COUNTS, EncodedImages, FeatureStore, Pages
from imagent_jax.model.interleave import Encoded
from imagent_jax.types import Task, Trajectory


@dataclass
class RolloutBatch:
    """G trajectories per task, the encoded prompts and the encoded images of both.

    Attributes:
        prompt_vision: feature row of every prompt token (-1: text), int32 [S] per task.
        times: seconds by phase.
    """

    tasks: list[Task]
    prompts: list[Encoded]
    prompt_vision: list[np.ndarray]
    trajectories: list[list[Trajectory]]
    store: EncodedImages
    times: dict[str, float]
    sampled_tokens: int
    image_token_id: int


def join_batches(own: RolloutBatch, tasks: Sequence[Task]) -> RolloutBatch:
    """Join the rollouts of all processes into the batch of all `tasks`.

    Trajectories of other processes come without images. The n-th pages of all processes are stacked on the current mesh when
    page n is first shown; pixels are not transferred.
    """
    rows, count, place = own.store.rows, jax.process_count(), processes.place()

    def moved(vision):
        page, row = np.divmod(vision, rows)
        return np.where(vision >= 0, (page * count + place) * rows + row, -1).astype(np.int32)

    own.prompt_vision = [moved(vision) for vision in own.prompt_vision]
    for t in (t for group in own.trajectories for t in group):
        t.vision = moved(t.vision)
    light = replace(
        own, tasks=[], store=SimpleNamespace(**{name: getattr(own.store, name) for name in COUNTS}),
        prompts=[prompt._replace(images=[]) for prompt in own.prompts],
        trajectories=[[replace(t, images=None, task=replace(t.task, images=())) for t in group] for group in own.trajectories],
    )  # fmt: skip
    everyone = processes.gather(light)
    everyone[jax.process_index()].trajectories = own.trajectories

    def chain(name):
        return [item for one in everyone for item in getattr(one, name)]

    def stacked(page: int) -> jax.Array:
        with processes.alone():
            part = own.store.pages[page] if page < len(own.store.pages) else own.store.blank()
        return processes.stack_rows(part)

    store = EncodedImages(own.store.model, Pages(own.store.pages.room, stacked, keep=False), count * rows, get_mesh())
    if not own.store.frozen:
        store.packs = spread_packs(own.store)
    for name in COUNTS:
        setattr(store, name, sum(getattr(one.store, name) for one in everyone))
    return RolloutBatch(
        list(tasks), chain("prompts"), chain("prompt_vision"), chain("trajectories"), store,
        {name: max(one.times.get(name, 0.0) for one in everyone) for name in everyone[0].times},
        sum(one.sampled_tokens for one in everyone), own.image_token_id,
    )  # fmt: skip


def spread_packs(own: FeatureStore) -> list[tuple[jax.Array, ...]]:
    """Join the n-th packs of all processes, each sharded over its process's devices. Processes with fewer packs add blanks."""
    most = max(processes.gather(len(own.packs)))
    packs = [*own.packs, *[own.blank_pack(own.sizes[-1])] * (most - len(own.packs))]
    return [tuple(map(processes.spread, pack)) for pack in packs]
