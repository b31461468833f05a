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
        counted: rollouts that enter mean and (population) standard deviation. The others still get an advantage; divided by the
            deviation, it is bounded by sqrt(G - 1), the most that a counted rollout can have (Samuelson's inequality).
        eps: a group whose counted rewards have at most this standard deviation gets zeros.
        fault: rollouts that failed on an environment error. They never count and get 0, as do rewards that are not finite, or
            beyond 1e30 (float32, in which advantages train, ends at 3e38).
    Returns:
        Advantages, and metrics: `groups/flat`, share of groups without spread; `groups/std`, mean standard deviation.
    """
    rewards = np.asarray(rewards, np.float64)
    usable = (np.abs(rewards) <= 1e30) & (True if fault is None else ~np.asarray(fault, bool))
    rewards, counted = np.where(usable, rewards, 0.0), np.asarray(counted, bool) & usable
    n = np.maximum(counted.sum(1, keepdims=True), 1)
    rewards = rewards - np.take_along_axis(rewards, counted.argmax(1)[:, None], 1)  # equal rewards are now exact zeros
    mean = np.where(counted, rewards, 0.0).sum(1, keepdims=True) / n
    std = np.sqrt(np.where(counted, (rewards - mean) ** 2, 0.0).sum(1, keepdims=True) / n)
    flat = std <= eps
    advantages = np.where(usable & ~flat, rewards - mean, 0.0)
    if normalise_std:
        limit = np.sqrt(rewards.shape[1] - 1)
        advantages = np.clip(advantages / np.where(flat, 1.0, std), -limit, limit)
    return advantages.astype(np.float32), {"groups/flat": float(flat.mean()), "groups/std": float(std.mean())}
