"""Group-relative advantages (GRPO, arXiv 2402.03300, section 4.1.2)."""

import numpy as np
from jaxtyping import Bool, Float, Float32


def group_advantages(
    rewards: Float[np.ndarray, "N G"],
    counted: Bool[np.ndarray, "N G"],
    *,
    normalise_std: bool,
    eps: float = 1e-6,
    fault: Bool[np.ndarray, "N G"] | None = None,
) -> tuple[Float32[np.ndarray, "N G"], dict[str, float]]:
    """Return group-relative advantages: reward minus the group's mean, divided by its standard deviation if `normalise_std`.

    Args:
        rewards: [N G].
        counted: rollouts that enter mean and (population) standard deviation; the others still get an advantage.
        eps: a group whose counted rewards have at most this standard deviation gets zeros.
        fault: rollouts that failed on an environment error. They never count and get 0, as do non-finite rewards.
    Returns:
        Advantages, and metrics: `groups/flat`, share of groups without spread; `groups/std`, mean standard deviation.
    """
    rewards = np.asarray(rewards, np.float64)
    usable = np.isfinite(rewards) if fault is None else np.isfinite(rewards) & ~np.asarray(fault, bool)
    rewards, counted = np.where(usable, rewards, 0.0), np.asarray(counted, bool) & usable
    n = np.maximum(counted.sum(1, keepdims=True), 1)
    mean = np.where(counted, rewards, 0.0).sum(1, keepdims=True) / n
    std = np.sqrt(np.where(counted, (rewards - mean) ** 2, 0.0).sum(1, keepdims=True) / n)
    flat = std <= eps
    scale = np.where(flat, 1.0, std) if normalise_std else 1.0
    advantages = np.where(usable & ~flat, (rewards - mean) / scale, 0.0)
    return advantages.astype(np.float32), {"groups/flat": float(flat.mean()), "groups/std": float(std.mean())}
