"""From settings to tasks: random access to a split, and an iterator over batches that can be saved and resumed."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grain
import tensorflow_datasets as tfds

from imagent_jax.config import DataConfig
from imagent_jax.data import tiny_world_builder
from imagent_jax.data.jsonl import Fault, read_jsonl
from imagent_jax.data.task import Task
from imagent_jax.data.tiny_world import in_fixed_order

SPLITS = ("train", "test")


class ArrayRecordTasks(Sequence[Task]):
    """Tasks of one split of a TFDS folder in ArrayRecord format, read one at a time.

    Attributes:
        faults: always empty; rows are checked when they are written.
    """

    faults: tuple[Fault, ...] = ()

    def __init__(self, folder: pathlib.Path, split: str, change: Callable[[Task], Task] = lambda task: task):
        self._change = change
        try:
            self._source = tfds.builder_from_directory(folder).as_data_source(split)
        except Exception as error:
            raise ValueError(f"The task cache {folder} cannot be read; delete it and start again.") from error

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"There is no task {index} among {len(self)}.")
        return self._change(tiny_world_builder.from_example(self._source[int(index) % len(self)]))


def open_tasks(cfg: DataConfig, split: str) -> Sequence[Task]:
    """The tasks of a split, with random access.

    The tiny world is generated on first use and kept in `cfg.cache_dir`; JSON Lines are read from
    `<cfg.path>/<split>.jsonl`. The result's `faults` lists the rows left out (`cfg.skip_bad`).

    Raises:
        ValueError: an unknown split or data set, a missing file, or bad rows (`read_jsonl`).
    """
    if split not in SPLITS:
        raise ValueError(f"There is no split {split!r}; use one of {', '.join(SPLITS)}.")
    if cfg.name == "tiny_world":
        sizes = {"train": cfg.train_size, "test": cfg.test_size}
        change = [] if cfg.permute_images or split == "test" else [in_fixed_order]
        return ArrayRecordTasks(tiny_world_builder.prepare(cfg.cache_dir, sizes, cfg.seed), split, *change)
    if cfg.name == "jsonl":
        return read_jsonl(pathlib.Path(cfg.path).expanduser() / f"{split}.jsonl", skip_bad=cfg.skip_bad)
    raise ValueError(f"There is no data set {cfg.name!r}; set data.name to tiny_world or jsonl.")


class TaskIterator(Iterator[list[Task]]):
    """An endless iterator over batches of tasks. Its state is a small JSON-serialisable dict."""

    def __init__(self, iterator: grain.DatasetIterator):
        self._iterator = iterator

    def __next__(self) -> list[Task]:
        return next(self._iterator)

    def get_state(self) -> dict[str, Any]:
        """The place in the series: an iterator over the same tasks, batch and seed goes on from here."""
        return self._iterator.get_state()

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to the place that `get_state` named."""
        self._iterator.set_state(state)


def task_iterator(tasks: Sequence[Task], batch: int, seed: int, *, prefetch: int = 4, threads: int = 2) -> TaskIterator:
    """Batches of tasks without end, shuffled by `seed` anew in each epoch.

    The series is a function of `tasks`, `batch` and `seed` alone. Every task occurs once in an epoch; a batch may
    reach over the end of one.

    Args:
        tasks: random-access tasks.
        batch: tasks in a batch.
        seed: any integer.
        prefetch: batches read ahead.
        threads: threads that read.

    Raises:
        ValueError: `batch` below 1, or no tasks.
    """
    if batch < 1:
        raise ValueError(f"A batch needs at least one task; got {batch}.")
    if not len(tasks):
        raise ValueError("There are no tasks to iterate over; add rows to the data set.")
    series = grain.MapDataset.source(tasks).shuffle(seed=seed % 2**32).repeat()
    dataset = series.batch(batch, drop_remainder=True, batch_fn=list)  # of an endless series; grain's ceil overflows at 1
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch)
    return TaskIterator(iter(dataset.to_iter_dataset(options)))
