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


def loss_normaliser(mask: Bool[Array, "N G R"], *, cfg: GRPOConfig) -> Float[Array, ""]:
    """What this part of a batch adds to the loss's denominator; sum it over micro-batches before the first gradient."""
    if cfg.level == "token":
        return mask.sum().astype(jnp.float32)
    if cfg.level == "sequence":
        return mask.any(-1).sum().astype(jnp.float32)
    return jnp.float32(mask.shape[0] * mask.shape[1] * cfg.constant)


def policy_loss(
    logprobs: Float[Array, "N G R"],
    old_logprobs: Float[Array, "N G R"],
    advantages: Float[Array, "N G"],
    mask: Bool[Array, "N G R"],
    *,
    cfg: GRPOConfig,
    normaliser: Float[Array, ""],
    ref_logprobs: Float[Array, "N G R"] | None = None,
    importance: Float[Array, "N G R"] | None = None,
    entropy: Float[Array, "N G R"] | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Clipped policy-gradient loss of one micro-batch.

    Args:
        logprobs: of the response tokens under the parameters being trained.
        old_logprobs: the sampler's, of the same tokens; the ratio is against them.
        advantages: one per rollout.
        mask: tokens that train. Whatever stands elsewhere, NaN included, changes neither loss nor gradient.
        normaliser: `loss_normaliser` summed over the whole batch, so that micro-batches add up exactly.
        ref_logprobs: of the reference policy; adds `cfg.kl` times the k3 estimate of the KL per token.
        importance: weights for stale or low-precision samples, truncated at `cfg.importance_cap`.
    Returns:
        The loss (a sum over kept tokens divided by `normaliser`), and metrics as means over the batch, which add up
        over micro-batches too.
    """
    zero = jnp.zeros((), logprobs.dtype)
    logprobs, old = jnp.where(mask, logprobs, zero), jnp.where(mask, old_logprobs, zero)
    advantage = jnp.where(mask, advantages[..., None], zero)
    log_ratio = logprobs - old
    length = jnp.maximum(mask.sum(-1, keepdims=True), 1)
    if cfg.ratio == "sequence":
        mean = log_ratio.sum(-1, keepdims=True) / length
        log_ratio = jax.lax.stop_gradient(mean) + logprobs - jax.lax.stop_gradient(logprobs)
    ratio = jnp.exp(log_ratio)
    clipped = jnp.clip(ratio, 1 - cfg.clip_low, 1 + cfg.clip_high)
    token = -jnp.minimum(ratio * advantage, clipped * advantage)
    if importance is not None:
        token = token * jax.lax.stop_gradient(jnp.minimum(jnp.where(mask, importance, zero), cfg.importance_cap))
    metrics = {}
    tokens = jnp.where(normaliser > 0, 1.0, 0.0) * (length / length)  # ones [N G 1]
    if cfg.level == "sequence":
        tokens = tokens / length
    weight = jnp.where(mask, tokens, 0.0) / jnp.maximum(normaliser, 1e-9)

    def mean(x):
        return jnp.sum(jnp.where(mask, jax.lax.stop_gradient(x) * weight, 0.0))

    if ref_logprobs is not None:
        away = jnp.where(mask, ref_logprobs, zero) - logprobs
        divergence = jnp.exp(away) - away - 1
        token = token + cfg.kl * divergence
        metrics["kl/reference"] = mean(divergence)
    metrics |= {
        "clip/low": mean((ratio < 1 - cfg.clip_low) & (advantage < 0)),
        "clip/high": mean((ratio > 1 + cfg.clip_high) & (advantage > 0)),
        "ratio/mean": mean(ratio),
        "kl/sampler": mean(jnp.exp(old - logprobs) - (old - logprobs) - 1),
    }
    if entropy is not None:
        metrics["entropy"] = mean(jnp.where(mask, entropy, zero))
    return jnp.sum(jnp.where(mask, token * weight, 0.0)), metrics
