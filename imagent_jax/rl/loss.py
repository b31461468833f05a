"""The policy loss. GRPO, Dr.GRPO, DAPO and GSPO are settings of one function."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from imagent_jax.config import GRPOConfig

PRESETS: dict[str, dict[str, Any]] = {
    "grpo": {"normalise_std": True, "level": "sequence", "ratio": "token", "clip_low": 0.2, "clip_high": 0.2},
    "dr_grpo": {"normalise_std": False, "level": "constant", "ratio": "token", "clip_low": 0.2, "clip_high": 0.2},
    "dapo": {"normalise_std": True, "level": "token", "ratio": "token", "clip_low": 0.2, "clip_high": 0.28},
    "gspo": {"normalise_std": True, "level": "sequence", "ratio": "sequence", "clip_low": 3e-4, "clip_high": 4e-4},
}
"""Settings by published name: arXiv 2402.03300, 2503.20783, 2503.14476 (token level, clip-higher), 2507.18071."""

LOG_LIMIT = 20.0
"""Differences of log-probabilities are cut to ±20 before `exp`: an overflow would make even a clipped gradient NaN."""


def loss_normaliser(mask: Bool[Array, "N G R"], *, cfg: GRPOConfig) -> Float[Array, " N"]:
    """What each group adds to the loss's denominator; sum it over the groups of an update before its first gradient."""
    if cfg.level == "token":
        return mask.sum((1, 2)).astype(jnp.float32)
    if cfg.level == "sequence":
        return mask.any(-1).sum(1).astype(jnp.float32)
    return jnp.full(mask.shape[0], mask.shape[1] * cfg.constant, jnp.float32)


def policy_loss(
    logprobs: Float[Array, "N G R"],
    old_logprobs: Float[Array, "N G R"],
    advantages: Float[Array, "N G"] | Float[Array, "N G R"],
    mask: Bool[Array, "N G R"],
    *,
    cfg: GRPOConfig,
    normaliser: Float[Array, ""],
    ref_logprobs: Float[Array, "N G R"] | None = None,
    importance: Float[Array, "N G R"] | None = None,
    entropy: Float[Array, "N G R"] | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Clipped policy-gradient loss of one micro-batch: a sum over kept tokens divided by `normaliser`.

    Args:
        logprobs: of the response tokens under the parameters being trained.
        old_logprobs: the sampler's, of the same tokens; the ratio is against them.
        advantages: one per rollout, or one per token.
        mask: tokens that train. Whatever stands elsewhere, NaN included, changes neither loss nor gradient.
        normaliser: `loss_normaliser` summed over the whole update, so that losses and gradients of micro-batches add
            up exactly.
        ref_logprobs: of the reference policy; adds `cfg.kl` times the k3 estimate of the KL per token.
        importance: weights for stale or low-precision samples, exp(trainer's at the start - sampler's), truncated at
            `cfg.importance_cap`; with them, `old_logprobs` are the trainer's at the start.
    Returns:
        The loss, and metrics weighted as its tokens are. They add up over micro-batches too; `finish_metrics` of the
        sums gives means.
    """
    dtype = jnp.promote_types(logprobs.dtype, jnp.float32)

    def kept(x):
        return jnp.where(mask, x, 0).astype(dtype)

    logprobs, old = kept(logprobs), kept(old_logprobs)
    advantage = kept(advantages if advantages.ndim == mask.ndim else advantages[..., None])
    length = jnp.maximum(mask.sum(-1, keepdims=True), 1).astype(dtype)
    log_ratio = logprobs - old
    if cfg.ratio == "sequence":  # GSPO-token: the value of the sequence's ratio, a gradient through each token
        mean_ratio = jax.lax.stop_gradient(log_ratio.sum(-1, keepdims=True) / length)
        log_ratio = mean_ratio + (logprobs - jax.lax.stop_gradient(logprobs))
    ratio = _exp(log_ratio)
    low = (ratio < 1 - cfg.clip_low) & (advantage < 0)
    high = (ratio > 1 + cfg.clip_high) & (advantage > 0)
    token = -advantage * jnp.where(high, 1 + cfg.clip_high, jnp.where(low, 1 - cfg.clip_low, ratio))
    if importance is not None:
        token = token * jax.lax.stop_gradient(jnp.minimum(kept(importance), cfg.importance_cap))
    metrics = {"clip/low": low, "clip/high": high, "ratio/mean": ratio, "kl/sampler": _k3(old - logprobs)}
    if ref_logprobs is not None:
        metrics["kl/reference"] = divergence = _k3(kept(ref_logprobs) - logprobs)
        token = token + cfg.kl * divergence
    if entropy is not None:
        metrics["entropy"] = kept(entropy)

    share = 1 / length if cfg.level == "sequence" else jnp.ones_like(length)
    weight = kept(share / jnp.where(normaliser > 0, normaliser, 1))
    sums = {name: jax.lax.stop_gradient(jnp.sum(weight * value)) for name, value in metrics.items()}
    return jnp.sum(weight * token), sums | {"loss/weight": weight.sum()}


def finish_metrics(metrics: dict[str, Any]) -> dict[str, Any]:
    """Means from metrics of `policy_loss` summed over all micro-batches of an update.

    The weights of a batch sum to one at level token and sequence, so only level constant changes by it.
    """
    weight = metrics["loss/weight"]
    return {k: v if k == "loss/weight" else v / jnp.where(weight > 0, weight, 1) for k, v in metrics.items()}


def _exp(x: Float[Array, "N G R"]) -> Float[Array, "N G R"]:
    return jnp.exp(jnp.clip(x, -LOG_LIMIT, LOG_LIMIT))


def _k3(x: Float[Array, "N G R"]) -> Float[Array, "N G R"]:
    """exp(x) - x - 1: unbiased and never negative (Schulman, "Approximating KL divergence", 2020)."""
    return _exp(x) - x - 1
