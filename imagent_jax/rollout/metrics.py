"""Metrics of trajectories: accuracy, end reasons and tool use."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from imagent_jax.rollout.batch import RolloutBatch
from imagent_jax.types import CallStatus, EndReason, Trajectory


def summarise(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    """Return accuracy (also by question kind and source), tool-call rates and end reasons of trajectories, as shares in 0..1."""
    n, right = len(trajectories), [t.right for t in trajectories]
    by, ends = defaultdict(list), Counter(t.end for t in trajectories)
    for t, ok in zip(trajectories, right, strict=True):
        by[f"accuracy/{t.task.kind}"].append(ok)
        if t.task.source:
            by[f"source/{t.task.source}/accuracy"].append(ok)
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
    result |= {name: float(np.mean(oks)) for name, oks in sorted(by.items())}
    return result | {f"end/{reason.name.lower()}": ends[reason] / n for reason in EndReason}


def call_metrics(groups: Sequence[Sequence[Trajectory]], tools: Sequence[str]) -> dict[str, Any]:
    """Return metrics of tool use.

    Returns:
        `tools/calls/<tool>/<executed|invalid|faulted>`: calls per rollout (`unknown`: the name is unreadable or not in `tools`).
        `tools/time/<tool>`: mean seconds of a call, failed ones included; absent without calls.
        `tools/earned`: share of the rollouts that are right after at least one executed call, the maximum a tool bonus may pay.
        `length/sampled`: mean number of tokens sampled by the policy.
        `tools/gain`: accuracy of rollouts with an executed call minus that of rollouts without, mean over the groups that have
        both, -1 to 1; absent if no group has both.
    """
    flat = [t for group in groups for t in group]
    names = {CallStatus.EXECUTED: "executed", CallStatus.INVALID: "invalid", CallStatus.FAULT: "faulted"}
    calls = [turn.call for t in flat for turn in t.turns if turn.call]
    counts = Counter((call.name if call.name in tools else "unknown", names[call.status]) for call in calls)
    pairs = [(tool, name) for tool in tools for name in names.values()] + [("unknown", "invalid")]
    result = {f"tools/calls/{tool}/{name}": counts[tool, name] / len(flat) for tool, name in pairs}
    for tool in tools:
        if seconds := [call.seconds for call in calls if call.name == tool]:
            result[f"tools/time/{tool}"] = float(np.mean(seconds))
    right, used = (
        [np.asarray([f(t) for t in group], bool) for group in groups] for f in (lambda t: t.right, lambda t: t.executed_calls > 0)
    )
    result["tools/earned"] = float(np.mean(np.concatenate([r & u for r, u in zip(right, used, strict=True)])))
    result["length/sampled"] = float(np.mean([sum(turn.stop - turn.start for turn in t.turns) for t in flat]))
    gains = [r[u].mean() - r[~u].mean() for r, u in zip(right, used, strict=True) if u.any() and not u.all()]
    return result | ({"tools/gain": float(np.mean(gains))} if gains else {})


def rollout_metrics(rollout: RolloutBatch) -> dict[str, float]:
    """Return metrics of a rollout's work: tokens per second, share of live rows among those computed in decoding, images encoded
    and shown, share of padding in image packs."""
    store = rollout.store
    return {
        "rollout/tokens_per_second": rollout.sampled_tokens / sum(rollout.times.values()),
        "rollout/live": rollout.sampled_tokens / max(1, rollout.decoded),
        "vision/encoded": store.encoded,
        "vision/shown": store.shown,
        "vision/waste": 1 - store.patches / max(1, store.packed),
    }
