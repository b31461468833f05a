"""Guards: warnings about collapse of the policy and about reward hacking.

A guard is a pure function from the metrics of all steps so far, oldest first, to a sentence or None. It compares the last
`WINDOW` steps with the first `WINDOW` steps or with a limit. The default arguments are those used in training. They detect:
the policy stops using tools that help, collects the tool bonus with useless calls, its entropy or clipped share diverges, or
much of what is sampled does not train.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool

Metrics = dict[str, Any]
"""Metrics of a step by name; `warnings` is a dictionary of sentences."""
History = Sequence[Metrics]

WINDOW = 10
"""Number of steps over which a guard averages."""


# ---- guards ---------------------------------------------------------------------------------------------------------


def watch(history: History) -> dict[str, str]:
    """Return the warnings that hold after the last step of `history` (metrics of all steps so far), by name of the guard."""
    said = {name: guard(history) for name, guard in GUARDS.items()} if history else {}
    if said.get("mostly_masked") and any(said.get(name) for name in SAME_CAUSE.get(_masked_for(history), ())):
        said["mostly_masked"] = None
    return {name: sentence for name, sentence in said.items() if sentence}


def tools_abandoned(history: History, fall: float = 0.5, gain: float = 0.05) -> str | None:
    """Warn if far fewer rollouts call a tool than earlier, although tool calls raise accuracy within groups.

    Failed calls, refused or ended by an error, still count as tool use.

    Args:
        fall: warn below this fraction of the highest earlier rate.
        gain: minimum mean of `tools/gain`.
    """
    rates = [r["tools/used_rate"] for r in history]
    height = max((np.mean(rates[i : i + WINDOW]) for i in range(len(rates) - 2 * WINDOW + 1)), default=0.0)
    gains = [r["tools/gain"] for r in history if "tools/gain" in r][-WINDOW:]  # absent in steps without calls
    now = np.mean(rates[-WINDOW:])
    vain = [v for r in history[-WINDOW:] for k, v in r.items() if k.startswith("tools/calls/") and not k.endswith("/executed")]
    if gains and height > 0.1 and now + sum(vain) / WINDOW < fall * height and np.mean(gains) > gain:
        return (
            f"Tools are being given up: {_percent(now)} of the rollouts call one, {_percent(height)} once did, though "
            f"those with a call were {100 * np.mean(gains):.0f} points more often right than others of their group."
        )
    return None


def bonus_unearned(history: History) -> str | None:
    """Warn if more rollouts received the tool bonus than were right after an executed call."""
    paid, earned = (history[-1].get(key, 0.0) for key in ("reward/tool_gain", "tools/earned"))
    if paid > earned + 1e-6:
        return (
            f"The tool bonus is paid without cause: {_percent(paid)} of the rollouts got it, {_percent(earned)} were "
            "right after an executed call."
        )
    return None


def bonus_without_gain(history: History, rise: float = 0.1, share: float = 0.25) -> str | None:
    """Warn if the tool bonus has risen by more than `rise` while accuracy rose by less than `share` of that."""
    if len(history) < 2 * WINDOW:
        return None
    (bonus, before), (accuracy, at_first) = (_now_and_first(history, key) for key in ("tools/earned", "accuracy"))
    if bonus - before > rise and accuracy - at_first < share * (bonus - before):
        return (
            f"The tool bonus grows without better answers: it went from {_percent(before)} to {_percent(bonus)} of the "
            f"rollouts, right answers from {_percent(at_first)} to {_percent(accuracy)}."
        )
    return None


def entropy_away(history: History, low: float = 0.1, high: float = 2.0, good: float = 0.8) -> str | None:
    """Warn if entropy falls below `low` times its first value while accuracy is below `good`, or exceeds `high` times it."""
    if len(history) < 2 * WINDOW:
        return None
    now, first = _now_and_first(history, "entropy")
    if now < low * first and _mean(history, "accuracy") < good:
        return f"Entropy has collapsed from {first:.3g} to {now:.3g} nats a token: rollouts of a group become the same."
    if now > high * first + 0.05:
        return f"Entropy runs away: {now:.3g} nats a token after {first:.3g} at first; the policy diverges."
    return None


def clip_away(history: History, limit: float = 0.2) -> str | None:
    """Warn if more than `limit` of the trained tokens are clipped."""
    clipped = _mean(history, "clip/low") + _mean(history, "clip/high")
    if clipped > limit:
        return f"{_percent(clipped)} of the trained tokens are clipped: steps too large, or sampler and trainer differ."
    return None


def length_growth(history: History, growth: float = 1.5, gain: float = 0.05) -> str | None:
    """Warn if sampled length has grown by the factor `growth` while accuracy rose by less than `gain`."""
    if len(history) < 2 * WINDOW:
        return None
    (now, first), (accuracy, at_first) = (_now_and_first(history, key) for key in ("length/sampled", "accuracy"))
    if now > growth * first and accuracy - at_first < gain:
        return (
            f"Responses grow without better answers: from {first:.0f} to {now:.0f} sampled tokens, right answers from "
            f"{_percent(at_first)} to {_percent(accuracy)}."
        )
    return None


def groups_flat(history: History, limit: float = 0.9) -> str | None:
    """Warn if more than `limit` of the groups have no spread of rewards, and therefore no gradient."""
    if len(history) >= WINDOW and (flat := _mean(history, "groups/flat")) > limit:
        return f"{_percent(flat)} of the groups have no spread of rewards and teach nothing: too easy, or too hard."
    return None


def mostly_masked(history: History, limit: float = 0.5) -> str | None:
    """Warn if the mask drops more than `limit` of the sampled tokens."""
    if (dropped := _mean(history, "mask/dropped_tokens")) > limit:
        reason = _masked_for(history).replace("_", " ")
        return f"The mask drops {_percent(dropped)} of the sampled tokens, most of them for: {reason}."
    return None


def calls_invalid(history: History, limit: float = 0.5) -> str | None:
    """Warn if more than `limit` of a tool's calls are refused as invalid."""
    return _bad_calls(history, "invalid", limit, "are refused as invalid; look at what the tool says to them")


def calls_faulted(history: History, limit: float = 0.02) -> str | None:
    """Warn if more than `limit` of a tool's calls fail on an environment error."""
    return _bad_calls(history, "faulted", limit, "end with an environment error; the trajectories' `error` says which")


def rewards_failed(history: History, limit: float = 0.02) -> str | None:
    """Warn if a reward function fails for more than `limit` of the rollouts."""
    if (failed := _mean(history, "rewards/failed")) > limit:
        return f"A reward function fails for {_percent(failed)} of the rollouts, which do not train; their `error` says why."
    return None


def rewards_abstain(history: History) -> str | None:
    """Warn if a reward abstains for every rollout, or all rewards for some."""
    silent = [key.split("/")[1] for key in history[-1] if key.endswith("/abstained") and _mean(history, key) == 1.0]
    unpaid = _mean(history, "rewards/unpaid")
    sentences = [f"The reward {name} abstains for every rollout and is no part of the sum." for name in silent]
    if unpaid:
        sentences.append(f"Every reward with a weight abstains for {_percent(unpaid)} of the rollouts, which do not train.")
    return " ".join(sentences) or None


GUARDS: dict[str, Callable[[History], str | None]] = {
    guard.__name__: guard
    for guard in (tools_abandoned, bonus_unearned, bonus_without_gain, entropy_away, clip_away, length_growth,
                  groups_flat, mostly_masked, calls_invalid, calls_faulted, rewards_failed, rewards_abstain)
}  # fmt: skip
SAME_CAUSE = {"invalid_call": ("calls_invalid",), "fault": ("calls_faulted", "rewards_failed", "rewards_abstain")}
"""Guards that name the cause of `mostly_masked` more exactly and replace it, by the main reason of the mask."""


def looks_unused(right: Bool[np.ndarray, " T"], control: Bool[np.ndarray, " T"], what: str) -> str | None:
    """Return a warning if accuracy does not drop under a control, else None.

    A sign test compares the tasks that are right in only one of the two evaluations: the agent must win by more than two
    standard deviations of a fair coin.

    Args:
        right, control: whether each task was answered right in the normal evaluation and under the control.
        what: description of the control.
    """
    won, lost = int(np.sum(right & ~control)), int(np.sum(control & ~right))
    if won - lost > 2 * math.sqrt(won + lost):
        return None
    return (
        f"Accuracy does not drop under a control: {_percent(np.mean(control))} with {what}, {_percent(np.mean(right))} without "
        f"({won} tasks are right only without the control, {lost} only with it)."
    )


def _bad_calls(history: History, status: str, limit: float, words: str) -> str | None:
    keys = [key.split("/") for key in history[-1] if key.startswith("tools/calls/")]
    found = []
    for tool in dict.fromkeys(parts[2] for parts in keys):
        made = {parts[3]: _mean(history, "/".join(parts)) for parts in keys if parts[2] == tool}
        bad, rest = made.pop(status, 0.0), sum(made.values())
        if tool != "unknown" and bad > limit * (bad + rest) and bad > 0.01:
            found.append(f"{_percent(bad / (bad + rest))} of the calls of {tool}")
    return f"{' and '.join(found)} {words}." if found else None


def _masked_for(history: History) -> str:
    """Return the reason for which the mask drops most tokens."""
    reasons = {k.rpartition("/")[2]: _mean(history, k) for k in history[-1] if k.startswith("mask/dropped_tokens/")}
    return max(reasons, key=lambda reason: reasons[reason], default="unknown")


def _mean(history: History, key: str) -> float:
    """Return the mean over the last `WINDOW` steps (over all, if there are fewer)."""
    return float(np.mean([r.get(key, 0.0) for r in history[-WINDOW:]]))


def _now_and_first(history: History, key: str) -> tuple[float, float]:
    return _mean(history, key), _mean(history[:WINDOW], key)


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"
