"""Guards: a bug planted in what a guard watches raises its warning and no other; a healthy run raises none.

Planted bugs go through the real code: rollouts of the shipped base, `train.judge`, the mask's shares and the loss.
"""

import copy
import json
import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import small_config
from scripted_run import play, scripts, tools_with

from imagent_jax import train as job
from imagent_jax.config import RewardConfig
from imagent_jax.rl import guards, rewards
from imagent_jax.rl.batch import pack_batch
from imagent_jax.rl.learner import score_jit, shown_in
from imagent_jax.rl.loss import finish_metrics, loss_normaliser, policy_loss
from imagent_jax.rl.mask import dropped_shares, mask_tables, two_level_mask
from imagent_jax.rl.rewards import reward_functions
from imagent_jax.rollout.collect import Collector
from imagent_jax.rollout.metrics import call_metrics
from imagent_jax.runs.reader import RunLog
from imagent_jax.runs.report import _warnings
from imagent_jax.tiny.world import task_at
from imagent_jax.types import CallResult, CallStatus, EndReason, TokenKind, Turn

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

    def rollout(engine=parts.collector):
        return engine.collect(parts.params, tasks, group_size=8, seed=5)

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
    paid, advantages, _, metrics, *_ = job.judge(cfg, rollout, reward_functions(cfg.reward))
    batch = pack_batch(rollout, paid, advantages, cfg.rollout.prompt_tokens, cfg.rollout.response_tokens)
    of_batch = partial(score_jit, parts.model, params or parts.params, batch, shown_in(rollout.store, batch))
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


@pytest.mark.slow(3)
def test_a_bonus_paid_without_an_executed_call(parts, cfg, roll, healthy, monkeypatch):
    monkeypatch.setitem(rewards.REWARDS, "tool_gain", lambda t: rewards.answer(t))
    assert warned(healthy, step(parts, cfg, roll())) == {"bonus_unearned"}


@pytest.mark.slow(3)
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


@pytest.mark.slow(3)
def test_calls_that_show_nothing_collect_the_bonus(parts, cfg, roll, healthy):
    rollout = roll()
    for t in (t for group in rollout.trajectories for t in group if not t.executed_calls):
        t.turns.insert(0, Turn(0, 0, "", CallResult(CallStatus.EXECUTED, "visual_reflection", {"images": [1]})))
    assert warned(healthy, step(parts, cfg, rollout)) == {"bonus_without_gain"}


@pytest.mark.parametrize("scale", [1000.0, 0.1])
@pytest.mark.slow(3)
def test_a_policy_whose_logits_run_away(parts, cfg, roll, healthy, scale):
    params = jax.tree.map(lambda x: x, parts.params)
    params["text"]["norm"] = params["text"]["norm"].replace(params["text"]["norm"][...] * scale)
    planted = step(parts, cfg, roll(), params=params)
    assert warned(healthy, planted) == {"entropy_away"}
    assert ("collapsed" in guards.entropy_away([healthy] * 10 + [planted] * 10)) == (scale > 1)


@pytest.mark.slow(4)
def test_a_sampler_at_another_temperature_than_the_trainer(parts, cfg, roll, healthy):
    assert warned(healthy, step(parts, cfg, roll(), temperature=3.0)) == {"clip_away"}


@pytest.mark.slow(3)
def test_a_policy_that_rambles(parts, cfg, roll, healthy):
    rollout = roll()
    for t in (t for group in rollout.trajectories for t in group):
        t.turns[-1].stop += 40
    assert warned(healthy, step(parts, cfg, rollout)) == {"length_growth"}


def same(t):
    return 1.0


@pytest.mark.slow(3)
def test_a_reward_that_is_the_same_for_all(parts, cfg, roll, healthy):
    paid = RewardConfig(answer=0, format=0, tool_gain=0, custom=(f"{__name__}:same",))
    assert warned(healthy, step(parts, replace(cfg, reward=paid), roll())) == {"groups_flat"}


@pytest.mark.slow(3)
def test_ends_that_are_taken_for_truncated(parts, cfg, roll, healthy):
    rollout = roll()
    for t in (t for group in rollout.trajectories for t in group if t.rollout % 4):
        t.end = EndReason.TRUNCATED
    planted = step(parts, cfg, rollout)
    assert warned(healthy, planted) == {"mostly_masked"}
    assert "truncated" in guards.mostly_masked([planted])


@pytest.mark.slow(5)
def test_boxes_read_in_another_space_than_the_policy_writes(parts, cfg, roll, healthy):
    """The policy writes 0 to 1000 and is taken to write pixels of images of about 60."""
    engine = Collector(parts.model, parts.processor, parts.tools, replace(cfg, tools=replace(cfg.tools, coordinates="absolute")))
    planted = step(parts, cfg, roll(engine))
    assert warned(healthy, planted) == {"calls_invalid", "mostly_masked"}  # the second is for what follows from the first
    assert "visual_confirmation" in guards.calls_invalid([planted]) and "truncated" in guards.mostly_masked([planted])


@pytest.mark.slow(3)
def test_a_tool_that_crashes_now_and_then(parts, cfg, roll, healthy):
    def crash(crop, context, image, **rest):
        if image == 3:
            raise OSError("the disk is full")
        return crop(context, image=image, **rest)

    engine = Collector(parts.model, parts.processor, tools_with(crash), cfg)
    planted = step(parts, cfg, roll(engine))
    assert 0 < planted["end/fault"] < 0.5 and warned(healthy, planted) == {"calls_faulted"}


def test_what_call_metrics_count(parts):
    """Groups where some call, where all do and where none does: of scripted rollouts."""
    cfg = small_config(tools={"max_turns": 3}, rollout={"prompt_tokens": 512, "response_tokens": 512})
    engine, task = Collector(parts.model, parts.processor, parts.tools, cfg), task_at(3, "train", 0)
    done = [play(engine, task, line, texts) for line, texts in enumerate(scripts(task))]
    lines = [[0, 1, 4, 5, 7], [0, 1, 2], [7, 5, 6]]  # right: 0, 2, 4, 7; with executed calls: 0, 1, 2, 4
    for turn in (turn for t in done for turn in t.turns if turn.call):
        turn.call.seconds = {"EXECUTED": 0.5, "INVALID": 3.0}.get(turn.call.status.name, 0.0)
        turn.call.seconds = 2.0 if turn.call.name == "visual_reflection" else turn.call.seconds
    found = call_metrics([[done[line] for line in group] for group in lines], parts.tools.names)
    calls = {
        "visual_confirmation/executed": 2 + 1 + 1 + 2 + 1 + 1, "visual_confirmation/invalid": 1, "visual_confirmation/faulted": 0,
        "visual_reflection/executed": 1, "visual_reflection/invalid": 0, "visual_reflection/faulted": 0, "unknown/invalid": 2,
    }  # fmt: skip
    chosen = [sum(turn.stop - turn.start for turn in done[line].turns) for group in lines for line in group]
    times = {"tools/time/visual_confirmation": (8 * 0.5 + 3.0) / 9, "tools/time/visual_reflection": 2.0}
    assert found == pytest.approx(
        {f"tools/calls/{name}": count / 11 for name, count in calls.items()}
        | {"tools/earned": 4 / 11, "length/sampled": np.mean(chosen), "tools/gain": 2 / 3 - 1 / 2}
        | times
    )
    assert chosen[0] == np.sum(done[0].kind != TokenKind.OBSERVATION) < len(done[0].ids)
    assert "tools/gain" not in call_metrics([[done[0], done[1]], [done[5]]], parts.tools.names)


# ---- where each warns, and where not yet ------------------------------------------------------------------------------


def made(**changed):
    """The metrics of a step; `__` stands for `/`."""
    plain = {
        "tools/used_rate": 0.5, "tools/gain": 0.2, "accuracy": 0.5, "entropy": 1.0, "clip/low": 0.0, "clip/high": 0.0,
        "groups/flat": 0.2, "mask/dropped_tokens": 0.1, "tools/calls/crop/executed": 1.0, "tools/calls/crop/invalid": 0.0,
        "tools/calls/crop/faulted": 0.0, "reward/tool_gain": 0.2, "tools/earned": 0.2, "length/sampled": 50.0,
    }  # fmt: skip
    return plain | {name.replace("__", "/"): value for name, value in changed.items()}


def history(*parts):
    """Steps: (count, changes), in order."""
    return [made(**changed) for count, changed in parts for _ in range(count)]


def warns(*parts) -> set[str]:
    return set(guards.watch(history(*parts)))


USED, GAIN, EARNED, RIGHT = "tools__used_rate", "tools__gain", "tools__earned", "accuracy"


@pytest.mark.parametrize(
    ("quiet", "loud"),
    [  # falls below half of the most
        ([(10, {USED: 0.8}), (10, {USED: 0.41})], [(10, {USED: 0.8}), (10, {USED: 0.39})]),
        ([(10, {USED: 0.8}), (9, {USED: 0.0})], [(10, {USED: 0.8}), (10, {USED: 0.0})]),  # twenty steps are needed
        ([(10, {USED: 0.098}), (10, {USED: 0.0})], [(10, {USED: 0.102}), (10, {USED: 0.0})]),  # and more than a few callers
        ([(10, {USED: 0.4}), (10, {USED: 0.3})], [(10, {USED: 0.4}), (10, {USED: 0.8}), (10, {USED: 0.3})]),  # of any ten steps
        ([(15, {USED: 0.4}), (5, {USED: 0.8}), (6, {USED: 0.22})], [(10, {USED: 0.4}), (5, {USED: 0.8}), (10, {USED: 0.22})]),
        # callers are more often right, in the last ten steps that can say so
        ([(10, {USED: 0.8}), (10, {USED: 0.1, GAIN: 0.049})], [(10, {USED: 0.8}), (10, {USED: 0.1, GAIN: 0.051})]),
        ([(10, {USED: 0.8, GAIN: 0.9}), (10, {USED: 0.1, GAIN: 0.0})],
         [(10, {USED: 0.8, GAIN: -0.9}), (10, {USED: 0.1, GAIN: 0.1})]),
        # calls in vain are calls
        ([(10, {USED: 0.8}), (10, {USED: 0.1, "tools__calls__crop__invalid": 0.31})],
         [(10, {USED: 0.8}), (10, {USED: 0.1, "tools__calls__crop__invalid": 0.29})]),
        ([(10, {USED: 0.8}), (10, {USED: 0.1, "tools__calls__unknown__invalid": 0.31})],
         [(10, {USED: 0.8, "tools__calls__crop__invalid": 0.5}), (10, {USED: 0.1, "tools__calls__crop__executed": 0.5})]),
    ],
)  # fmt: skip
def test_tools_are_given_up(quiet, loud):
    assert guards.tools_abandoned(history(*quiet)) is None and warns(*loud) == {"tools_abandoned"}


def test_tools_given_up_are_told_in_figures():
    said = guards.tools_abandoned(history((10, {USED: 0.8}), (10, {USED: 0.3, GAIN: 0.25})))
    assert said == ("Tools are being given up: 30 % of the rollouts call one, 80 % once did, though those with a call were 25 "
                    "points more often right than others of their group.")  # fmt: skip
    nobody = [{k: v for k, v in record.items() if k != "tools/gain"} for record in history((10, {USED: 0.0}))]
    early = history((10, {USED: 0.8}))
    assert guards.tools_abandoned(early + nobody) and guards.tools_abandoned(nobody * 2) is None
    assert guards.tools_abandoned([{**r, "tools/gain": 0.0} for r in early] + nobody) is None


@pytest.mark.parametrize(
    ("guard", "quiet", "loud", "words"),
    [
        ("bonus_unearned", [(1, {"reward__tool_gain": 0.2, EARNED: 0.2})], [(1, {"reward__tool_gain": 0.21, EARNED: 0.2})],
         "21 % of the rollouts got it, 20 % were right"),
        ("bonus_unearned", [(9, {"reward__tool_gain": 0.9}), (1, {})], [(9, {}), (1, {"reward__tool_gain": 0.9})], "90 %"),
        ("bonus_without_gain", [(10, {EARNED: 0.2}), (10, {EARNED: 0.299})], [(10, {EARNED: 0.2}), (10, {EARNED: 0.302})],
         "it went from 20 % to 30 % of the rollouts, right answers from 50 % to 50 %"),
        ("bonus_without_gain", [(10, {EARNED: 0.2}), (10, {EARNED: 0.4, RIGHT: 0.551})],
         [(10, {EARNED: 0.2}), (10, {EARNED: 0.4, RIGHT: 0.549})], "to 40 % of the rollouts, right answers from 50 % to 55 %"),
        ("bonus_without_gain", [(10, {EARNED: 0.2}), (9, {EARNED: 0.9})],
         [(10, {EARNED: 0.2}), (5, {}), (10, {EARNED: 0.4})], ""),
        ("entropy_away", [(10, {}), (10, {"entropy": 0.101})], [(10, {}), (10, {"entropy": 0.099})],
         "collapsed from 1 to 0.099 nats"),
        ("entropy_away", [(10, {}), (10, {"entropy": 0.05, RIGHT: 0.81})], [(10, {}), (10, {"entropy": 0.05, RIGHT: 0.79})], ""),
        ("entropy_away", [(10, {}), (10, {"entropy": 2.04})], [(10, {}), (10, {"entropy": 2.06})], "2.06 nats a token after 1 "),
        ("entropy_away", [(10, {}), (9, {"entropy": 9.0})],
         [(10, {}), (7, {"entropy": 0.1}), (10, {"entropy": 9.0})], "runs away"),
        ("clip_away", [(1, {"clip__low": 0.1, "clip__high": 0.09})],
         [(1, {"clip__low": 0.1, "clip__high": 0.11})], "21 % of the"),
        ("clip_away", [(5, {"clip__low": 1.0}), (10, {})], [(10, {}), (10, {"clip__low": 0.3})], "30 %"),
        ("length_growth", [(10, {}), (10, {"length__sampled": 74.0})], [(10, {}), (10, {"length__sampled": 76.0})],
         "from 50 to 76 sampled tokens, right answers from 50 % to 50 %"),
        ("length_growth", [(10, {}), (10, {"length__sampled": 99.0, RIGHT: 0.551})],
         [(10, {}), (10, {"length__sampled": 99.0, RIGHT: 0.549})], "from 50 to 99 sampled tokens, right answers .* to 55 %"),
        ("length_growth", [(10, {}), (9, {"length__sampled": 999.0})], [(10, {}), (5, {}), (10, {"length__sampled": 90.0})], ""),
        ("clip_away", [(9, {}), (1, {"clip__low": 1.9})], [(1, {"clip__low": 2.1}), (9, {})], "21 %"),  # all of the ten count
        ("length_growth", [(1, {"length__sampled": 10.0}), (9, {"length__sampled": 60.0}), (10, {"length__sampled": 82.0})],
         [(1, {"length__sampled": 100.0}), (9, {}), (10, {"length__sampled": 83.0})], "from 55 to 83"),
        ("groups_flat", [(10, {"groups__flat": 0.89})], [(10, {"groups__flat": 0.91})], "91 % of the groups"),
        ("groups_flat", [(9, {"groups__flat": 1.0})], [(5, {}), (10, {"groups__flat": 1.0})], "100 %"),
        ("mostly_masked", [(1, {"mask__dropped_tokens": 0.49})], [(1, {"mask__dropped_tokens": 0.51})], "51 % .*for: unknown"),
        ("mostly_masked", [(3, {"mask__dropped_tokens": 1.0}), (10, {})],
         [(10, {"mask__dropped_tokens": 0.6, "mask__dropped_tokens__void": 0.2, "mask__dropped_tokens__over_turns": 0.4,
                "mask__dropped_trajectories__truncated": 0.9})], "60 % .*for: over turns"),
        ("calls_invalid", [(1, {"tools__calls__crop__invalid": 0.99})], [(1, {"tools__calls__crop__invalid": 1.01})],
         "50 % of the calls of crop are refused as invalid"),
        ("calls_invalid", [(1, {"tools__calls__crop__invalid": 0.009, "tools__calls__crop__executed": 0.0})],
         [(1, {"tools__calls__crop__invalid": 0.011, "tools__calls__crop__executed": 0.0})], "100 % of"),
        ("calls_invalid", [(1, {"tools__calls__unknown__invalid": 5.0})],
         [(1, {"tools__calls__crop__invalid": 3.0, "tools__calls__view__invalid": 4.0, "tools__calls__view__executed": 1.0})],
         "75 % of the calls of crop and 80 % of the calls of view are refused"),
        ("calls_invalid", [(5, {"tools__calls__crop__invalid": 9.0}), (10, {})],
         [(10, {}), (10, {"tools__calls__crop__invalid": 3.0, "tools__calls__crop__faulted": 0.001})], "75 %"),
        ("calls_faulted", [(1, {"tools__calls__crop__faulted": 0.0203, "tools__calls__crop__invalid": 0.01})],
         [(1, {"tools__calls__crop__faulted": 0.0205})], "2 % of the calls of crop end with an environment error"),
        ("rewards_abstain", [(9, {"reward__mine:it__abstained": 1.0}), (1, {"reward__mine:it__abstained": 0.9})],
         [(5, {}), (10, {"reward__mine:it__abstained": 1.0})],
         "^The reward mine:it abstains for every rollout and is no part of the sum.$"),
        ("rewards_abstain", [(9, {"rewards__unpaid": 1.0}), (10, {})],
         [(9, {}), (1, {"rewards__unpaid": 0.5})], "^Every reward with a weight abstains for 5 % of the rollouts, which"),
        ("rewards_failed", [(1, {"rewards__failed": 0.02})], [(5, {}), (5, {"rewards__failed": 0.1})],
         "fails for 5 % of the rollouts"),
    ],
)  # fmt: skip
def test_a_guard_warns_beyond_its_limit_and_not_before(guard, quiet, loud, words):
    assert guard not in warns(*quiet) and warns(*loud) == {guard}
    assert re.search(words, guards.watch(history(*loud))[guard])


def test_refused_calls_are_the_cause_where_most_is_masked():
    masked = {"mask__dropped_tokens": 0.9, "mask__dropped_tokens__invalid_call": 0.6, "mask__dropped_tokens__fault": 0.3}
    invalid = {"tools__calls__crop__invalid": 3.0} | masked
    assert warns((10, invalid)) == {"calls_invalid"} and warns((10, masked)) == {"mostly_masked"}
    assert warns((10, invalid | {"clip__low": 0.9})) == {"calls_invalid", "clip_away"}
    assert (
        guards.watch([]) == {}
        and list(guards.GUARDS) == [g.__name__ for g in guards.GUARDS.values()]
        and len(guards.GUARDS) == 12
    )


@pytest.mark.parametrize("cause", [{"rewards__failed": 0.5}, {"rewards__unpaid": 0.5}, {"tools__calls__crop__faulted": 1.0}])
def test_a_warning_hides_another_only_where_both_name_the_same_cause(cause):
    faults = {"mask__dropped_tokens": 0.9, "mask__dropped_tokens__invalid_call": 0.3, "mask__dropped_tokens__fault": 0.6}
    (name,) = warns((10, cause))
    assert warns((10, cause | faults)) == {name}
    invalid = {"tools__calls__crop__invalid": 9.0}
    assert warns((10, invalid | faults)) == {"calls_invalid", "mostly_masked"}
    assert warns((10, cause | {"mask__dropped_tokens": 0.9, "mask__dropped_tokens__void": 0.9})) == {name, "mostly_masked"}


def test_a_control_that_changes_nothing_is_told_of():
    def said(won, lost, both=10):
        true = np.asarray([True] * (won + both) + [False] * lost)
        control = np.asarray([False] * won + [True] * (both + lost))
        return guards.looks_unused(true, control, "black images")

    assert said(5, 0) is None and said(4, 0) and said(13, 4) is None and said(12, 4) and said(0, 30) and said(0, 0)
    assert said(4, 2, 4) == (
        "Accuracy does not drop under a control: 60 % with black images, 80 % without (4 tasks are right only without the "
        "control, 2 only with it)."
    )


def test_the_report_says_that_no_guard_has_warned():
    def run(*steps):
        metrics = [{"step": i, "reward/total": 1.0} | step for i, step in enumerate(steps)]
        return RunLog(Path("."), {}, metrics, {}, [], 0)

    assert "has warned" in _warnings(run({}, {}))
    page = _warnings(run({}, {"warnings": {"clip_away": "30 % <b>"}}, {"warnings": {"clip_away": "40 %"}}))
    assert "2 step(s) from 1 to 2: 40 %" in page and "<b>clip_away</b>" in page
