"""From settings to tasks: random access to a split, and an iterator over batches that can be saved and resumed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import grain

from imagent_jax.config import DataConfig, import_path
from imagent_jax.types import Task

SPLITS = ("train", "test")
SOURCES = {"tiny_world": "imagent_jax.tiny.tasks:open_split", "jsonl": "imagent_jax.data.jsonl:open_split"}
"""Function of each data set, called with the settings and the split. Imported when it is asked for."""


def open_tasks(cfg: DataConfig, split: str) -> Sequence[Task]:
    """Return the tasks of a split, with random access.

    Attribute `faults` of the result lists the rows left out (`cfg.skip_bad`).

    Raises:
        ValueError: an unknown split or data set, a missing file, or bad rows (`data.jsonl.read_jsonl`).
    """
    if split not in SPLITS:
        raise ValueError(f"There is no split {split!r}; use one of {', '.join(SPLITS)}.")
    if cfg.name not in SOURCES:
        raise ValueError(f"There is no data set {cfg.name!r}; set data.name to {' or '.join(SOURCES)}.")
    return import_path(SOURCES[cfg.name], "data.name")(cfg, split)


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
