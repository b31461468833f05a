"""Worlds whose tasks are made when they are read: each is a function of a seed, a split and an index."""

import io
from collections.abc import Callable, Mapping

import numpy as np
from PIL import Image

from imagent_jax.config import DataConfig
from imagent_jax.config.naming import import_path
from imagent_jax.data.check import Tasks
from imagent_jax.types import Task

WORLDS = {
    "tiny_code": "imagent_jax.tiny.code_world:task_at",
    "tiny_search": "imagent_jax.tiny.search_world:task_at",
    "tiny_total": "imagent_jax.tiny.total_world:task_at",
    "tiny_code_steps": "imagent_jax.tiny.published_steps:code_at",
    "tiny_search_steps": "imagent_jax.tiny.published_steps:search_at",
}
"""Import path of the function (seed, split, index) -> Task, by name of the data set."""


class GeneratedTasks(Tasks):
    """The first `count` tasks of a series. Nothing is written to disk."""

    def __init__(self, task_at: Callable[[int, str, int], Task], seed: int, split: str, count: int):
        self._task_at, self._seed, self._split, self._count = task_at, seed, split, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"There is no task {index} among {len(self)}.")
        return self._task_at(self._seed, self._split, int(index) % len(self))


def open_split(cfg: DataConfig, split: str, *_: object) -> GeneratedTasks:
    """Return the tasks of a split of the world `cfg.name`."""
    count = cfg.train_size if split == "train" else cfg.test_size
    return GeneratedTasks(import_path(WORLDS[cfg.name], "data.name"), cfg.seed, split, count)


def cycle_of(mix: Mapping[str, int], code: int, seed: int, index: int) -> tuple[str, np.random.Generator]:
    """Return the kind of task `index` and the generator of all that is random in it.

    Args:
        mix: tasks of each kind in a cycle; every cycle holds them in an order of its own.
        code: number of the split.
    """
    cycle = [kind for kind, times in mix.items() for _ in range(times)]
    block, place = divmod(index, len(cycle))
    kind = cycle[np.random.default_rng((seed, code, 0, block)).permutation(len(cycle))[place]]
    return kind, np.random.default_rng((seed, code, 1, index))


def encode_png(pixels: np.ndarray) -> bytes:
    """Return uint8 [H, W, 3] as PNG: a JPEG would lose what a fault has left."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
