"""The two-level mask: two boolean look-up tables and one boolean tensor operation.

Our reading of the action-trajectory two-level mask of IMAgent (arXiv 2512.08980), which publishes no formula.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, UInt8

from imagent_jax.config import MaskConfig
from imagent_jax.rl.batch import AnyArray, GroupBatch
from imagent_jax.types import EndReason, TokenKind

IS_ACTION = np.array([kind not in (TokenKind.OBSERVATION, TokenKind.PAD) for kind in TokenKind])


def mask_tables(cfg: MaskConfig) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The look-up tables of a configuration.

    Returns:
        action bool[2, 6]: may a token of this kind train, where its advantage is (0) not positive, (1) positive;
        trajectory bool[6]: may a trajectory that ended so train;
        counted bool[6]: does it count in its group's mean and deviation (FAULT never does).
    """
    action = np.tile(IS_ACTION, (2, 1))
    action[:, TokenKind.OBSERVATION] = cfg.observations == "keep"
    if cfg.invalid_call != "keep":
        action[1, TokenKind.INVALID_CALL] = False
        action[0, TokenKind.INVALID_CALL] = cfg.invalid_call == "drop_positive"
    trajectory, counted = np.ones(len(EndReason), bool), np.ones(len(EndReason), bool)
    for reason in (EndReason.TRUNCATED, EndReason.OVER_TURNS, EndReason.VOID, EndReason.REPEATED):
        trajectory[reason] = not getattr(cfg, f"drop_{reason.name.lower()}")
        counted[reason] = getattr(cfg, f"count_{reason.name.lower()}")
    trajectory[EndReason.FAULT] = counted[EndReason.FAULT] = False
    return action, trajectory, counted


def two_level_mask(
    kind: UInt8[AnyArray, "N G R"],
    end: UInt8[AnyArray, "N G"],
    advantages: Float[AnyArray, "N G"],
    action_table: Bool[AnyArray, "2 kinds"],
    trajectory_table: Bool[AnyArray, " ends"],
) -> Bool[Array, "N G R"]:
    """Which tokens train: `action_table[advantage > 0, kind] & trajectory_table[end]`."""
    positive = (advantages > 0).astype(jnp.int32)[..., None]
    return jnp.asarray(action_table)[positive, kind] & jnp.asarray(trajectory_table)[end][..., None]


def dropped_shares(batch: GroupBatch, cfg: MaskConfig) -> dict[str, float]:
    """Metrics: shares of the sampled tokens and of the trajectories that the mask drops, in all and by reason.

    A reason is `invalid_call`, or an end that drops its trajectory; a token dropped for both counts under both.
    `mask/observation_tokens` is the share of observations among all tokens of the responses.
    """
    action, trajectory, _ = mask_tables(cfg)
    kind, end = np.asarray(batch.kind), np.asarray(batch.end)
    sampled = IS_ACTION[kind]
    kept = np.asarray(two_level_mask(kind, end, np.asarray(batch.advantages), action, trajectory))
    by_action = sampled & ~action[(np.asarray(batch.advantages) > 0).astype(int)[..., None], kind]
    total, tokens = max(int(sampled.sum()), 1), max(int((kind != TokenKind.PAD).sum()), 1)
    shares = {
        "mask/dropped_tokens": float((sampled & ~kept).sum() / total),
        "mask/dropped_trajectories": float(np.mean(~trajectory[end])),
        "mask/dropped_tokens/invalid_call": float(by_action.sum() / total),
        "mask/observation_tokens": float((kind == TokenKind.OBSERVATION).sum() / tokens),
    }
    for reason in EndReason:
        if not trajectory[reason]:
            name, ended = reason.name.lower(), end == reason
            shares[f"mask/dropped_tokens/{name}"] = float((sampled & ended[..., None]).sum() / total)
            shares[f"mask/dropped_trajectories/{name}"] = float(np.mean(ended))
    return shares
