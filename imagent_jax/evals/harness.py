"""Sampling of a benchmark's questions, in pieces that a killed evaluation does not lose."""

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from imagent_jax.chat import QWEN
from imagent_jax.config import Config
from imagent_jax.data.check import TaskCheck
from imagent_jax.evals.benchmark import Benchmark, Questions
from imagent_jax.evals.benchmarks import named
from imagent_jax.rollout.collect import Collector
from imagent_jax.runs.whole import Lines
from imagent_jax.types import EndReason, Task, Trajectory

Record = dict[str, Any]
"""What is kept of a row: its uid and its samples (`sample_of`)."""
SECTIONS = ("model", "lora", "images", "tools", "sandbox", "search", "rollout", "eval")
"""Sections of the settings on which samples depend."""


@dataclass(frozen=True)
class Opened:
    """A benchmark whose rows are read.

    Attributes:
        questions: in the order in which they are asked.
        prompted: whether the benchmark's own prompt is shown, and the reply read without answer markup.
    """

    benchmark: Benchmark
    questions: Questions
    prompted: bool

    def count(self, limit: int | None) -> int:
        """Return how many rows are asked: at most `limit`, but all of the last question of a circular benchmark. None: all."""
        facts, n = self.questions.facts, min(limit or len(self.questions), len(self.questions))
        ask = self.benchmark.question
        while self.benchmark.circular and n < len(facts) and ask(facts[n]) == ask(facts[n - 1]):
            n += 1
        return n

    def shown(self, begin: int, end: int) -> list[Task]:
        """Return tasks as the policy sees them."""
        tasks = self.questions[begin:end]
        return [self.benchmark.prompted(task) for task in tasks] if self.prompted else tasks


class _Check:
    """Tries whether a run can use a task as it is shown (`data.check.TaskCheck`)."""

    def __init__(self, check: TaskCheck, benchmark: Benchmark, prompted: bool):
        self.check, self.benchmark, self.prompted = check, benchmark, prompted
        self.fingerprint = f"{check.fingerprint} {prompted}"

    def __call__(self, task: Task, sizes: Sequence[tuple[int, int]]) -> None:
        self.check(self.benchmark.prompted(task) if self.prompted else task, sizes)


def open_benchmark(spec: str, cfg: Config, collector: Collector, progress: Callable[[str], None] = lambda words: None) -> Opened:
    """Return the benchmark that "NAME" or "NAME=PATH" names, with its rows.

    Raises:
        ValueError: there is no such benchmark or file, or a row cannot be used.
    """
    benchmark, path = named(spec)
    shuffle, prompted = {"auto": None, "on": True, "off": False}[cfg.eval.shuffle_options], cfg.eval.prompt == "benchmark"

    check = _Check(collector.check, benchmark, prompted)
    return Opened(benchmark, benchmark.open(path, cfg.data, shuffle=shuffle, check=check, progress=progress), prompted)


def reply_of(t: Trajectory, prompted: bool) -> str | None:
    """Return what is scored: the answer in its markup; under a benchmark's own prompt, else the text of a turn that ended by
    itself. None: there is no answer."""
    if t.answer is not None or not prompted or t.end != EndReason.VOID:
        return t.answer
    text = t.turns[-1].text
    for stop in (QWEN.turn_close, QWEN.end_of_text):
        text = text.removesuffix(stop)
    return text.strip() or None


def sample_of(t: Trajectory, prompted: bool) -> Record:
    """Return what is kept of a trajectory: reply, end, calls, sampled tokens, and the last line of an environment error."""
    return {
        "reply": reply_of(t, prompted), "end": t.end.name, "calls": t.executed_calls, "invalid": t.invalid_calls,
        "tokens": sum(turn.stop - turn.start for turn in t.turns),
        "fault": (t.error or "unknown").strip().splitlines()[-1] if t.end == EndReason.FAULT else None,
    }  # fmt: skip


def fingerprint(cfg: Config, opened: Opened, count: int, folder: Path) -> str:
    """Return a checksum of all that samples depend on. Weights in `folder`, and adapters, count by size and time of files."""
    settings = {name: asdict(getattr(cfg, name)) for name in SECTIONS}
    for name in ("benchmarks", "judge", "every", "tasks", "during"):
        settings["eval"].pop(name, None)
    tasks = [[task.uid, task.text, task.answers] for task in opened.questions.facts[:count]]
    weights = [file for place in (folder, cfg.lora.path) if place for file in sorted(Path(place).glob("*.safetensors"))]
    stamps = [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in weights]
    facts = [settings, opened.benchmark.name, cfg.data.seed, tasks, stamps]
    return hashlib.sha256(json.dumps(facts, default=str).encode()).hexdigest()


class Pieces:
    """The samples of a benchmark on disk: a line that names the settings, then a line for each piece of questions.

    Raises:
        ValueError: the file is of other settings.
    """

    def __init__(self, path: Path | None, key: str):
        self.lines, self.done = None, []
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        self.lines = Lines(path)
        if not self.lines.values:
            self.lines.add({"key": key})
        head, *self.done = self.lines.values
        if head["key"] != key:
            raise ValueError(f"{path} was sampled with other settings, data or model; choose another --out, or delete it.")

    def add(self, piece: Record) -> None:
        self.done.append(piece)
        if self.lines:
            self.lines.add(piece)


def sample(
    collector: Collector, params, opened: Opened, count: int, pieces: Pieces, *,
    keep: Callable[[Sequence[Sequence[Trajectory]]], None] = lambda groups: None,
    progress: Callable[[int, int], None] = lambda done, count: None,
) -> tuple[list[Record], float]:  # fmt: skip
    """Sample `eval.samples` rollouts of the first `count` questions. Returns their records and the seconds spent.

    A piece is sampled whole, so that what is sampled does not depend on where an evaluation was killed.

    Args:
        keep: takes the trajectories of the first piece.
    """
    cfg, size = collector.cfg, 4 * collector.cfg.eval.groups
    temperature = 0.0 if cfg.eval.greedy else cfg.rollout.temperature
    for number, begin in enumerate(range(0, count, size)):
        if number < len(pieces.done):
            continue
        began, tasks = time.perf_counter(), opened.shown(begin, min(begin + size, count))
        groups = collector.collect(
            params, tasks, group_size=cfg.eval.samples, seed=cfg.eval.seed, temperature=temperature, slots=cfg.eval.groups
        ).trajectories
        if number == 0:
            keep(groups)
        rows = [{"uid": t[0].task.uid, "samples": [sample_of(one, opened.prompted) for one in t]} for t in groups]
        pieces.add({"seconds": round(time.perf_counter() - began, 3), "rows": rows})
        progress(begin + len(rows), count)
    return [row for piece in pieces.done for row in piece["rows"]], sum(piece["seconds"] for piece in pieces.done)
