"""The optimizer: AdamW with warm-up, schedule and global-norm clipping, all of it optax."""

import jax
import optax

from imagent_jax.config import OptimConfig


def make_optimizer(cfg: OptimConfig, total_updates: int) -> optax.GradientTransformation:
    """Linear warm-up to `learning_rate`, then constant or cosine to zero over `total_updates`; decay of matrices only."""
    warmup = min(cfg.warmup_steps, max(total_updates - 1, 0))
    if cfg.schedule == "cosine":
        after = optax.cosine_decay_schedule(cfg.learning_rate, max(total_updates - warmup, 1))
    else:
        after = optax.constant_schedule(cfg.learning_rate)
    rate = optax.join_schedules([optax.linear_schedule(0.0, cfg.learning_rate, max(warmup, 1)), after], [warmup])
    matrices = lambda params: jax.tree.map(lambda x: x.ndim > 1, params)  # noqa: E731
    return optax.chain(
        optax.clip_by_global_norm(cfg.clip_norm),
        optax.adamw(rate, b1=cfg.b1, b2=cfg.b2, weight_decay=cfg.weight_decay, mask=matrices),
    )
