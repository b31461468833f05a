"""From rollouts to rewards and advantages."""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from imagent_jax.config import Config
from imagent_jax.distributed import processes
from imagent_jax.rl.advantages import group_advantages
from imagent_jax.rl.mask import mask_tables
from imagent_jax.rl.rewards import ALWAYS, Part, score_trajectories
from imagent_jax.rollout.batch import RolloutBatch
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
    """

    rewards: np.ndarray
    advantages: np.ndarray
    parts: list[list[dict[str, float]]]
    metrics: dict[str, float]
    faults: dict[str, str]


def judge(cfg: Config, rollout: RolloutBatch, functions: dict[str, Part]) -> Judged:
    """Reward every trajectory of a rollout, and compare the trajectories of a group.

    A reward function that fails marks the trajectory FAULT: a metric counts it, and it never trains (promise 6). So does a
    trajectory for which every reward with a weight abstains.

    Args:
        functions: see `reward_functions`.
    Raises:
        ValueError: every trajectory is a fault, so that nothing would train.
    """
    own = processes.share(rollout.trajectories)  # each process scores its own rollouts, whose images it holds
    scores = iter(score_trajectories([t for group in own for t in group], functions, cfg.reward.concurrency))
    parts = processes.join([[next(scores) for _ in group] for group in own])
    flat, every = ([x for group in groups for x in group] for groups in (rollout.trajectories, parts))
    faults, failed, unpaid = [], 0, 0
    for t, part in zip(flat, every, strict=True):
        if fault := part.pop("fault", None):
            failed += 1
        elif "total" not in part:
            fault, unpaid, part["total"] = UNPAID, unpaid + 1, 0.0
        if fault:
            t.end, t.error = EndReason.FAULT, t.error or fault
        if t.end == EndReason.FAULT:
            faults.append(fault or _tool_fault(t))
    if len(faults) == len(flat):
        cause, count = Counter(faults).most_common(1)[0]
        raise ValueError(
            f"All {len(flat)} rollouts of this step failed on an environment error and nothing can train; {count} of them on "
            f"{cause}. Mend it, then start again or continue from the last checkpoint with --run.resume true."
        )
    rewards = np.asarray([[p["total"] for p in group] for group in parts], np.float32)
    end = np.asarray([[t.end for t in group] for group in rollout.trajectories], np.uint8)
    counted = mask_tables(cfg.mask).counted[end]
    advantages, stats = group_advantages(rewards, counted, normalise_std=cfg.grpo.normalise_std, fault=end == EndReason.FAULT)
    metrics = _means(every, functions) | {k: float(v) for k, v in stats.items()} | summarise(flat)
    metrics |= call_metrics(rollout.trajectories, cfg.tools.names)
    metrics |= {"rewards/failed": failed / len(flat), "rewards/unpaid": unpaid / len(flat)}
    return Judged(rewards, np.asarray(advantages), parts, metrics, dict(fault.split(": ", 1) for fault in faults))


def _means(every: Sequence[dict[str, float]], functions: dict[str, Part]) -> dict[str, float]:
    """Return the mean of each reward over the trajectories that have it, and the share for which it abstains."""
    metrics = {}
    for name in (*functions, "total"):
        if paid := [parts[name] for parts in every if name in parts]:
            metrics[f"reward/{name}"] = float(np.mean(paid))
        if name not in ALWAYS and name != "total":
            metrics[f"reward/{name}/abstained"] = 1 - len(paid) / len(every)
    return metrics


def _tool_fault(t: Trajectory) -> str:
    """Return the name and the error of the tool on which a trajectory failed: the last line of its traceback."""
    name = next((turn.call.name for turn in reversed(t.turns) if turn.call), None)
    return f"tool {name}: {(t.error or 'unknown').strip().splitlines()[-1]}"
