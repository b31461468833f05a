"""The promises that need the whole machine: tokens, gradients, shared prompts, shapes, images, faults."""

import dataclasses
import threading
import time
import zlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scripted_run import tools_with

from imagent_jax.model.text import REMAT_POLICIES
from imagent_jax.rl import learner
from imagent_jax.rl.batch import check_images, pack_batch, take_groups
from imagent_jax.rl.learner import LossSettings, batch_loss, score, shown_in
from imagent_jax.rl.loss import loss_normaliser
from imagent_jax.rl.mask import mask_tables, two_level_mask
from imagent_jax.rollout import sampler
from imagent_jax.rollout.collect import Collector, Stopped, draws
from imagent_jax.rollout.engine import Engine
from imagent_jax.rollout.environment import ToolEnvironment
from imagent_jax.runs.resources import CompileCounter
from imagent_jax.tiny.world import task_at
from imagent_jax.tools import ToolSet, tool
from imagent_jax.types import EndReason, TokenKind


def trainer_logprobs(parts, batch, store):
    return np.asarray(jax.jit(score, static_argnums=(0, 4))(parts.model, parts.params, batch, shown_in(store, batch), 1.0)[0])


def changed(config, **sections):
    """The configuration with some settings changed."""
    return dataclasses.replace(config, **{k: dataclasses.replace(getattr(config, k), **v) for k, v in sections.items()})


def sampled(batch):
    return (batch.kind != TokenKind.OBSERVATION) & (batch.kind != TokenKind.PAD)


# ---- promise 1: token in, token out ---------------------------------------------------------------------------------


def test_rollouts_have_several_turns_with_observation_images(rollout):
    flat = [t for group in rollout.trajectories for t in group]
    assert sum(len(t.turns) >= 2 and (t.vision >= 0).any() for t in flat) >= 3
    assert all(len(t.ids) == len(t.kind) == len(t.vision) == t.positions.shape[1] == t.turns[-1].stop for t in flat)


def test_trainer_recomputes_the_samplers_logprobs_turn_by_turn(parts, rollout, batch):
    difference = np.abs(trainer_logprobs(parts, batch, rollout.store) - batch.logprobs)
    for n, group in enumerate(rollout.trajectories):
        for g, t in enumerate(group):
            for turn in t.turns:
                assert difference[n, g, turn.start : turn.stop].max() <= 1e-4, (t.task.uid, turn)


def test_a_shifted_position_or_a_dropped_image_breaks_that_equality(parts, rollout, batch):
    seen = batch.response_vision >= 0
    index = np.arange(seen.shape[2])
    first = np.where(seen.any(-1), seen.argmax(-1), seen.shape[2])[..., None]  # of every row that shows an image
    later = sampled(batch) & (index > first)
    positions = np.array(batch.response_positions)
    positions += index == first + 1  # of one token
    image = seen & (np.cumsum(~seen & (index > first), -1) == 0)
    vision = np.where(image, -1, batch.response_vision)
    for wrong in (dataclasses.replace(batch, response_positions=positions), dataclasses.replace(batch, response_vision=vision)):
        difference = np.abs(trainer_logprobs(parts, wrong, rollout.store) - batch.logprobs)
        broken = np.where(later, difference, 0).max(-1) > 1e-4
        assert difference[later].max() > 1e-3 and broken[later.any(-1)].mean() > 0.25


def test_a_seed_gives_the_same_rollouts_whatever_stands_beside_a_task(parts, tasks, rollout):
    again = parts.collector.collect(parts.params, tasks[::-1], group_size=4, seed=11)
    for group, other in zip(rollout.trajectories, again.trajectories[::-1], strict=True):
        for a, b in zip(group, other, strict=True):
            assert np.array_equal(a.ids, b.ids) and a.end == b.end


def test_a_task_drawn_again_into_a_batch_has_other_rollouts_and_the_first_draw_the_same_as_alone(parts, tasks, rollout):
    drawn = [tasks[1], tasks[0], tasks[1], tasks[1], tasks[1]]
    out = parts.collector.collect(parts.params, drawn, group_size=4, seed=11, temperature=1.0)
    for group, n in ((out.trajectories[0], 1), (out.trajectories[1], 0)):
        assert [t.ids.tolist() for t in group] == [t.ids.tolist() for t in rollout.trajectories[n]]
    four = [out.trajectories[i] for i in (0, 2, 3, 4)]
    assert len({tuple(np.concatenate([t.logprobs for t in group]).tolist()) for group in four}) == 4
    warm = parts.collector.collect(parts.params, [tasks[0]] * 4, group_size=4, seed=11, temperature=3.0)
    assert len({tuple(t.ids.tolist()) for group in warm.trajectories for t in group}) == 16


def test_every_draw_of_a_batch_has_a_stream_of_its_own(tasks):
    a, b = tasks[:2]
    streams = [draw.stream for draw in draws([a, b, a, a, b])]
    assert len(set(streams)) == 5 and all(0 <= stream < 2**31 for stream in streams)
    assert streams[:2] == [zlib.crc32(task.uid.encode()) >> 1 for task in (a, b)]
    assert [draw.stream for draw in draws([b, b, a])] == [streams[1], streams[4], streams[0]]  # whatever else is there
    assert [draw.task for draw in draws([b, a])] == [b, a]


def test_a_slow_tool_does_not_hold_up_the_rows_that_could_go_on(parts, config, rollout, tasks, monkeypatch):
    """The first call does not return before rows that called after it have been answered and decode again."""
    calls, answered, go_on = [], [], threading.Event()
    call, append, decode = ToolEnvironment.step, Engine.append, Engine.step

    def slow(*args):
        calls.append(args)
        assert len(calls) > 1 or go_on.wait(60)
        return call(*args)

    monkeypatch.setattr(ToolEnvironment, "step", slow)
    monkeypatch.setattr(Engine, "append", lambda run, rows: (answered.extend(rows), append(run, rows))[1])
    monkeypatch.setattr(Engine, "step", lambda run: (go_on.set() if answered else None, decode(run))[1])
    patient = dataclasses.replace(config, tools=dataclasses.replace(config.tools, patience_s=0.2, timeout_s=50.0))
    again = Collector(parts.model, parts.processor, parts.tools, patient).collect(parts.params, tasks, group_size=4, seed=11)
    assert go_on.is_set() and not any(t.end == EndReason.FAULT for group in again.trajectories for t in group)
    for a, b in zip(sum(rollout.trajectories, []), sum(again.trajectories, []), strict=True):
        np.testing.assert_array_equal(a.ids, b.ids)


@pytest.mark.slow(10)
def test_neither_the_pace_of_decoding_nor_that_of_observing_changes_a_trajectory(parts, config, rollout, tasks, monkeypatch):
    """Three tokens decoded at a time, observations appended in pieces of eight, and a tower that trains."""
    steps, pieces, decode, observe = set(), set(), sampler.decode, sampler.observe
    monkeypatch.setattr(sampler, "decode", lambda *args: (steps.add(args[6]), decode(*args))[1])
    monkeypatch.setattr(sampler, "observe", lambda *args: (pieces.add(args[4].shape[1]), observe(*args))[1])
    pace = {"observation_tokens": 8, "decode_chunk": 3}
    other = changed(config, rollout=pace, model={"freeze_vision": False}, images={"pages": 1})
    again = Collector(parts.model, parts.processor, parts.tools, other).collect(parts.params, tasks, group_size=4, seed=11)
    assert steps == {0, 3} and pieces == {8}  # 0: where programs are compiled
    assert rollout.store.frozen and not again.store.frozen and len(again.store.pages.device) == 1 < len(again.store.pages)
    for a, b in zip(sum(rollout.trajectories, []), sum(again.trajectories, []), strict=True):
        for name in ("ids", "kind", "positions"):
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-4)
        assert a.end == b.end and a.answer == b.answer


@pytest.mark.slow(3)
def test_calls_run_on_as_many_workers_and_for_as_long_as_the_settings_say(parts, config, tasks):
    running, most, looks = [], [], set()

    def slow(crop, context, image, **rest):
        running.append(context)
        most.append(len(running))
        time.sleep(0.02 if limit == 10.0 else 1.0)
        running.remove(context)
        return crop(context, image=image, **rest)

    class Watched(ToolEnvironment):
        def view(self, entry, observed):
            looks.add((entry.parent is None, observed))
            return entry.image

    for workers, limit in ((1, 10.0), (8, 0.1)):
        settings = changed(config, tools={"workers": workers, "timeout_s": limit})
        engine = Collector(parts.model, parts.processor, tools_with(slow), settings, environment=Watched)
        most.clear()
        done = sum(engine.collect(parts.params, tasks, group_size=4, seed=11).trajectories, [])
        faults = [t.error for t in done if t.end == EndReason.FAULT]
        if workers == 1:
            assert max(most) == 1 and not faults
        else:
            assert max(most) > 2 and set(faults) == {"visual_confirmation ran longer than 0.1 s"}
        time.sleep(limit == 0.1)  # the last ones end
    assert looks >= {(True, False), (False, True)} and (False, False) not in looks  # a crop is an observation


def test_prompts_prepared_in_the_background_are_used_and_their_errors_come_with_the_rollout(
    parts, config, rollout, tasks, monkeypatch
):
    collector = Collector(parts.model, parts.processor, parts.tools, config)
    opened = collector.open_in_background(tasks)
    assert [future.result().prompt.ids.tolist() for future in opened] == [prompt.ids.tolist() for prompt in rollout.prompts]
    monkeypatch.setattr(collector, "open_task", lambda task: pytest.fail("opened twice"))
    again = collector.collect(parts.params, tasks, group_size=4, seed=11, opened=opened)
    assert [t.ids.tolist() for t in sum(again.trajectories, [])] == [t.ids.tolist() for t in sum(rollout.trajectories, [])]
    monkeypatch.undo()
    spoilt = dataclasses.replace(tasks[3], images=(b"none",))
    opened = collector.open_in_background([*tasks[:3], spoilt])
    with pytest.raises(ValueError, match=f"Task {spoilt.uid}: Image 1 cannot be used"):
        collector.collect(parts.params, [*tasks[:3], spoilt], group_size=4, seed=11, opened=opened)


def test_rollouts_that_are_told_to_stop_are_given_up(parts, config, tasks, monkeypatch):
    stop, steps, step = threading.Event(), [], Engine.step
    monkeypatch.setattr(Engine, "step", lambda run: (steps.append(1), stop.set() if len(steps) == 2 else None, step(run))[2])
    collector = Collector(parts.model, parts.processor, parts.tools, config, stop=stop)
    with pytest.raises(Stopped):
        collector.collect(parts.params, tasks, group_size=4, seed=11)
    assert len(steps) == 2


def test_a_batch_of_rollouts_says_what_it_took(parts, rollout, tasks):
    flat = sum(rollout.trajectories, [])
    assert [task is t for task, t in zip(rollout.tasks, tasks, strict=True)] == [True] * 4
    assert [(t.task.uid, t.rollout) for t in flat] == [(task.uid, g) for task in tasks for g in range(4)]
    assert rollout.sampled_tokens == sum((t.kind != TokenKind.OBSERVATION).sum() for t in flat)
    shown = sum(len(turn.call.images) for t in flat for turn in t.turns[:-1])  # the last turn's call shows nothing
    assert rollout.store.shown == sum(len(task.images) for task in tasks) + shown
    assert rollout.store.params is None and rollout.image_token_id == parts.processor.image_token_id
    phases = {"compile", "prepare", "vision", "prefill", "decode", "host", "tools", "observe"}
    assert rollout.times.keys() == phases and min(rollout.times.values()) >= 0
    for prompt, vision in zip(rollout.prompts, rollout.prompt_vision, strict=True):
        assert ((vision >= 0) == (prompt.ids == parts.processor.image_token_id)).all()


# ---- promise 2: only chosen tokens learn ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gradient(parts, config, rollout, batch):
    """The gradient of the text parameters with respect to a batch whose advantages are given per token."""
    tables = mask_tables(config.mask)
    text = {"text": parts.params["text"]}
    frozen = {"vision": parts.params["vision"]}
    from flax import nnx

    @jax.jit
    def compute(batch, shown):
        mask = two_level_mask(batch.kind, batch.end, batch.advantages, *tables[:2])
        normaliser = loss_normaliser(mask, cfg=config.grpo).sum()

        def loss(trained):
            return batch_loss(
                parts.model, LossSettings.of(config), trained, nnx.State(frozen), shown, batch, tables, normaliser, None, None
            )[0]

        return jax.grad(loss)(nnx.State(text))

    return lambda b: jax.tree.leaves(compute(b, shown_in(rollout.store, b)))


def same(a, b):
    return all(np.array_equal(np.asarray(x), np.asarray(y)) for x, y in zip(a, b, strict=True))


def test_a_dropped_trajectory_and_what_was_not_sampled_leave_every_gradient_bit_identical(gradient, batch):
    end = np.array(batch.end)
    end[1, 2] = EndReason.FAULT
    batch = dataclasses.replace(batch, end=end)
    reference = gradient(batch)
    advantages, logprobs = np.array(batch.advantages), np.array(batch.logprobs)
    advantages[1, 2] = -123.0 if advantages[1, 2] < 0 else 123.0
    logprobs[~sampled(batch)] = 7.5
    changed = dataclasses.replace(batch, advantages=advantages, logprobs=logprobs)
    assert same(reference, gradient(changed))


def test_every_kept_trajectory_changes_the_gradient(gradient, batch, config):
    reference = gradient(batch)
    action, trajectory, _ = mask_tables(config.mask)
    kept = np.asarray(two_level_mask(batch.kind, batch.end, batch.advantages, action, trajectory)).any(-1)
    assert kept.sum() >= 4
    for n, g in np.argwhere(kept)[:: kept.sum() // 4]:
        advantages = np.array(batch.advantages)
        advantages[n, g] *= 1.5
        assert not same(reference, gradient(dataclasses.replace(batch, advantages=advantages)))


# ---- promise 3: a group shares its prompt ---------------------------------------------------------------------------


def test_shared_prompts_equal_the_naive_forward(parts, rollout, batch):
    shared = trainer_logprobs(parts, batch, rollout.store)
    n, g, r = batch.kind.shape
    repeat = lambda x, axis=0: np.repeat(x, g, axis=axis)  # noqa: E731
    naive = dataclasses.replace(
        batch,
        prompt_ids=repeat(batch.prompt_ids), prompt_len=repeat(batch.prompt_len), prompt_vision=repeat(batch.prompt_vision),
        prompt_positions=repeat(batch.prompt_positions, 1), kind=batch.kind.reshape(n * g, 1, r),
        response_ids=batch.response_ids.reshape(n * g, 1, r), response_vision=batch.response_vision.reshape(n * g, 1, r),
        response_positions=batch.response_positions.reshape(3, n * g, 1, r),
        logprobs=batch.logprobs.reshape(n * g, 1, r), response_len=batch.response_len.reshape(n * g, 1),
    )  # fmt: skip
    difference = np.abs(trainer_logprobs(parts, naive, rollout.store).reshape(n, g, r) - shared)
    assert difference[sampled(batch)].max() <= 1e-5


def test_the_prompt_is_computed_once_whatever_the_size_of_the_group(parts, batch, rollout):
    """Operations of scoring 1 and 4 rollouts a group, 4 tokens each; and of admitting prompts for either."""

    def operations(g):
        part = dataclasses.replace(batch, **{
            field.name: getattr(batch, field.name)[..., :g, :4] for field in dataclasses.fields(batch)
            if field.name in ("kind", "logprobs") or field.name.startswith("response_") and field.name != "response_len"
        }, response_len=batch.response_len[:, :g])  # fmt: skip
        arguments = parts.model, parts.params, part, shown_in(rollout.store, part), 1.0
        return jax.jit(score, static_argnums=(0, 4)).lower(*arguments).cost_analysis()["flops"]

    longest = batch.prompt_ids.shape[1]
    assert operations(4) < operations(1) * (longest + 4 * 4) / longest * 1.1
    n, a, p = len(batch.prompt_len), np.zeros(2, np.int32), np.zeros((2, longest), np.int32)

    def admitting(g):
        state = sampler.empty(parts.model, n, g, longest, 64)
        drawn = a.astype(np.uint32), np.ones(2, np.float32)
        arguments = a, p, np.stack([p] * 3), p, a + 1, a, a, *drawn, rollout.store.show(p - 1)
        return sampler.admit.lower(parts.model, parts.params, state, *arguments).cost_analysis()["flops"]

    assert admitting(8) < admitting(1) * 1.01


@pytest.mark.slow(4)
def test_the_gradient_is_the_same_whatever_the_backward_pass_recomputes(parts, batch, rollout):
    counted = sampled(batch)[:2, :2]
    part = take_groups(batch, np.arange(2), batch.kind.shape[-1])
    shown, part = shown_in(rollout.store, part), jax.tree.map(jnp.asarray, part)

    @partial(jax.jit, static_argnums=0)
    def gradient(remat, params):
        def total(params):
            model = parts.model._replace(remat=remat)
            return jnp.where(counted, score(model, params, part, shown, 1.0)[0][:, :2], 0).sum()

        return jax.grad(total)(params)["text"]

    expected = gradient("none", parts.params)
    assert {"dots", "full", "offload"} == REMAT_POLICIES.keys() - {"none"}
    for remat in REMAT_POLICIES:
        for a, b in zip(*map(jax.tree.leaves, (gradient(remat, parts.params), expected)), strict=True):
            assert np.abs(a - b).max() <= 1e-5 * max(1, np.abs(b).max())


# ---- promise 4: static shapes ---------------------------------------------------------------------------------------


def test_nothing_compiles_after_the_first_rollouts(parts):
    tasks = [task_at(3, "train", i) for i in range(20)]
    for i in range(2):
        parts.collector.collect(parts.params, tasks[4 * i : 4 * i + 4], group_size=4, seed=i)
    counter = CompileCounter()
    for i in range(2, 5):
        parts.collector.collect(parts.params, tasks[4 * i : 4 * i + 4], group_size=4, seed=i)
    assert counter.count == 0


@pytest.mark.parametrize("slots", [1, 3])
@pytest.mark.slow(3)
def test_trajectories_do_not_depend_on_how_many_groups_are_in_progress(parts, rollout, tasks, slots, monkeypatch):
    """Tools of random delay besides: what a row samples belongs to its task, its number and its tokens."""
    busy, decode = [], Engine.step
    monkeypatch.setattr(Engine, "step", lambda run: (busy.append(len(run.busy)), decode(run))[1])
    delays, call = np.random.default_rng(slots), ToolEnvironment.step
    monkeypatch.setattr(ToolEnvironment, "step", lambda *args: (time.sleep(delays.uniform(0, 0.05)), call(*args))[1])
    again = parts.collector.collect(parts.params, tasks, group_size=4, seed=11, slots=slots)
    assert max(busy) == slots
    for a, b in zip(sum(rollout.trajectories, []), sum(again.trajectories, []), strict=True):
        assert a.task.uid == b.task.uid and a.rollout == b.rollout and a.end == b.end
        np.testing.assert_array_equal(a.ids, b.ids)
        np.testing.assert_array_equal(a.kind, b.kind)
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-4)


@pytest.mark.parametrize("level", ["token", "sequence", "constant"])
@pytest.mark.slow(3)
def test_groups_without_spread_are_left_out_and_change_nothing(parts, config, batch, rollout, level, monkeypatch):
    cfg = dataclasses.replace(config, grpo=dataclasses.replace(config.grpo, level=level))
    spread = np.array([True, False, False, True])
    flat = dataclasses.replace(batch, advantages=np.where(spread[:, None], batch.advantages, 0).astype(np.float32))
    ran, accumulate = [], learner.accumulate
    monkeypatch.setattr(learner, "accumulate", lambda *args: (ran.append(args[7].prompt_len.shape[0]), accumulate(*args))[1])

    def updated():
        trainer = learner.Learner(parts.model, cfg, optax.sgd(0.1), mask_tables(cfg.mask))
        trainer.warm = True
        ran.clear()
        params = jax.tree.map(jnp.copy, parts.params)
        return trainer.update(params, trainer.init(params), flat, rollout.store)[0], sum(ran)

    some, few = updated()
    monkeypatch.setattr(learner, "learning_groups", lambda batch, _: np.arange(4))
    whole, all_of_them = updated()
    assert (few, all_of_them) == (2, 4)
    moved = 0.0
    for a, b, before in zip(*map(jax.tree.leaves, (some, whole, parts.params)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-7)
        moved = max(moved, float(jnp.abs(a - before).max()))
    assert moved > 1e-4


# ---- promises 5 and 6 -----------------------------------------------------------------------------------------------


def test_a_missing_image_feature_is_an_error_that_names_the_task(rollout, parts):
    t = next(t for group in rollout.trajectories for t in group if (t.vision >= 0).any())
    broken = dataclasses.replace(t, vision=np.where(np.arange(len(t.vision)) == np.argmax(t.vision >= 0), -1, t.vision))
    with pytest.raises(ValueError, match=t.task.uid):
        check_images([broken], parts.processor.image_token_id)
    check_images([t], parts.processor.image_token_id)


@tool
def visual_confirmation(context, image: int, bbox_2d: list[float], label: str = "") -> list[int]:
    """Crop and enlarge.

    Args:
        image: image number
        bbox_2d: box
    """
    raise OSError("disk full")


def test_a_failing_tool_faults_its_trajectory_and_gives_no_gradient(parts, config, tasks, gradient):
    engine = Collector(parts.model, parts.processor, ToolSet([visual_confirmation]), config)
    out = engine.collect(parts.params, tasks, group_size=4, seed=11)
    ends = np.asarray([[t.end for t in group] for group in out.trajectories])
    assert (ends == EndReason.FAULT).sum() >= 3
    faulted = [t for group in out.trajectories for t in group if t.end == EndReason.FAULT]
    assert all("disk full" in t.error and t.faulted_calls == 1 for t in faulted)
    action, trajectory, counted = mask_tables(config.mask)
    assert not trajectory[EndReason.FAULT] and not counted[EndReason.FAULT]
    advantages = np.ones((4, 4), np.float32)
    packed = pack_batch(out, advantages, advantages, config.rollout.prompt_tokens, config.rollout.response_tokens)
    mask = np.asarray(two_level_mask(packed.kind, packed.end, packed.advantages, action, trajectory))
    assert not mask[ends == EndReason.FAULT].any() and mask[ends != EndReason.FAULT].any(-1).all()
