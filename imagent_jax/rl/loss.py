"""The policy loss: GRPO, Dr.GRPO, DAPO and GSPO as settings of one function."""

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
"""Log-ratios are clipped to ±20 before `exp`: an overflow would turn even a clipped token's gradient into NaN."""


def loss_normaliser(mask: Bool[Array, "N G R"], *, cfg: GRPOConfig) -> Float[Array, " N"]:
    """Return each group's contribution to the loss's denominator. Sum it over all groups of an update."""
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
    sampler_logprobs: Float[Array, "N G R"] | None = None,
    entropy: Float[Array, "N G R"] | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Return the clipped policy-gradient loss of one micro-batch: a weighted sum over kept tokens divided by `normaliser`.

    Args:
        logprobs: log-probabilities of the response tokens under the current parameters.
        old_logprobs: log-probabilities before the update, the denominator of the ratio: the sampler's, or the trainer's.
        advantages: one per rollout, or one per token.
        mask: tokens that train. Values of other tokens, NaN included, affect neither loss nor gradient.
        normaliser: `loss_normaliser` summed over the whole update, so that losses and gradients of micro-batches sum exactly.
        ref_logprobs: log-probabilities under the reference policy; adds `cfg.kl` times the k3 estimate of the KL per token.
        sampler_logprobs: log-probabilities under the sampler where `old_logprobs` are the trainer's. The weights
            exp(old_logprobs - sampler_logprobs), truncated at `cfg.importance_cap`, then correct stale or low-precision samples.
        entropy: entropy per token, for metrics only.
    Returns:
        The loss, and metrics with the token weights of the loss. Both sum over micro-batches; `finish_metrics` of the sums gives
        means.
    """
    dtype = jnp.promote_types(logprobs.dtype, jnp.float32)

    def kept(x):
        return jnp.where(mask, x, 0).astype(dtype)

    logprobs, old = kept(logprobs), kept(old_logprobs)
    advantage = kept(advantages if advantages.ndim == mask.ndim else advantages[..., None])
    length = jnp.maximum(mask.sum(-1, keepdims=True), 1).astype(dtype)
    log_ratio = logprobs - old
    if cfg.ratio == "sequence":  # GSPO-token: value of the sequence's ratio, gradient through each token
        mean_ratio = jax.lax.stop_gradient(log_ratio.sum(-1, keepdims=True) / length)
        log_ratio = mean_ratio + (logprobs - jax.lax.stop_gradient(logprobs))
    ratio = _exp(log_ratio)
    low = (ratio < 1 - cfg.clip_low) & (advantage < 0)
    high = (ratio > 1 + cfg.clip_high) & (advantage > 0)
    token = -advantage * jnp.where(high, 1 + cfg.clip_high, jnp.where(low, 1 - cfg.clip_low, ratio))
    sampler, importance = old, jnp.ones_like(old)
    if sampler_logprobs is not None:
        sampler = kept(sampler_logprobs)
        importance = jax.lax.stop_gradient(jnp.minimum(_exp(old - sampler), cfg.importance_cap))
        token = token * importance
    metrics = {
        "clip/low": low,
        "clip/high": high,
        "ratio/mean": ratio,
        "kl/sampler": _k3(sampler - logprobs),
        "importance/mean": importance,
        "importance/capped": (importance >= cfg.importance_cap) & (sampler_logprobs is not None),
    }
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
    """Return means from metrics of `policy_loss` that were summed over the micro-batches of an update.

    The weights of a batch sum to one at the levels token and sequence, so only the level constant is rescaled.
    """
    weight = metrics["loss/weight"]
    return {k: v if k == "loss/weight" else v / jnp.where(weight > 0, weight, 1) for k, v in metrics.items()}


def _exp(x: Float[Array, "N G R"]) -> Float[Array, "N G R"]:
    return jnp.exp(jnp.clip(x, -LOG_LIMIT, LOG_LIMIT))


def _k3(x: Float[Array, "N G R"]) -> Float[Array, "N G R"]:
    """Return exp(x) - x - 1, an unbiased, nonnegative KL estimate (Schulman, "Approximating KL divergence", 2020)."""
    return _exp(x) - x - 1
