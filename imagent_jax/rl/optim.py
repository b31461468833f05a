"""The optimizer: AdamW with warm-up, schedule and global-norm clipping, from optax."""

from typing import Any

import jax
import optax
from flax import nnx

from imagent_jax.config import OptimConfig


def matrices(params: Any) -> Any:
    """Return which parameters have weight decay: those with at least two axes, not counting the axis of stacked layers.

    Stacked norms and biases are [layers, width] and have no decay; the `logical_axes` of an `nnx.Variable` identify them.
    """

    def one(leaf):
        if not isinstance(leaf, nnx.Variable):
            return leaf.ndim > 1
        value, axes = leaf.get_value(), leaf.get_metadata().get("logical_axes", ())
        return leaf.replace(value.ndim - ("layers" in axes) > 1)

    return jax.tree.map(one, params, is_leaf=lambda x: isinstance(x, nnx.Variable))


def make_optimizer(cfg: OptimConfig, total_updates: int) -> optax.GradientTransformation:
    """Return AdamW after clipping by global norm.

    The learning rate warms up linearly to `learning_rate`, then is constant or follows a cosine to zero at `total_updates`.
    Weight decay applies to `matrices` only.
    """
    warmup = min(cfg.warmup_steps, max(total_updates - 1, 0))
    if cfg.schedule == "cosine":
        after = optax.cosine_decay_schedule(cfg.learning_rate, max(total_updates - warmup, 1))
    else:
        after = optax.constant_schedule(cfg.learning_rate)
    rate = optax.join_schedules([optax.linear_schedule(0.0, cfg.learning_rate, max(warmup, 1)), after], [warmup])
    return optax.chain(
        optax.clip_by_global_norm(cfg.clip_norm),
        optax.adamw(rate, b1=cfg.b1, b2=cfg.b2, mu_dtype=cfg.moment_dtype, weight_decay=cfg.weight_decay, mask=matrices),
    )
