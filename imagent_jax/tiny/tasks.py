"""The tiny world as tasks: written once to ArrayRecord, then read with random access."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from imagent_jax.config import DataConfig
from imagent_jax.data.check import Tasks
from imagent_jax.tiny import builder
from imagent_jax.tiny.world import in_fixed_order
from imagent_jax.types import Task


class ArrayRecordTasks(Tasks):
    """Tasks of one split of a TFDS folder in ArrayRecord format, read one at a time. Rows are checked when they are written."""

    def __init__(self, folder: Path, split: str, change: Callable[[Task], Task] = lambda task: task):
        self._change = change
        try:
            written = tfds.builder_from_directory(folder)
            self._source: Any = written.as_data_source(split)  # ty: ignore[invalid-argument-type] - its decorator has no types
        except Exception as error:
            raise ValueError(f"The task cache {folder} cannot be read; delete it and start again.") from error

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"There is no task {index} among {len(self)}.")
        return self._change(builder.from_example(self._source[int(index) % len(self)]))


def open_split(cfg: DataConfig, split: str, *_: object) -> ArrayRecordTasks:
    """Return the tasks of a split. The first use generates them into `cfg.cache_dir`; they need no check."""
    sizes = {"train": cfg.train_size, "test": cfg.test_size}
    change = [] if cfg.permute_images or split == "test" else [in_fixed_order]
    return ArrayRecordTasks(builder.prepare(cfg.cache_dir, sizes, cfg.seed), split, *change)
