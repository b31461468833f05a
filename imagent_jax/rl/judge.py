"""From rollouts to rewards and advantages."""

from typing import NamedTuple

import numpy as np

from imagent_jax.config import Config
from imagent_jax.distributed import processes
from imagent_jax.rl.advantages import group_advantages
from imagent_jax.rl.mask import mask_tables
from imagent_jax.rl.rewards import Reward, score_trajectory
from imagent_jax.rollout.batch import RolloutBatch
from imagent_jax.rollout.metrics import call_metrics, summarise
from imagent_jax.types import EndReason


class Judged(NamedTuple):
    """The judgement of a rollout.

    Attributes:
        rewards, advantages: float32[N, G].
        parts: every reward of every trajectory, by name.
        metrics: by name.
    """

    rewards: np.ndarray
    advantages: np.ndarray
    parts: list[list[dict[str, float]]]
    metrics: dict[str, float]


def judge(cfg: Config, rollout: RolloutBatch, functions: dict[str, tuple[float, Reward]]) -> Judged:
    """Reward every trajectory of a rollout, and compare the trajectories of a group.

    A reward function that fails marks the trajectory FAULT: a metric counts it, and it never trains (promise 6).

    Args:
        functions: see `reward_functions`.
    """
    own = processes.share(rollout.trajectories)  # each process scores its own rollouts, whose images it holds
    parts = processes.join([[score_trajectory(t, functions) for t in group] for group in own])
    for group, scored in zip(rollout.trajectories, parts, strict=True):
        for t, part in zip(group, scored, strict=True):
            if part.pop("fault", False):
                t.end = EndReason.FAULT
    rewards = np.asarray([[p["total"] for p in group] for group in parts], np.float32)
    end = np.asarray([[t.end for t in group] for group in rollout.trajectories], np.uint8)
    counted = mask_tables(cfg.mask).counted[end]
    advantages, stats = group_advantages(rewards, counted, normalise_std=cfg.grpo.normalise_std, fault=end == EndReason.FAULT)
    flat = [t for group in rollout.trajectories for t in group]
    means = {f"reward/{name}": float(np.mean([p[name] for group in parts for p in group])) for name in parts[0][0]}
    metrics = means | {k: float(v) for k, v in stats.items()} | summarise(flat)
    metrics |= call_metrics(rollout.trajectories, cfg.tools.names)
    return Judged(rewards, np.asarray(advantages), parts, metrics)
