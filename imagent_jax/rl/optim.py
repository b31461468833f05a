"""The optimizer: AdamW with warm-up, schedule and global-norm clipping, all of it optax."""

from typing import Any

import jax
import optax
from flax import nnx

from imagent_jax.config import OptimConfig


def matrices(params: Any) -> Any:
    """Which parameters weight decay touches: those with two axes or more, the stack of layers not counted.

    A norm or a bias of stacked layers is [layers, width], yet no matrix; `logical_axes` of an `nnx.Variable` tells.
    """

    def one(leaf):
        if not isinstance(leaf, nnx.Variable):
            return leaf.ndim > 1
        value, axes = leaf.get_value(), leaf.get_metadata().get("logical_axes", ())
        return leaf.replace(value.ndim - ("layers" in axes) > 1)

    return jax.tree.map(one, params, is_leaf=lambda x: isinstance(x, nnx.Variable))


def make_optimizer(cfg: OptimConfig, total_updates: int) -> optax.GradientTransformation:
    """AdamW after clipping by global norm.

    The rate warms up linearly to `learning_rate`, then stays or falls as a cosine to zero at `total_updates`; weight
    decay is of `matrices` only.
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
