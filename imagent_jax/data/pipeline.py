"""Data pipeline: random access to a split's tasks, and a resumable iterator over batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import grain

from imagent_jax.config import DataConfig, import_path
from imagent_jax.data.check import Progress, TaskCheck
from imagent_jax.types import Task

SPLITS = ("train", "test")
SOURCES = {"tiny_world": "imagent_jax.tiny.tasks:open_split", "files": "imagent_jax.data.reader:open_split"}
"""Data sets: import path of the function that opens a split from the settings; imported on use."""


def check_source(cfg: DataConfig) -> None:
    """Check that the settings name a data set, before anything is loaded.

    Raises:
        ValueError: unknown data set, or no path of files.
    """
    if cfg.name not in SOURCES:
        raise ValueError(f"There is no data set {cfg.name!r}; set data.name to {' or '.join(SOURCES)}.")
    if cfg.name == "files" and not cfg.path:
        raise ValueError("data.name is 'files' but data.path is empty; name the folder with train.jsonl and test.jsonl.")


def open_tasks(
    cfg: DataConfig, split: str, check: TaskCheck | None = None, progress: Progress = lambda sentence: None
) -> Sequence[Task]:
    """Return the tasks of a split as a random-access sequence.

    The attribute `faults` of the result lists omitted rows (`cfg.skip_bad`).

    Args:
        check: tries whether a run can use a task, see `rollout.prompt_check`. The tiny world's tasks are not tried.
        progress: shows how far the check is.

    Raises:
        ValueError: unknown split or data set, missing file, or invalid rows (`data.reader.read_tasks`).
    """
    if split not in SPLITS:
        raise ValueError(f"There is no split {split!r}; use one of {', '.join(SPLITS)}.")
    check_source(cfg)
    return import_path(SOURCES[cfg.name], "data.name")(cfg, split, check, progress)


class TaskIterator(Iterator[list[Task]]):
    """An endless iterator over batches of tasks. Its state is a small JSON-serialisable dictionary."""

    def __init__(self, iterator: grain.DatasetIterator):
        self._iterator = iterator

    def __next__(self) -> list[Task]:
        return next(self._iterator)

    def get_state(self) -> dict[str, Any]:
        """Return the position in the series; an iterator with the same tasks, batch and seed can continue from it."""
        return self._iterator.get_state()

    def set_state(self, state: dict[str, Any]) -> None:
        """Move to the position returned by `get_state`."""
        self._iterator.set_state(state)


def task_iterator(tasks: Sequence[Task], batch: int, seed: int, *, prefetch: int = 4, threads: int = 2) -> TaskIterator:
    """Return an endless iterator over batches of tasks, reshuffled in each epoch.

    The series depends on `tasks`, `batch` and `seed` only. Every task occurs once per epoch. A batch may contain tasks of two
    epochs.

    Args:
        tasks: random-access tasks.
        batch: tasks per batch.
        seed: any integer.
        prefetch: batches to read ahead.
        threads: reader threads.

    Raises:
        ValueError: `batch` is below 1, or there are no tasks.
    """
    if batch < 1:
        raise ValueError(f"A batch needs at least one task; got {batch}.")
    if not len(tasks):
        raise ValueError("There are no tasks to iterate over; add rows to the data set.")
    series = grain.MapDataset.source(tasks).shuffle(seed=seed % 2**32).repeat()
    dataset = series.batch(batch, drop_remainder=True, batch_fn=list)  # endless: grain's ceil overflows without it
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch)
    return TaskIterator(iter(dataset.to_iter_dataset(options)))
