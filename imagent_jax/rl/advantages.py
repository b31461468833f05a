"""Group-relative advantages (GRPO, arXiv 2402.03300, section 4.1.2)."""

import numpy as np


def group_advantages(
    rewards: np.ndarray, counted: np.ndarray, *, normalise_std: bool, eps: float = 1e-6
) -> tuple[np.ndarray, dict[str, float]]:
    """Advantages float32[N, G]: reward less the group's mean, divided by its deviation where `normalise_std`.

    Args:
        rewards: [N, G].
        counted: bool[N, G], rollouts that enter mean and deviation; the others are still compared with them.
        eps: a group whose counted rewards spread less than this gets zeros.
    Returns:
        Advantages and metrics: reward mean and deviation of groups, share of groups without spread.
    """
    rewards = np.asarray(rewards, np.float64)
    weight = np.asarray(counted, np.float64)
    n = np.maximum(weight.sum(1, keepdims=True), 1.0)
    mean = (rewards * weight).sum(1, keepdims=True) / n
    std = np.sqrt((weight * (rewards - mean) ** 2).sum(1, keepdims=True) / n)
    flat = (std <= eps) | (weight.sum(1, keepdims=True) < 2)
    centred = rewards - mean
    advantages = np.where(flat, 0.0, centred / np.where(flat, 1.0, std) if normalise_std else centred)
    return advantages.astype(np.float32), {"groups/flat": float(flat.mean()), "groups/std": float(std.mean())}
