"""From rollouts to rewards and advantages."""

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from imagent_jax.config import Config
from imagent_jax.distributed import processes
from imagent_jax.rl.advantages import group_advantages
from imagent_jax.rl.mask import mask_tables
from imagent_jax.rl.rewards import ALWAYS, Part, asked_for, score_trajectories
from imagent_jax.rollout.batch import Grade, RolloutBatch
from imagent_jax.rollout.metrics import call_metrics, summarise
from imagent_jax.types import EndReason, Trajectory

UNPAID = "rewards: every reward with a weight abstained"


class Judged(NamedTuple):
    """The judgement of a rollout.

    Attributes:
        rewards, advantages: float32[N, G].
        parts: every reward of every trajectory, by name.
        metrics: by name.
        faults: by the name of a reward or tool that failed, one of its errors.
        pass_rates: of every group, replaced ones too: uid of the task, and share of its trajectories that are right, 0 to 1.
            Faults do not count.
    """

    rewards: np.ndarray
    advantages: np.ndarray
    parts: list[list[dict[str, float]]]
    metrics: dict[str, float]
    faults: dict[str, str]
    pass_rates: list[tuple[str, float]]


Scores = list[dict[str, Any]]
"""What `score_trajectories` gives for each trajectory of a group."""


def grade(cfg: Config, functions: dict[str, Part], group: list[Trajectory]) -> Grade:
    """Reward the trajectories of a finished group; see `rollout.batch.Refill`. `judge` takes the rewards from the batch."""
    [scores] = _scored(cfg, [group], functions)
    *_, stats = _compared(cfg, [group], [scores])
    return Grade(stats["groups/flat"] == 0.0, scores)


def _scored(cfg: Config, groups: Sequence[Sequence[Trajectory]], functions: dict[str, Part]) -> list[Scores]:
    """Reward the trajectories of groups. One whose reward fails, or for which all rewards abstain, ends as FAULT."""
    flat = [t for group in groups for t in group]
    scores = score_trajectories(flat, functions, cfg.reward.concurrency)
    for t, score in zip(flat, scores, strict=True):
        if "total" not in score:
            score |= {"total": 0.0, "fault": UNPAID}
        t.end = EndReason.FAULT if "fault" in score else t.end
    left = iter(scores)
    return [[next(left) for _ in group] for group in groups]


def _compared(
    cfg: Config, groups: Sequence[Sequence[Trajectory]], scores: Sequence[Scores]
) -> tuple[np.ndarray, np.ndarray, dict[str, float]]:
    """Return rewards and advantages, float32[N, G], and metrics of the groups."""
    rewards = np.asarray([[score["total"] for score in group] for group in scores], np.float32)
    end = np.asarray([[t.end for t in group] for group in groups], np.uint8)
    counted, fault = mask_tables(cfg.mask).counted[end], end == EndReason.FAULT
    advantages, stats = group_advantages(rewards, counted, normalise_std=cfg.grpo.normalise_std, fault=fault)
    return rewards, np.asarray(advantages), {name: float(value) for name, value in stats.items()}


def judge(cfg: Config, rollout: RolloutBatch, functions: dict[str, Part]) -> Judged:
    """Reward every trajectory of a rollout, and compare the trajectories of a group.

    A reward function that fails marks the trajectory FAULT: a metric counts it, and it never trains (promise 6). So does a
    trajectory for which every reward with a weight abstains. Metrics of rewards and groups are those of the batch; metrics of
    answers, ends and tools count replaced groups too.

    Args:
        functions: see `reward_functions`.
    Raises:
        ValueError: every trajectory is a fault, so that nothing would train.
    """
    groups, n = [*rollout.trajectories, *rollout.replaced], len(rollout.trajectories)
    own = processes.share(groups)  # each process scores its own rollouts, whose images it holds
    scores = rollout.grades or processes.join(_scored(cfg, own, functions))
    flat, faults, failed, unpaid = [t for group in groups for t in group], [], 0, 0
    for t, score in zip(flat, [score for group in scores for score in group], strict=True):
        if fault := score.pop("fault", None):
            t.end, t.error = EndReason.FAULT, t.error or fault
            failed, unpaid = failed + (fault != UNPAID), unpaid + (fault == UNPAID)
        if t.end == EndReason.FAULT:
            faults.append(fault or _tool_fault(t))
    if len(faults) == len(flat):
        cause, count = Counter(faults).most_common(1)[0]
        raise ValueError(
            f"All {len(flat)} rollouts of this step failed on an environment error and nothing can train; {count} of them on "
            f"{cause}. Mend it, then start again or continue from the last checkpoint with --run.resume true."
        )
    parts = scores[:n]
    rewards, advantages, stats = _compared(cfg, rollout.trajectories, parts)
    metrics = _means(rollout.trajectories, parts, functions) | stats | summarise(flat) | call_metrics(groups, rollout.tools)
    metrics |= {"rewards/failed": failed / len(flat), "rewards/unpaid": unpaid / len(flat)}
    metrics |= _refill_metrics(cfg, rollout, stats) | _source_metrics(rollout, rewards, advantages)
    right = [(group[0].task.uid, [t.right for t in group if t.end != EndReason.FAULT]) for group in groups]
    pass_rates = [(uid, float(np.mean(each))) for uid, each in right if each]
    return Judged(rewards, advantages, parts, metrics, dict(fault.split(": ", 1) for fault in faults), pass_rates)


def _refill_metrics(cfg: Config, rollout: RolloutBatch, stats: dict[str, float]) -> dict[str, float]:
    """Return `groups/refilled`, the number of groups that fresh ones replaced, and `groups/flat_sampled`, the share of groups
    without spread among all that were sampled (`groups/flat`: among those of the batch)."""
    if not cfg.rollout.refill:
        return {}
    n, refilled = len(rollout.trajectories), len(rollout.replaced)
    return {"groups/refilled": refilled, "groups/flat_sampled": (stats["groups/flat"] * n + refilled) / (n + refilled)}


def _source_metrics(rollout: RolloutBatch, rewards: np.ndarray, advantages: np.ndarray) -> dict[str, float]:
    """Return `source/<name>/...` of every source in the batch: `reward`, mean; `flat`, share of its groups without spread;
    `tasks`, its share of the batch."""
    sources = np.asarray([group[0].task.source for group in rollout.trajectories])
    found = {}
    for name in sorted({*sources.tolist()} - {""}):
        of_source = sources == name
        found |= {
            f"source/{name}/reward": float(rewards[of_source].mean()),
            f"source/{name}/tasks": float(of_source.mean()),
            f"source/{name}/flat": float((~advantages[of_source].any(1)).mean()),
        }
    return found


def _means(groups: Sequence[Sequence[Trajectory]], scores: Sequence[Scores], functions: dict[str, Part]) -> dict[str, float]:
    """Return the mean of each reward over the trajectories that have it, and the share of those that weigh it for which it
    abstains."""
    flat, every, metrics = [t for group in groups for t in group], [score for group in scores for score in group], {}
    for name in (*functions, "total"):
        if paid := [parts[name] for parts in every if name in parts]:
            metrics[f"reward/{name}"] = float(np.mean(paid))
        may_abstain = () if name in ALWAYS or name == "total" else flat
        if asked := sum(asked_for(name, t, functions) for t in may_abstain):
            metrics[f"reward/{name}/abstained"] = 1 - len(paid) / asked
    return metrics


def _tool_fault(t: Trajectory) -> str:
    """Return the name and the error of the tool on which a trajectory failed: the last line of its traceback."""
    name = next((turn.call.name for turn in reversed(t.turns) if turn.call), None)
    return f"tool {name}: {(t.error or 'unknown').strip().splitlines()[-1]}"
