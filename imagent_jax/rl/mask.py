"""The two-level mask: two boolean look-up tables and one boolean tensor operation.

Our interpretation of the action-trajectory two-level mask of IMAgent (arXiv 2512.08980), which publishes no formula.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, UInt8

from imagent_jax.config import MaskConfig
from imagent_jax.rl.batch import AnyArray, GroupBatch
from imagent_jax.types import EndReason, TokenKind

IS_ACTION = np.array([kind not in (TokenKind.OBSERVATION, TokenKind.PAD) for kind in TokenKind])


class MaskTables(NamedTuple):
    """Look-up tables of the two-level mask.

    Attributes:
        action: bool [2, 6]; whether a token of this kind trains if its advantage is (0) not positive, (1) positive.
        trajectory: bool [6]; whether a trajectory with this end reason trains.
        counted: bool [6]; whether it counts in its group's mean and standard deviation (FAULT never does).
    """

    action: np.ndarray
    trajectory: np.ndarray
    counted: np.ndarray


def mask_tables(cfg: MaskConfig) -> MaskTables:
    """Return the look-up tables of a configuration."""
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
    return MaskTables(action, trajectory, counted)


def two_level_mask(
    kind: UInt8[AnyArray, "N G R"],
    end: UInt8[AnyArray, "N G"],
    advantages: Float[AnyArray, "N G"],
    action_table: Bool[AnyArray, "2 kinds"],
    trajectory_table: Bool[AnyArray, " ends"],
) -> Bool[Array, "N G R"]:
    """Return which tokens train: `action_table[advantage > 0, kind] & trajectory_table[end]`."""
    positive = (advantages > 0).astype(jnp.int32)[..., None]
    return jnp.asarray(action_table)[positive, kind] & jnp.asarray(trajectory_table)[end][..., None]


def dropped_shares(batch: GroupBatch, cfg: MaskConfig) -> dict[str, float]:
    """Return metrics: shares of the sampled tokens and of the trajectories that the mask drops, in total and by reason.

    A reason is `invalid_call` or an end reason whose trajectories are dropped. A token dropped for two reasons counts under both.
    `mask/observation_tokens` is the share of observation tokens among all response tokens.
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
