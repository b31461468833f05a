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
from imagent_jax.evals.published import Dialogue, PublishedLoop, plain_collector
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
        loop: the published loop in which they are asked instead.
    """

    benchmark: Benchmark
    questions: Questions
    prompted: bool
    loop: PublishedLoop | None = None

    def count(self, limit: int | None) -> int:
        """Return how many rows are asked: at most `limit`, but all of the last question of a circular benchmark. None: all."""
        facts, n = self.questions.facts, min(limit or len(self.questions), len(self.questions))
        ask = self.benchmark.question
        while self.benchmark.circular and n < len(facts) and ask(facts[n]) == ask(facts[n - 1]):
            n += 1
        return n


class _Check:
    """Tries whether a run can use a task as it is first shown (`data.check.TaskCheck`)."""

    def __init__(self, check: TaskCheck, show: Callable[[Task], Task], about: str):
        self.check, self.show, self.fingerprint = check, show, f"{check.fingerprint} {about}"

    def __call__(self, task: Task, sizes: Sequence[tuple[int, int]]) -> None:
        self.check(self.show(task), sizes)


def open_benchmark(spec: str, cfg: Config, collector: Collector, progress: Callable[[str], None] = lambda words: None) -> Opened:
    """Return the benchmark that "NAME" or "NAME=PATH" names, with its rows.

    Raises:
        ValueError: there is no such benchmark or file, it has no published loop but is to be asked in one, or a row cannot be
            used.
    """
    (benchmark, path), prompt, loop = named(spec), cfg.eval.prompt, None
    shuffle = {"auto": None, "on": True, "off": False}[cfg.eval.shuffle_options]
    if shuffle and prompt == "benchmark" and benchmark.fixed:
        raise ValueError(
            f"The prompt of {benchmark.name} holds its options in their order; set eval.shuffle_options to off, or eval.prompt "
            "to agent."
        )
    check = _Check(collector.check, benchmark.prompted if prompt == "benchmark" else lambda task: task, prompt)
    if prompt == "published":
        if not benchmark.loop:
            raise ValueError(f"The benchmark {benchmark.name} has no published loop; set eval.prompt to agent or benchmark.")
        loop = PublishedLoop(benchmark.loop, cfg)
        check = _Check(plain_collector(collector).check, loop.first, f"{prompt} {loop.texts}")
    questions = benchmark.open(path, cfg.data, shuffle=shuffle, check=check, progress=progress)
    return Opened(benchmark, questions, prompt == "benchmark", loop)


def reply_of(t: Trajectory, prompted: bool) -> str | None:
    """Return what is scored: the answer in its markup; under a benchmark's own prompt, else the text of a turn that ended by
    itself. None: there is no answer."""
    if t.answer is not None or not prompted or t.end != EndReason.VOID:
        return t.answer
    return QWEN.without_end(t.turns[-1].text).strip() or None


def sample_of(t: Trajectory, prompted: bool, whole: bool = False) -> Record:
    """Return what is kept of a trajectory: reply, end, calls, sampled tokens, the last line of an environment error, and, where
    `whole`, all that the policy wrote."""
    text = {"text": "".join(turn.text for turn in t.turns)} if whole else {}
    return text | {
        "reply": reply_of(t, prompted),
        "end": t.end.name,
        "calls": t.executed_calls,
        "invalid": t.invalid_calls,
        "tokens": sum(turn.stop - turn.start for turn in t.turns),
        "fault": (t.error or "unknown").strip().splitlines()[-1] if t.end == EndReason.FAULT else None,
    }


def _sample_of_dialogue(one: Dialogue) -> Record:
    tokens = sum(turn.stop - turn.start for reply in one.replies for turn in reply.turns)
    return {
        "reply": one.answer,
        "end": EndReason(one.end).name,
        "calls": one.calls,
        "invalid": one.invalid,
        "tokens": tokens,
        "fault": one.fault,
    }


def fingerprint(cfg: Config, opened: Opened, count: int, folder: Path) -> str:
    """Return a checksum of all that samples depend on. Weights in `folder`, and adapters, count by size and time of files."""
    settings = {name: asdict(getattr(cfg, name)) for name in SECTIONS}
    for name in ("benchmarks", "judge", "every", "tasks", "during"):
        settings["eval"].pop(name, None)
    tasks = [[task.uid, task.text, task.answers] for task in opened.questions.facts[:count]]
    weights = [file for place in (folder, cfg.lora.path) if place for file in sorted(Path(place).glob("*.safetensors"))]
    stamps = [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in weights]
    facts = [settings, opened.benchmark.name, cfg.data.seed, tasks, stamps, opened.loop and opened.loop.texts]
    return hashlib.sha256(json.dumps(facts, default=str).encode()).hexdigest()


class Pieces:
    """The samples of a benchmark on disk: a line that names the settings, then a line for each piece of questions.

    Raises:
        ValueError: the file is of other settings, or cannot be written.
    """

    def __init__(self, path: Path | None, key: str):
        self.lines, self.done = None, []
        if path is None:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.lines = Lines(path)
        except OSError as error:
            raise ValueError(f"{path} cannot be written ({error.strerror}); choose another --out.") from error
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
    collector: Collector,
    params,
    opened: Opened,
    count: int,
    pieces: Pieces,
    *,
    keep: Callable[[Sequence[Sequence[Trajectory]]], None] = lambda groups: None,
    progress: Callable[[int, int], None] = lambda done, count: None,
) -> tuple[list[Record], float]:
    """Sample `eval.samples` rollouts of the first `count` questions. Returns their records and the seconds spent.

    A piece is sampled whole, so that what is sampled does not depend on where an evaluation was killed.

    Args:
        keep: takes the trajectories of the first piece.
    """
    size = 4 * collector.cfg.eval.groups
    for number, begin in enumerate(range(0, count, size)):
        if number < len(pieces.done):
            continue
        began, tasks = time.perf_counter(), opened.questions[begin : min(begin + size, count)]
        groups, samples = _ask(collector, params, opened, tasks)
        if number == 0:
            keep(groups)
        rows = [{"uid": task.uid, "samples": own} for task, own in zip(tasks, samples, strict=True)]
        pieces.add({"seconds": round(time.perf_counter() - began, 3), "rows": rows})
        progress(begin + len(rows), count)
    return [row for piece in pieces.done for row in piece["rows"]], sum(piece["seconds"] for piece in pieces.done)


def _ask(collector: Collector, params, opened: Opened, tasks: Sequence[Task]) -> tuple[list[list[Trajectory]], list]:
    """Return trajectories and samples of tasks. Of a dialogue, every reply is a trajectory."""
    e = collector.cfg.eval
    temperature = 0.0 if e.greedy else collector.cfg.rollout.temperature
    if opened.loop:
        dialogues = opened.loop.converse(
            collector, params, tasks, samples=e.samples, seed=e.seed, temperature=temperature, slots=e.groups
        )
        replies = [[reply for one in group for reply in one.replies] for group in dialogues]
        return replies, [[_sample_of_dialogue(one) for one in group] for group in dialogues]
    shown = [opened.benchmark.prompted(task) for task in tasks] if opened.prompted else tasks
    groups = collector.collect(
        params, shown, group_size=e.samples, seed=e.seed, temperature=temperature, slots=e.groups
    ).trajectories
    whole = any(metric.whole for metric in opened.benchmark.metrics.values())
    return groups, [[sample_of(one, opened.prompted, whole) for one in group] for group in groups]
