"""The two-level mask against Python loops over every kind, end and setting."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest
from beartype import beartype
from jaxtyping import jaxtyped

from imagent_jax.config import MaskConfig
from imagent_jax.rl.batch import GroupBatch
from imagent_jax.rl.mask import dropped_shares, mask_tables, two_level_mask
from imagent_jax.types import EndReason, TokenKind

SWITCHED = ("truncated", "over_turns", "void", "repeated")


def trains(cfg, kind, end, advantage):
    """The rule of the design in plain words."""
    if kind == TokenKind.PAD or end == EndReason.FAULT:
        return False
    if kind == TokenKind.OBSERVATION and cfg.observations == "drop":
        return False
    if end.name.lower() in SWITCHED and getattr(cfg, f"drop_{end.name.lower()}"):
        return False
    if kind == TokenKind.INVALID_CALL:
        return cfg.invalid_call == "keep" or (cfg.invalid_call == "drop_positive" and not advantage > 0)
    return True


@pytest.mark.parametrize("observations", ["keep", "drop"])
@pytest.mark.parametrize("invalid_call", ["keep", "drop", "drop_positive"])
def test_mask_is_the_rule_for_every_kind_end_and_setting(invalid_call, observations):
    advantages = np.array([-1.0, 0.0, 1.0, np.nan], np.float32)
    kind = np.broadcast_to(np.array(list(TokenKind), np.uint8), (4, 6, 6))
    end = np.broadcast_to(np.array(list(EndReason), np.uint8), (4, 6))
    per_rollout = np.broadcast_to(advantages[:, None], (4, 6))
    compiled = jax.jit(jaxtyped(typechecker=beartype)(two_level_mask))
    for switches in itertools.product([False, True], repeat=4):
        drops = {f"drop_{name}": on for name, on in zip(SWITCHED, switches, strict=True)}
        cfg = MaskConfig(invalid_call=invalid_call, observations=observations, **drops)
        action, trajectory, _ = mask_tables(cfg)
        mask = np.asarray(compiled(kind, end, per_rollout, action, trajectory))
        expected = [[[trains(cfg, k, e, a) for k in TokenKind] for e in EndReason] for a in advantages]
        assert mask.dtype == bool and mask.tolist() == expected


def test_counting_has_its_own_switches_and_a_fault_never_counts():
    for name in SWITCHED:
        for drop, count in itertools.product([False, True], repeat=2):
            cfg = dataclasses.replace(MaskConfig(), **{f"drop_{name}": drop, f"count_{name}": count})
            _, trajectory, counted = mask_tables(cfg)
            assert (trajectory[EndReason[name.upper()]], counted[EndReason[name.upper()]]) == (not drop, count)
            assert not trajectory[EndReason.FAULT] and not counted[EndReason.FAULT]
            assert trajectory[EndReason.ANSWERED] and counted[EndReason.ANSWERED]


def batch_of(kind, end, advantages) -> GroupBatch:
    """A batch of one group; the mask reads nothing else."""
    (n, g, r), ids, positions = kind.shape, np.zeros((1, 1), np.int32), np.zeros((3, 1, 1), np.int32)
    responses = np.zeros((n, g, r), np.int32)
    return GroupBatch(
        ids, positions, np.ones(1, np.int32), ids, responses, np.zeros((3, n, g, r), np.int32), np.ones((n, g), np.int32),
        responses, kind, np.zeros((n, g, r), np.float32), end, advantages, advantages,
    )  # fmt: skip


def test_dropped_shares_by_reason():
    T, I, A, O, P = TokenKind.TEXT, TokenKind.INVALID_CALL, TokenKind.ANSWER, TokenKind.OBSERVATION, TokenKind.PAD
    kind = np.array([[[T, I, I, O, A], [T, I, O, T, A], [T, T, P, P, P], [T, I, T, P, P]]], np.uint8)
    end = np.array([[EndReason.ANSWERED, EndReason.ANSWERED, EndReason.TRUNCATED, EndReason.FAULT]], np.uint8)
    batch = batch_of(kind, end, np.array([[1.0, -1.0, 0.5, 0.0]], np.float32))
    shares = dropped_shares(batch, MaskConfig(drop_over_turns=False, drop_repeated=False))
    assert shares == pytest.approx({
        "mask/dropped_tokens": 7 / 13,  # two invalid, two truncated, three faulted
        "mask/dropped_tokens/invalid_call": 2 / 13,
        "mask/dropped_tokens/truncated": 2 / 13,
        "mask/dropped_tokens/fault": 3 / 13,
        "mask/dropped_trajectories": 2 / 4,
        "mask/dropped_trajectories/truncated": 1 / 4,
        "mask/dropped_trajectories/fault": 1 / 4,
        "mask/observation_tokens": 2 / 15,
    })  # fmt: skip


def test_dropped_shares_of_every_end_and_of_a_token_dropped_twice():
    """An invalid call of a truncated trajectory counts under both; observations that train are no sampled tokens."""
    T, I, O, P = TokenKind.TEXT, TokenKind.INVALID_CALL, TokenKind.OBSERVATION, TokenKind.PAD
    rows = {"TRUNCATED": [T, I, T, P], "OVER_TURNS": [T, P, P, P], "VOID": [T, T, P, P], "REPEATED": [T, O, T, T],
            "ANSWERED": [I, O, O, T]}  # fmt: skip
    end = np.array([[EndReason[name] for name in rows]], np.uint8)
    batch = batch_of(np.array([list(rows.values())], np.uint8), end, np.full((1, 5), -1, np.float32))
    shares = dropped_shares(batch, MaskConfig(invalid_call="drop", drop_void=True, observations="keep"))
    assert shares == pytest.approx({
        "mask/dropped_tokens": 10 / 11,
        "mask/dropped_tokens/invalid_call": 2 / 11,
        "mask/dropped_tokens/truncated": 3 / 11,
        "mask/dropped_tokens/over_turns": 1 / 11,
        "mask/dropped_tokens/void": 2 / 11,
        "mask/dropped_tokens/repeated": 3 / 11,
        "mask/dropped_tokens/fault": 0,
        "mask/dropped_trajectories": 4 / 5,
        **{f"mask/dropped_trajectories/{name}": 1 / 5 for name in ("truncated", "over_turns", "void", "repeated")},
        "mask/dropped_trajectories/fault": 0,
        "mask/observation_tokens": 3 / 14,
    })  # fmt: skip
