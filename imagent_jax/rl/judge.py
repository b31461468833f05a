"""From rollouts to rewards and advantages."""

import numpy as np

from imagent_jax.config import Config
from imagent_jax.distributed import processes as hosts
from imagent_jax.rl.advantages import group_advantages
from imagent_jax.rl.mask import mask_tables
from imagent_jax.rl.rewards import score_trajectory
from imagent_jax.rollout.batch import RolloutBatch
from imagent_jax.rollout.metrics import call_metrics, summarise
from imagent_jax.types import EndReason


def judge(cfg: Config, rollout: RolloutBatch) -> tuple[np.ndarray, np.ndarray, list[list[dict]], dict[str, float]]:
    """Rewards and advantages [N G] of a rollout, the reward parts, and metrics.

    A reward function that fails marks the trajectory FAULT: it is counted and never trains (promise 6).
    """
    own = hosts.share(rollout.trajectories)  # others have what a reward may look at, and may be paid to look
    parts = hosts.join([[score_trajectory(t, cfg.reward) for t in group] for group in own])
    for group, scored in zip(rollout.trajectories, parts, strict=True):
        for t, part in zip(group, scored, strict=True):
            if part.pop("fault", False):
                t.end = EndReason.FAULT
    rewards = np.asarray([[p["total"] for p in group] for group in parts], np.float32)
    end = np.asarray([[t.end for t in group] for group in rollout.trajectories], np.uint8)
    counted = mask_tables(cfg.mask)[2][end]
    advantages, stats = group_advantages(
        rewards, counted, normalise_std=cfg.grpo.normalise_std, fault=end == EndReason.FAULT
    )
    flat = [t for group in rollout.trajectories for t in group]
    means = {f"reward/{name}": float(np.mean([p[name] for group in parts for p in group])) for name in parts[0][0]}
    metrics = means | {k: float(v) for k, v in stats.items()} | summarise(flat)
    return rewards, np.asarray(advantages), parts, metrics | call_metrics(rollout.trajectories, cfg.tools.names)
