"""Batches of trajectories; micro-batches by tokens: every group once, in few shapes, within the budget, and the same gradient
however they are cut."""

import dataclasses

import jax
import numpy as np
import optax
import pytest
from conftest import small_config

from imagent_jax.model.features import EncodedImages
from imagent_jax.model.interleave import Encoded
from imagent_jax.rl import learner
from imagent_jax.rl.batch import check_images, learning_groups, micro_batches, micro_shapes, pack_batch, take_groups
from imagent_jax.rl.learner import Learner
from imagent_jax.rl.mask import mask_tables
from imagent_jax.rollout.batch import RolloutBatch
from imagent_jax.types import EndReason, Task, TokenKind, Trajectory

IMAGE = 9


def trajectory(task: Task, number: int, rng, length: int) -> Trajectory:
    """A response of random tokens; from the third on, two image placeholders that an observation shows."""
    vision, kind = np.full(length, -1, np.int32), rng.integers(0, 4, length).astype(np.uint8)
    ids = rng.integers(10, 50, length).astype(np.int32)
    if length > 4:
        vision[2:4], kind[2:4], ids[2:4] = rng.integers(0, 20, 2), TokenKind.OBSERVATION, IMAGE
    return Trajectory(
        task, number, ids, rng.normal(size=length).astype(np.float32), kind, rng.integers(0, 99, (3, length)).astype(np.int32),
        vision, [], EndReason(int(rng.integers(0, 6))), None,
    )  # fmt: skip


def made_rollout() -> RolloutBatch:
    """Three tasks, two rollouts of each, all of different lengths."""
    rng, tasks = np.random.default_rng(0), [Task(f"task-{i}", "?", (), "1") for i in range(3)]
    prompts, vision, groups = [], [], []
    for length, task in zip((4, 2, 5), tasks, strict=True):
        ids, positions = rng.integers(10, 50, length).astype(np.int32), rng.integers(0, 99, (3, length)).astype(np.int32)
        prompts.append(Encoded(ids, positions, 0, np.full(length, -1), np.zeros(length, np.int32), []))
        vision.append(rng.integers(-1, 20, length).astype(np.int32))
        groups.append([trajectory(task, number, rng, int(rng.integers(1, 8))) for number in range(2)])
    no_images = EncodedImages.__new__(EncodedImages)  # a batch takes nothing from there
    return RolloutBatch(tasks, prompts, vision, groups, no_images, {}, 0, IMAGE)


def test_a_batch_holds_every_trajectory_in_its_place_and_padding_elsewhere():
    made, rng, width = made_rollout(), np.random.default_rng(1), 8
    rewards, advantages = rng.normal(size=(2, 3, 2))
    packed = pack_batch(made, rewards, advantages, 6, width)
    np.testing.assert_array_equal(packed.rewards, rewards.astype(np.float32))
    np.testing.assert_array_equal(packed.advantages, advantages.astype(np.float32))

    def padded(x, length, value):
        return np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, length - x.shape[-1])], constant_values=value)

    for n, (prompt, vision) in enumerate(zip(made.prompts, made.prompt_vision, strict=True)):
        assert packed.prompt_len[n] == len(prompt.ids)
        np.testing.assert_array_equal(packed.prompt_ids[n], padded(prompt.ids, 6, 0))
        np.testing.assert_array_equal(packed.prompt_positions[:, n], padded(prompt.positions, 6, 0))
        np.testing.assert_array_equal(packed.prompt_vision[n], padded(vision, 6, -1))
        for g, t in enumerate(made.trajectories[n]):
            assert packed.response_len[n, g] == len(t.ids) and packed.end[n, g] == t.end
            np.testing.assert_array_equal(packed.response_ids[n, g], padded(t.ids, width, 0))
            np.testing.assert_array_equal(packed.response_positions[:, n, g], padded(t.positions, width, 0))
            np.testing.assert_array_equal(packed.response_vision[n, g], padded(t.vision, width, -1))
            np.testing.assert_array_equal(packed.kind[n, g], padded(t.kind, width, TokenKind.PAD))
            np.testing.assert_array_equal(packed.logprobs[n, g], padded(t.logprobs, width, 0))


def test_a_batch_of_a_trajectory_without_a_feature_row_is_refused():
    made = made_rollout()
    t = made.trajectories[1][1]
    t.ids[0], t.kind[0] = IMAGE, TokenKind.TEXT  # the policy may say the placeholder: it is no image
    check_images([t], IMAGE)
    t.vision[3] = -1
    words = f"Task {t.task.uid}, rollout {t.rollout}: 2 image placeholders but 1 image features."
    with pytest.raises(ValueError, match=words):
        pack_batch(made, np.zeros((3, 2)), np.zeros((3, 2)), 6, 8)


def test_groups_are_taken_whole_cut_to_a_width_and_filled_up_with_some_that_train_nothing():
    packed = pack_batch(made_rollout(), np.arange(6.0).reshape(3, 2), np.arange(6.0, 12).reshape(3, 2), 6, 8)
    part = take_groups(packed, np.array([2, 0]), 5, 4)
    assert (part.kind[2:] == TokenKind.PAD).all()
    for field in dataclasses.fields(packed):
        value, taken = getattr(packed, field.name), getattr(part, field.name)
        if value is None:
            assert taken is None
            continue
        axis = 1 if field.name in ("prompt_positions", "response_positions") else 0
        value, taken = np.moveaxis(value, axis, 0), np.moveaxis(taken, axis, 0)
        wide = value.shape[-1] == 8
        np.testing.assert_array_equal(taken[:2], value[[2, 0]][..., :5] if wide else value[[2, 0]])
        assert len(taken) == 4 and (field.name == "kind" or np.array_equal(taken[2], taken[0]))
    assert len(take_groups(packed, np.array([1]), 8).kind) == 1


def test_groups_without_an_advantage_are_run_only_to_fill_the_updates_up():
    advantages = np.zeros((5, 2), np.float32)
    advantages[1, 1], advantages[4, 0] = 1.0, -1.0
    packed = pack_batch(made_rollout(), np.zeros((3, 2)), np.zeros((3, 2)), 6, 8)
    packed = dataclasses.replace(take_groups(packed, np.array([0, 1, 2, 0, 1]), 8), advantages=advantages)
    assert learning_groups(packed, 1).tolist() == learning_groups(packed, 2).tolist() == [1, 4]
    assert learning_groups(packed, 3).tolist() == [1, 4, 0] and learning_groups(packed, 4).tolist() == [1, 4, 0, 2]


def test_shapes_of_micro_batches_divide_the_longest_response_and_keep_to_its_tokens():
    """P + G R = 12 + 2 * 20 tokens a group, of which two are 104; four of 12 + 2 * 7 are as many."""
    cfg = small_config(rollout={"groups": 9, "group_size": 2, "prompt_tokens": 12, "response_tokens": 20},
                       grpo={"micro_groups": 2, "length_buckets": 3})  # fmt: skip
    assert micro_shapes(cfg) == [(7, 4), (14, 2), (20, 2)]
    few = dataclasses.replace(cfg, rollout=dataclasses.replace(cfg.rollout, groups=1))
    assert micro_shapes(few) == [(7, 2), (14, 1), (20, 1)]
    long = dataclasses.replace(cfg, rollout=dataclasses.replace(cfg.rollout, prompt_tokens=30))
    assert micro_shapes(long) == [(7, 2), (14, 2), (20, 2)]


def test_the_longest_groups_come_first_each_in_the_narrowest_shape_that_holds_it():
    packed = pack_batch(made_rollout(), np.zeros((3, 2)), np.zeros((3, 2)), 6, 8)
    lengths = [4, 8, 1, 5, 2]
    packed = dataclasses.replace(
        take_groups(packed, np.array([0, 1, 2, 0, 1]), 8), response_len=np.array([[1, n] for n in lengths], np.int32)
    )
    (dealt,) = micro_batches(packed, np.arange(5), [(4, 3), (8, 2)], 1)
    assert sorted((taken.tolist(), part.kind.shape) for taken, part in dealt) == [([0, 4, 2], (3, 2, 4)), ([1, 3], (2, 2, 8))]


def with_lengths(batch, lengths):
    """The batch with its N groups repeated to `len(lengths)` groups whose longest responses have these lengths."""
    big = take_groups(batch, np.arange(len(lengths)) % len(batch.prompt_len), batch.kind.shape[-1])
    return dataclasses.replace(big, response_len=np.repeat(np.asarray(lengths)[:, None], batch.kind.shape[1], 1))


def test_every_group_is_in_one_micro_batch_and_none_exceeds_the_budget():
    cfg = small_config(rollout={"groups": 24, "group_size": 2, "prompt_tokens": 56, "response_tokens": 96},
                       grpo={"micro_groups": 3, "length_buckets": 4})  # fmt: skip
    batch = pack_batch(made_rollout(), np.zeros((3, 2)), np.zeros((3, 2)), 56, 96)
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
@pytest.mark.slow(20)
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
        trainer = Learner(parts.model, cfg, optax.sgd(0.1), mask_tables(cfg.mask))
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
