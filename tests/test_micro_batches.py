"""Micro-batches by tokens: every group once, in few shapes, within the budget, and the same gradient however they are cut."""

import dataclasses

import jax
import numpy as np
import optax
import pytest
from conftest import small_config

from imagent_jax.rl import learner
from imagent_jax.rl.batch import micro_batches, micro_shapes, take_groups
from imagent_jax.rl.learner import Learner, Tables
from imagent_jax.rl.mask import mask_tables
from imagent_jax.rl.trajectory import TokenKind


def with_lengths(batch, lengths):
    """The batch with its N groups repeated to `len(lengths)` groups whose longest responses have these lengths."""
    big = take_groups(batch, np.arange(len(lengths)) % len(batch.prompt_len), batch.kind.shape[-1])
    return dataclasses.replace(big, response_len=np.repeat(np.asarray(lengths)[:, None], batch.kind.shape[1], 1))


def test_every_group_is_in_one_micro_batch_and_none_exceeds_the_budget(batch):
    cfg = small_config(rollout={"groups": 24, "group_size": 4, "response_tokens": 96}, grpo={"micro_groups": 3, "widths": 4})
    shapes, r = micro_shapes(cfg), cfg.rollout
    assert [width for width, _ in shapes] == [24, 48, 72, 96] and [size for _, size in shapes] == [6, 3, 3, 3]
    lengths = np.random.default_rng(0).integers(1, 97, 24)
    big = dataclasses.replace(with_lengths(batch, lengths), prompt_len=np.arange(24))
    index, seen = np.arange(2, 24), []
    updates = micro_batches(big, index, shapes, 4)
    shares = [sum(len(taken) for taken, _ in update) for update in updates]
    assert len(updates) == 4 and sum(shares) == len(index) and max(shares) - min(shares) <= shapes[0][1]
    for taken, part in sum(updates, []):
        n, g, width = part.kind.shape
        assert (width, n) in shapes and n * (r.prompt_tokens + g * width) <= 3 * (r.prompt_tokens + g * r.response_tokens)
        blank = (part.kind == TokenKind.PAD).all((1, 2))
        assert not np.any(blank[:-1] & ~blank[1:]) and (part.response_len[~blank] <= width).all()
        assert part.prompt_len[~blank].tolist() == taken.tolist()
        seen += taken.tolist()
    assert sorted(seen) == index.tolist()
    for count, updates in ((1, 1), (3, 2), (5, 4), (7, 3)):
        dealt = micro_batches(big, np.arange(count), shapes, updates)
        assert len(dealt) == updates and all(dealt) and sum(len(taken) for update in dealt for taken, _ in update) == count


@pytest.mark.parametrize("level", ["token", "sequence", "constant"])
def test_an_update_does_not_depend_on_how_it_is_cut(parts, config, batch, rollout, level, monkeypatch):
    """Five groups in one micro-batch, and in three of two with a blank one."""
    big = with_lengths(batch, [int(batch.response_len.max())] * 5)
    advantages = np.random.default_rng(0).normal(size=big.advantages.shape).astype(np.float32)
    big, cut, accumulate = dataclasses.replace(big, advantages=advantages), [], learner.accumulate
    monkeypatch.setattr(learner, "accumulate", lambda *args: (cut.append(args[7].kind.shape[0]), accumulate(*args))[1])

    def updated(micro):
        changed = {"micro_groups": micro, "minibatches": 1, "level": level}
        cfg = dataclasses.replace(config, grpo=dataclasses.replace(config.grpo, **changed),
                                  rollout=dataclasses.replace(config.rollout, groups=5))  # fmt: skip
        trainer = Learner(parts.model, cfg, optax.sgd(0.1), Tables(*mask_tables(cfg.mask)[:2]))
        trainer.warm, trainer.shapes = True, trainer.shapes[-1:]
        cut.clear()
        params = jax.tree.map(lambda x: x.copy(), parts.params)
        found = trainer.update(params, trainer.init(params), big, rollout.store)
        return found[0], found[2], list(cut)

    (whole, said, once), (parted, also, thrice) = updated(5), updated(2)
    assert once == [5] and thrice == [2, 2, 2]
    moved = 0.0
    for a, b, before in zip(*map(jax.tree.leaves, (whole, parted, parts.params)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
        moved = max(moved, float(abs(a - before).max()))
    assert moved > 1e-4 and said["loss"] == pytest.approx(also["loss"], abs=1e-5)
