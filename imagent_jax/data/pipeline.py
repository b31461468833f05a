"""Data pipeline: random access to a split's tasks, and a resumable series of training tasks."""

from __future__ import annotations

import copy
import functools
import zlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import grain

from imagent_jax.config import DataConfig, import_path
from imagent_jax.data.check import Progress, TaskCheck, Tasks
from imagent_jax.data.curriculum import PassRates, RateCheck, named_rate
from imagent_jax.data.mixture import Mixture, next_source, open_mixture
from imagent_jax.types import ANSWER_TYPES, Task

SPLITS = ("train", "test")
SOURCES = {
    "tiny_world": "imagent_jax.tiny.tasks:open_split",
    **dict.fromkeys(
        ("tiny_code", "tiny_search", "tiny_total", "tiny_code_steps", "tiny_search_steps"),
        "imagent_jax.tiny.generated:open_split",
    ),
    "files": "imagent_jax.data.reader:open_split",
}
"""Data sets: import path of the function that opens a split from the settings; imported on use."""


def check_source(cfg: DataConfig) -> None:
    """Check that the settings name a data set, before anything is loaded.

    Raises:
        ValueError: unknown data set or answer type, no path of files, or a path beside a data set that reads none.
    """
    mixed = {f"data.mixture.{name}": source for name, source in cfg.mixture.items()}
    for name, source in {"data": cfg, **mixed}.items():
        if source.answer_type not in ("", *ANSWER_TYPES):
            raise ValueError(f"{name}.answer_type is {source.answer_type!r}; set one of {', '.join(ANSWER_TYPES)}, or ''.")
    for name, source in (mixed or {"data": cfg}).items():
        if source.name not in SOURCES:
            raise ValueError(f"There is no data set {source.name!r}; set {name}.name to one of {', '.join(SOURCES)}.")
        if source.name == "files" and not source.path:
            raise ValueError(f"{name}.name is 'files' but {name}.path is empty; name the folder with train.jsonl and test.jsonl.")
        if source.name != "files" and (path := source.path or source.test_path):
            raise ValueError(
                f"{name}.name is {source.name!r}, which does not read {path}; set {name}.name to files, or unset the path."
            )


def open_tasks(cfg: DataConfig, split: str, check: TaskCheck | None = None, progress: Progress = lambda sentence: None) -> Tasks:
    """Return the tasks of a split, with random access; of a mixture, a `Mixture`. Rows are omitted only with `cfg.skip_bad`.

    Args:
        check: tries whether a run can use a task, see `rollout.prompt_check`. The tiny world's tasks are not tried.
        progress: shows how far the check is.

    Raises:
        ValueError: unknown split or data set, missing file, or invalid rows (`data.reader.read_tasks`).
    """
    if split not in SPLITS:
        raise ValueError(f"There is no split {split!r}; use one of {', '.join(SPLITS)}.")
    check_source(cfg)
    if cfg.mixture:
        return open_mixture(cfg, split, check, progress, open_tasks)
    if cfg.curriculum == "pass_rate" and split == "train":
        check = RateCheck(check)
    return import_path(SOURCES[cfg.name], "data.name")(cfg, split, check, progress)


class Drawn(NamedTuple):
    """A task drawn from the series: its source, its position in the source's series, and its index in the source."""

    source: str
    position: int
    index: int


class TaskIterator(Iterator[list[Task]]):
    """An endless series of tasks, see `task_iterator`. Its state is a JSON-serialisable dictionary.

    Every source is a series of its own: its tasks, shuffled in each epoch. A draw takes the next task of the source whose turn it
    is (`mixture.next_source`), first one that was given back. Tasks of later draws are read ahead on threads.
    """

    def __init__(self, tasks: Mixture, batch: int, seed: int, rates: PassRates | None, prefetch: int, threads: int):
        self.tasks, self.batch, self.seed, self.rates, self.prefetch = tasks, batch, seed, rates, prefetch
        series = {
            name: grain.MapDataset.range(len(own)).shuffle(seed=(seed + zlib.crc32(name.encode())) % 2**32).repeat()
            for name, own in tasks.sources.items()
        }
        # what is read ahead is asked for again in every batch, and an index of a small set takes milliseconds
        self.index = functools.lru_cache(2**16)(lambda source, position: int(series[source][position]))
        self.named_rate = functools.lru_cache(2**16)(self._named_rate)  # the pass rate in a task's row
        self.state: dict[str, dict[str, Any]] = {name: {"next": 0, "skipped": 0, "returned": []} for name in tasks.sources}
        self.pool = ThreadPoolExecutor(threads, "tasks")
        self.reading: dict[Drawn, Future[Task]] = {}
        self.keys: dict[str, str] = {}  # keys of pass rates by uid

    def __next__(self) -> list[Task]:
        return self.draw(self.batch)[0]

    def draw(self, count: int) -> tuple[list[Task], list[Drawn]]:
        """Return the next `count` tasks, and what `give_back` takes to return them."""
        drawn = [self._advance(self.state) for _ in range(count)]
        later = copy.deepcopy(self.state)
        wanted = [*drawn, *(self._advance(later) for _ in range(count * self.prefetch))]
        self.reading = {one: self.reading.get(one) or self.pool.submit(self._read, one) for one in wanted}
        tasks = [self.reading[one].result() for one in drawn]
        if self.rates:
            self.keys |= {task.uid: _key(one) for task, one in zip(tasks, drawn, strict=True)}
        return tasks, drawn

    def give_back(self, drawn: Sequence[Drawn]) -> None:
        """Return drawn tasks that were not used. They are the next that their sources give."""
        for source, position, _ in drawn:
            self.state[source]["returned"] = sorted([*self.state[source]["returned"], position])

    def learn(self, pass_rates: Iterable[tuple[str, float]]) -> None:
        """Take uids of drawn tasks, each with the share of a group's rollouts that was right. Without a curriculum: no-op."""
        if self.rates:
            for uid, share in pass_rates:
                self.rates.learn(self.keys[uid], share)

    def metrics(self) -> dict[str, float]:
        """Return metrics of the curriculum: `PassRates.metrics`, and `curriculum/skipped`, tasks left out since the start."""
        if not self.rates:
            return {}
        return self.rates.metrics() | {"curriculum/skipped": sum(own["skipped"] for own in self.state.values())}

    def get_state(self) -> dict[str, Any]:
        """Return the position in the series; an iterator with the same tasks and seed can continue from it."""
        return {"sources": copy.deepcopy(self.state), "pass_rates": dict(self.rates.known) if self.rates else {}}

    def set_state(self, state: dict[str, Any]) -> None:
        """Move to the position returned by `get_state`.

        Raises:
            ValueError: the state is of other sources.
        """
        state = copy.deepcopy(state)
        if (found := state.get("sources", {})).keys() != self.state.keys():
            raise ValueError(f"The run to resume has sources {[*found]}, not {[*self.state]}; set the same data.mixture.")
        self.state = {name: found[name] for name in self.state}  # in the order that decides between equals
        if self.rates:
            self.rates.known = state["pass_rates"]

    def _advance(self, state: dict[str, Any]) -> Drawn:
        """Draw a task: change a state, and return what is drawn."""
        drawn = {name: own["next"] - own["skipped"] - len(own["returned"]) for name, own in state.items()}
        source = next_source(drawn, self.tasks.weights)
        own = state[source]
        if own["returned"]:
            position = own["returned"].pop(0)
            return Drawn(source, position, self.index(source, position))
        while True:
            drawn = Drawn(source, own["next"], self.index(source, own["next"]))
            own["next"] += 1
            luck = zlib.crc32(f"{self.seed} {source} {drawn.position}".encode()) / 2**32
            if not self.rates or luck < self.rates.chance(_key(drawn), self.named_rate(source, drawn.index)):
                return drawn
            own["skipped"] += 1

    def _named_rate(self, source: str, index: int) -> float | None:
        tasks = self.tasks.sources[source]
        try:
            return named_rate(tasks.meta_of(index)) if isinstance(tasks, Tasks) else None
        except ValueError as error:
            raise ValueError(f"Task {tasks[index].uid} {error}.") from error

    def _read(self, drawn: Drawn) -> Task:
        return self.tasks.sources[drawn.source][drawn.index]


def _key(drawn: Drawn) -> str:
    return f"{drawn.source}/{drawn.index}"


def task_iterator(
    tasks: Sequence[Task], batch: int, seed: int, *, rates: PassRates | None = None, prefetch: int = 4, threads: int = 2
) -> TaskIterator:
    """Return an endless iterator over batches of tasks, reshuffled in each epoch.

    The series depends on `tasks`, `seed` and, with a curriculum, on what was learned before a draw. Without a curriculum every
    task of a source occurs once per epoch of the source. After any number of draws, the sources of a `Mixture` have the shares of
    their weights. A batch may contain tasks of two epochs.

    Args:
        tasks: random-access tasks.
        batch: tasks per batch.
        seed: any integer.
        rates: a curriculum by pass rates; None: none.
        prefetch: batches to read ahead.
        threads: reader threads.

    Raises:
        ValueError: `batch` is below 1, or there are no tasks.
    """
    if batch < 1:
        raise ValueError(f"A batch needs at least one task; got {batch}.")
    if not len(tasks):
        raise ValueError("There are no tasks to iterate over; add rows to the data set.")
    mixed = tasks if isinstance(tasks, Mixture) else Mixture({"": tasks}, {"": 1.0})
    return TaskIterator(mixed, batch, seed, rates, prefetch, threads)
