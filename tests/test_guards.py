"""Guards: a bug planted in what a guard watches raises its warning and no other; a healthy run raises none.

Planted bugs go through the real code: rollouts of the shipped base, `train.judge`, the mask's shares and the loss.
"""

import copy
import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import small_config
from scripted_run import tools_with

from imagent_jax import train as job
from imagent_jax.config import RewardConfig
from imagent_jax.data.tiny_world import task_at
from imagent_jax.report import _warnings
from imagent_jax.rl import guards, rewards
from imagent_jax.rl.batch import pack_batch
from imagent_jax.rl.learner import score_jit
from imagent_jax.rl.loss import finish_metrics, loss_normaliser, policy_loss
from imagent_jax.rl.mask import dropped_shares, mask_tables, two_level_mask
from imagent_jax.rl.rollout import RolloutEngine
from imagent_jax.rl.trajectory import EndReason, Turn
from imagent_jax.run_log import RunLog
from imagent_jax.tools import CallResult, CallStatus

HEALTHY = Path(__file__).parent / "healthy_metrics.jsonl"
"""What guards read of the 60 steps of `python -m imagent_jax.train --run.steps 60 --eval.tasks 128 --eval.every 0`."""
SETTINGS = {"rollout": {"groups": 8, "group_size": 8}, "grpo": {"micro_groups": 8}}


@pytest.fixture(scope="module")
def cfg():
    return small_config(**SETTINGS)


@pytest.fixture(scope="module")
def roll(parts, cfg):
    """8 tasks x 8 rollouts of an engine (default: the shipped base's), copied so that a test may spoil them."""
    tasks = [task_at(3, "train", i) for i in range(8)]

    def rollout(engine=parts.engine):
        return engine.rollout(parts.params, tasks, group_size=8, seed=5)

    plain = rollout()
    return lambda engine=None: rollout(engine) if engine else replace(plain, trajectories=[
        [replace(t, turns=list(map(copy.copy, t.turns))) for t in group] for group in plain.trajectories
    ])  # fmt: skip


def step(parts, cfg, rollout, temperature=1.0, params=None):
    """The metrics of a training step on a rollout, less the update.

    Args:
        temperature: at which the sampler says its tokens were sampled; the trainer takes 1.
        params: of the policy, which sampled the tokens too.
    """
    paid, advantages, _, metrics = job.judge(cfg, rollout)
    batch = pack_batch(rollout, paid, advantages, cfg.rollout.prompt_tokens, cfg.rollout.response_tokens)
    of_batch = partial(score_jit, parts.model, params or parts.params, batch, rollout.store.features)
    logprobs, entropy = of_batch(temperature=1.0)
    action, trajectory, _ = mask_tables(cfg.mask)
    mask = two_level_mask(batch.kind, batch.end, advantages, action, trajectory)
    old = of_batch(temperature=temperature)[0]
    _, learned = policy_loss(logprobs, old, jnp.asarray(advantages), mask, cfg=cfg.grpo, entropy=entropy,
                             normaliser=loss_normaliser(mask, cfg=cfg.grpo).sum())  # fmt: skip
    learned = {k: float(v) for k, v in finish_metrics(jax.device_get(learned)).items()}
    return metrics | learned | dropped_shares(batch, cfg.mask)


@pytest.fixture(scope="module")
def healthy(parts, cfg, roll):
    """The metrics of a step of the shipped base."""
    return step(parts, cfg, roll())


def warned(healthy, planted):
    """The guards that warn after ten healthy steps and ten with the bug."""
    assert guards.watch([healthy] * 20) == {}
    return set(guards.watch([healthy] * guards.WINDOW + [planted] * guards.WINDOW))


def logged():
    return [json.loads(line) for line in HEALTHY.read_text().splitlines()]


def test_a_healthy_run_raises_no_warning_at_any_step():
    steps = logged()
    assert len(steps) >= 3 * guards.WINDOW and np.mean([r["tools/used_rate"] for r in steps]) > 0.5
    assert all(guards.watch(steps[:n]) == {} for n in range(len(steps) + 1))


def test_a_bonus_paid_without_an_executed_call(parts, cfg, roll, healthy, monkeypatch):
    monkeypatch.setitem(rewards.REWARDS, "tool_gain", lambda t: rewards.answer(t))
    assert warned(healthy, step(parts, cfg, roll())) == {"bonus_unearned"}


def test_a_policy_pushed_to_never_call(parts, cfg, roll):
    """After 30 steps of the logged run its calls are gone, and what they had found out with them: it guesses."""
    rollout = roll()
    for t in (t for group in rollout.trajectories for t in group if t.executed_calls):
        for turn in t.turns:
            turn.call = None
        t.answer, t.end = "a guess", EndReason.ANSWERED
    planted = [step(parts, cfg, rollout)] * guards.WINDOW
    assert set(guards.watch(logged()[:30] + planted)) == {"tools_abandoned"}
    useless = [record | {"tools/gain": 0.0} for record in logged()[:30]]  # giving up what does not help is no fault
    assert guards.watch(useless + planted) == {}


def test_calls_that_show_nothing_collect_the_bonus(parts, cfg, roll, healthy):
    rollout = roll()
    for t in (t for group in rollout.trajectories for t in group if not t.executed_calls):
        t.turns.insert(0, Turn(0, 0, "", CallResult(CallStatus.EXECUTED, "visual_reflection", {"images": [1]})))
    assert warned(healthy, step(parts, cfg, rollout)) == {"bonus_without_gain"}


@pytest.mark.parametrize("scale", [1000.0, 0.1])
def test_a_policy_whose_logits_run_away(parts, cfg, roll, healthy, scale):
    params = jax.tree.map(lambda x: x, parts.params)
    params["text"]["norm"] = params["text"]["norm"].replace(params["text"]["norm"][...] * scale)
    planted = step(parts, cfg, roll(), params=params)
    assert warned(healthy, planted) == {"entropy_away"}
    assert ("collapsed" in guards.entropy_away([healthy] * 10 + [planted] * 10)) == (scale > 1)


def test_a_sampler_at_another_temperature_than_the_trainer(parts, cfg, roll, healthy):
    assert warned(healthy, step(parts, cfg, roll(), temperature=3.0)) == {"clip_away"}


def test_a_policy_that_rambles(parts, cfg, roll, healthy):
    rollout = roll()
    for t in (t for group in rollout.trajectories for t in group):
        t.turns[-1].stop += 40
    assert warned(healthy, step(parts, cfg, rollout)) == {"length_growth"}


def same(t):
    return 1.0


def test_a_reward_that_is_the_same_for_all(parts, cfg, roll, healthy):
    paid = RewardConfig(answer=0, format=0, tool_gain=0, custom=(f"{__name__}:same",))
    assert warned(healthy, step(parts, replace(cfg, reward=paid), roll())) == {"groups_flat"}


def test_ends_that_are_taken_for_truncated(parts, cfg, roll, healthy):
    rollout = roll()
    for t in (t for group in rollout.trajectories for t in group if t.rollout % 4):
        t.end = EndReason.TRUNCATED
    planted = step(parts, cfg, rollout)
    assert warned(healthy, planted) == {"mostly_masked"}
    assert "truncated" in guards.mostly_masked([planted])


def test_boxes_read_in_another_space_than_the_policy_writes(parts, cfg, roll, healthy):
    """The policy writes 0 to 1000 and is taken to write pixels of images of about 60."""
    engine = copy.copy(parts.engine)
    engine.settings = replace(engine.settings, coordinates="absolute")
    planted = step(parts, cfg, roll(engine))
    assert warned(healthy, planted) == {"calls_invalid"}
    assert "visual_confirmation" in guards.calls_invalid([planted])


def test_a_tool_that_crashes_now_and_then(parts, cfg, roll, healthy):
    def crash(crop, context, image, **rest):
        if image == 3:
            raise OSError("the disk is full")
        return crop(context, image=image, **rest)

    engine = RolloutEngine(parts.model, parts.processor, parts.tools, cfg)
    engine.tools = tools_with(crash)
    planted = step(parts, cfg, roll(engine))
    assert 0 < planted["end/fault"] < 0.5 and warned(healthy, planted) == {"calls_faulted"}


def test_what_call_metrics_count(parts, cfg, roll):
    rollout = roll()
    flat = [t for group in rollout.trajectories for t in group]
    found = guards.call_metrics(rollout.trajectories, cfg.tools.names)
    calls = sum(v for k, v in found.items() if k.startswith("tools/calls/"))
    assert calls * len(flat) == pytest.approx(sum(turn.call is not None for t in flat for turn in t.turns))
    assert found["tools/calls/visual_confirmation/executed"] > 0.5
    right = [[rewards.answer(t) for t in group] for group in rollout.trajectories]
    used = [[t.executed_calls > 0 for t in group] for group in rollout.trajectories]
    gains = [np.average(r, weights=u) - np.average(r, weights=np.logical_not(u))
             for r, u in zip(right, used, strict=True) if 0 < sum(u) < len(u)]  # fmt: skip
    assert found["tools/gain"] == pytest.approx(np.mean(gains)) and gains
    assert found["length/sampled"] == pytest.approx(np.mean([np.sum(t.logprobs != 0) for t in flat]), abs=1)


def test_a_run_prints_a_new_warning_once_and_keeps_it(tmp_path, capsys, monkeypatch):
    flags = ["--run.compile_cache=", "--rollout.groups=4", "--rollout.group_size=4", "--grpo.micro_groups=2", "--grpo.widths=1",
             "--grpo.minibatches=1", "--eval.tasks=4", "--eval.groups=4", "--eval.every=0", "--data.train_size=64",
             "--data.test_size=32", f"--run.dir={tmp_path}", f"--data.cache_dir={tmp_path}/data"]  # fmt: skip
    paid = lambda history: "Too much was paid." if len(history) > 1 else None  # noqa: E731
    monkeypatch.setitem(guards.GUARDS, "bonus_unearned", paid)
    assert job.main([*flags, "--run.name=warned", "--run.steps=3"]) == 0
    out = capsys.readouterr().out
    assert out.count("warning (bonus_unearned): Too much was paid.") == 1
    records = [json.loads(line) for line in (tmp_path / "warned" / "metrics.jsonl").read_text().splitlines()]
    steps = [r for r in records if "reward/total" in r]
    assert ["bonus_unearned" in r.get("warnings", {}) for r in steps] == [False, True, True]
    assert "2 step(s) from 2 to 3: Too much was paid." in (tmp_path / "warned" / "report.html").read_text()


def test_the_report_says_that_no_guard_has_warned():
    def run(*steps):
        metrics = [{"step": i, "reward/total": 1.0} | step for i, step in enumerate(steps)]
        return RunLog(Path("."), {}, metrics, {}, [], 0)

    assert "has warned" in _warnings(run({}, {}))
    page = _warnings(run({}, {"warnings": {"clip_away": "30 % <b>"}}, {"warnings": {"clip_away": "40 %"}}))
    assert "2 step(s) from 1 to 2: 40 %" in page and "<b>clip_away</b>" in page
