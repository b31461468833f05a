"""Metrics of trajectories: accuracy, ends, and use of tools."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from imagent_jax.scoring import score
from imagent_jax.types import CallStatus, EndReason, Trajectory


def answered_right(trajectories: Sequence[Trajectory]) -> list[bool]:
    """Whether each trajectory's answer is wholly right."""
    return [score(t.answer, t.task.answer, t.task.answer_type) == 1.0 for t in trajectories]


def summarise(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    """Accuracy (also by question kind), tool-call rates and end reasons of a set of trajectories; shares in 0..1."""
    n, right = len(trajectories), answered_right(trajectories)
    by_kind, ends = defaultdict(list), Counter(t.end for t in trajectories)
    for t, ok in zip(trajectories, right, strict=True):
        by_kind[t.task.kind].append(ok)
    used = [t.executed_calls > 0 for t in trajectories]
    calls = sum(t.executed_calls + t.invalid_calls for t in trajectories)
    result = {
        "accuracy": float(np.mean(right)),
        "tools/used_rate": float(np.mean(used)),
        "tools/calls": calls / n,
        "tools/executed_rate": sum(t.executed_calls for t in trajectories) / max(calls, 1),
        "tools/invalid": sum(t.invalid_calls for t in trajectories) / n,
        "tools/accuracy_with": float(np.mean([ok for ok, u in zip(right, used, strict=True) if u] or [0.0])),
        "tools/accuracy_without": float(np.mean([ok for ok, u in zip(right, used, strict=True) if not u] or [0.0])),
        "length": float(np.mean([len(t.ids) for t in trajectories])),
    }
    result |= {f"accuracy/{kind}": float(np.mean(oks)) for kind, oks in sorted(by_kind.items())}
    return result | {f"end/{reason.name.lower()}": ends[reason] / n for reason in EndReason}


def call_metrics(groups: Sequence[Sequence[Trajectory]], tools: Sequence[str]) -> dict[str, Any]:
    """What groups of rollouts say about their use of tools.

    Returns:
        `tools/calls/<tool>/<executed|invalid|faulted>`: calls a rollout (`unknown`: no tool of `tools` could be read);
        `tools/earned`: share of the rollouts right after at least one executed call, all that a tool bonus may pay;
        `length/sampled`: mean of the tokens the policy chose; and, where a group has rollouts with and without an
        executed call, `tools/gain`: how much more often those with one are right, mean over such groups, -1 to 1.
    """
    flat = [t for group in groups for t in group]
    names = {CallStatus.EXECUTED: "executed", CallStatus.INVALID: "invalid", CallStatus.FAULT: "faulted"}
    calls = [turn.call for t in flat for turn in t.turns if turn.call]
    counts = Counter((call.name if call.name in tools else "unknown", names[call.status]) for call in calls)
    pairs = [(tool, name) for tool in tools for name in names.values()] + [("unknown", "invalid")]
    result = {f"tools/calls/{tool}/{name}": counts[tool, name] / len(flat) for tool, name in pairs}
    right, used = (
        [np.asarray([f(t) for t in group], bool) for group in groups]
        for f in (lambda t: score(t.answer, t.task.answer, t.task.answer_type) == 1.0, lambda t: t.executed_calls > 0)
    )
    result["tools/earned"] = float(np.mean(np.concatenate([r & u for r, u in zip(right, used, strict=True)])))
    result["length/sampled"] = float(np.mean([sum(turn.stop - turn.start for turn in t.turns) for t in flat]))
    gains = [r[u].mean() - r[~u].mean() for r, u in zip(right, used, strict=True) if u.any() and not u.all()]
    return result | ({"tools/gain": float(np.mean(gains))} if gains else {})
