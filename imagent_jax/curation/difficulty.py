"""How hard questions are for a policy: its pass rates with and without tools, by the rollout engine."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from imagent_jax.config import import_path, read_own
from imagent_jax.config.settings import Table, setting
from imagent_jax.curation.filters import dropped
from imagent_jax.curation.pool import Pool
from imagent_jax.curation.question import Event, Question
from imagent_jax.curation.roles import task_of
from imagent_jax.curation.settings import DifficultySettings
from imagent_jax.runs.whole import Lines
from imagent_jax.types import Task

PIECE = 32
"""Questions that are measured before the rates are written."""


class PassRates(Protocol):
    """Measures a policy. Made of an instance of its own `Settings`."""

    def pass_rate(self, questions: Sequence[Task], k: int, tools: bool) -> list[float]:
        """Return the share of k answers to each question that is right, with or without tools."""
        ...


@dataclass(frozen=True)
class PolicyRatesSettings:
    """The policy."""

    path: str = setting("tiny", "'tiny' (the embedded base), the folder of a run or of a model, or a hub id")
    settings: dict[str, Any] = setting(Table(), "settings of the policy by dotted name, such as {tools.max_turns: 3}", hash=False)
    slots: int = setting(16, "rollouts at once", least=1)
    seed: int = setting(0, "seed of sampling")
    temperature: float = setting(1.0, "of sampling", above=0)


class PolicyRates:
    """Pass rates by rollouts of a policy, as in training. Rollouts that end with an environment error do not count."""

    Settings = PolicyRatesSettings

    def __init__(self, cfg: PolicyRatesSettings):
        from imagent_jax.runs.loading import load_policy

        self.cfg, self.policy = cfg, load_policy(cfg.path, settings=cfg.settings)[0]

    def pass_rate(self, questions: Sequence[Task], k: int, tools: bool) -> list[float]:
        """See `PassRates.pass_rate`.

        Raises:
            ValueError: all rollouts of a question ended with an environment error.
        """
        import jax

        from imagent_jax.types import EndReason

        tasks = [task if tools else replace(task, tools=()) for task in questions]
        with jax.set_mesh(self.policy.mesh):
            groups = self.policy.collector.collect(
                self.policy.params,
                tasks,
                group_size=k,
                seed=self.cfg.seed,
                temperature=self.cfg.temperature,
                slots=self.cfg.slots,
            ).trajectories
        rates = []
        for group in groups:
            if not (whole := [t.right for t in group if t.end != EndReason.FAULT]):
                raise ValueError(f"All rollouts of {group[0].task.uid} ended with an environment error: {group[0].error}")
            rates.append(sum(whole) / len(whole))
        return rates


class RateFile:
    """Measured pass rates on disk, a line for each question."""

    def __init__(self, path: Path):
        self.lines = Lines(path)
        self.rates: dict[str, dict[str, float]] = {row["key"]: row["rates"] for row in self.lines.values}

    def add(self, rates: Mapping[str, dict[str, float]]) -> None:
        """Write rates by key."""
        self.rates |= rates
        self.lines.add(*({"key": key, "rates": own} for key, own in rates.items()))


def measured(
    questions: Sequence[Question], pool: Pool, cfg: DifficultySettings, file: RateFile, progress: Callable[[str], None]
) -> Iterator[Question]:
    """Yield questions with their pass rates; those as dropped that the policy answers always, or never.

    Kept are those with 1 to k - 1 right answers of k with tools, and those where tools help: right more often with than without.

    Raises:
        ValueError: see `load_policy` and `PolicyRates`.
    """
    kind = import_path(cfg.policy, "difficulty.policy")
    own = read_own(kind.Settings, cfg.settings, "difficulty.settings")
    asked = [cfg.policy, repr(own), cfg.rollouts]
    keys = {q.uid: json.dumps([*asked, q.uid, q.text, q.options, q.answer, q.answer_type, q.images]) for q in questions}
    policy: PassRates | None = None
    left = [question for question in questions if keys[question.uid] not in file.rates]
    for begin in range(0, len(left), PIECE):
        policy = policy or kind(own)
        piece = left[begin : begin + PIECE]
        tasks = [task_of(question, [pool.data(image) for image in question.images]) for question in piece]
        rates = zip(*(policy.pass_rate(tasks, cfg.rollouts, tools) for tools in (True, False)), strict=True)
        named = {keys[q.uid]: {"with tools": a, "without": b} for q, (a, b) in zip(piece, rates, strict=True)}
        file.add(named)
        progress(f"pass rates of {min(begin + PIECE, len(left))} of {len(left)} questions measured")
    for question in questions:
        rates = file.rates[keys[question.uid]]
        question = question.after(Event("policy", "measured", {**rates, "rollouts": cfg.rollouts}))
        tools, without = rates["with tools"], rates["without"]
        if 0 < tools < 1 or tools > without:
            yield question
        else:
            yield dropped(question, "difficulty", f"{100 * tools:.0f} % right with tools, {100 * without:.0f} % without")
