"""`judge`: rewards, advantages, ends and metrics of hand-made groups under settings other than the defaults."""

import dataclasses
import sys
from types import ModuleType

import numpy as np
import pytest
from conftest import small_config
from scripted_run import finished, play, scripts
from test_prefetch import Batch

from imagent_jax.model.features import EncodedImages
from imagent_jax.rl.judge import UNPAID, judge
from imagent_jax.rl.rewards import reward_functions
from imagent_jax.rollout.batch import RolloutBatch
from imagent_jax.rollout.collect import Collector
from imagent_jax.rollout.metrics import call_metrics, summarise
from imagent_jax.tiny.world import task_at
from imagent_jax.types import CallResult, CallStatus, EndReason, Task

A, B = Task("a", "?", (), "7", "number", "count"), Task("b", "?", (), "red", "exact", "colour")
CROP = CallResult(CallStatus.EXECUTED, "visual_confirmation", {})
REFLECT = CallResult(CallStatus.EXECUTED, "visual_reflection", {})
FAILED = CallResult(CallStatus.FAULT, "visual_confirmation", {})
DISK = "OSError: the disk is full"
REFUSED = CallResult(CallStatus.INVALID, "visual_confirmation", {})
CALL, VOID = "<tool_call>{}</tool_call>", "I do not know.<|im_end|>"
REWARD = {"answer": 2.0, "format": 0.5, "tool_gain": 0.25, "custom": ["my_rewards:picky"]}
TOTALS = [[2.5, 0.625, 0.0, 0.375], [2.75, 0.125, 2.25, 0.875]]
"""By hand: 2 answer + 0.5 format + 0.25 tool gain + an eighth of the rollout's number; rollout 2 of A faults."""


def said(answer):
    return f"<answer>{answer}</answer><|im_end|>"


def faulted(rollout):
    """A rollout of task B that ended when its tool failed."""
    t = finished(B, [CALL], None, EndReason.FAULT, rollout=rollout, calls=[FAILED])
    t.error = f"Traceback ...\n{DISK}\n"
    return t


def judged(cfg, rolled):
    """`judge` with the rewards of a configuration: all but the faults."""
    return judge(cfg, rolled, reward_functions(cfg.reward))[:4]


@pytest.fixture
def rolled(monkeypatch):
    """A batch of two groups of four, and a reward of one's own that raises for rollout 2 of task A."""
    module = ModuleType("my_rewards")

    def picky(t):
        if (t.task.uid, t.rollout) == ("a", 2):
            raise OSError("the judge is away")
        return t.rollout / 8

    module.picky = picky
    monkeypatch.setitem(sys.modules, "my_rewards", module)
    groups = [
        [
            finished(A, [said(7)], "7"),
            finished(A, [said(8)], "8", rollout=1),
            finished(A, [said(7)], "7", rollout=2),
            finished(A, [VOID], None, EndReason.VOID, rollout=3),
        ],
        [
            finished(B, [CALL, said("red")], "red", calls=[CROP]),
            finished(B, ["Red"], None, EndReason.TRUNCATED, rollout=1),
            finished(B, [CALL, said("red")], "red", calls=[REFUSED], rollout=2),
            finished(B, [CALL, said("blue")], "blue", calls=[REFLECT], rollout=3),
        ],
    ]
    store = EncodedImages.__new__(EncodedImages)  # no images
    return RolloutBatch([A, B], [], [], groups, store, {}, 0, 0, tools=("visual_confirmation",))


def settings(**sections):
    return small_config(reward=REWARD, tools={"names": ["visual_confirmation"]}, **sections)


def test_a_rollout_whose_reward_fails_faults_and_leaves_the_others_as_without_it(rolled):
    rewards, advantages, parts, _ = judged(settings(), rolled)
    np.testing.assert_array_equal(rewards, np.float32(TOTALS))
    ends = [[t.end for t in group] for group in rolled.trajectories]
    assert ends[0] == [EndReason.ANSWERED, EndReason.ANSWERED, EndReason.FAULT, EndReason.VOID]
    assert ends[1] == [EndReason.ANSWERED, EndReason.TRUNCATED, EndReason.ANSWERED, EndReason.ANSWERED]
    assert "the judge is away" in rolled.trajectories[0][2].error
    assert [t.error for group in rolled.trajectories for t in group].count(None) == 7
    three = np.delete(TOTALS[0], 2)
    np.testing.assert_allclose(np.delete(advantages[0], 2), (three - three.mean()) / three.std(), rtol=1e-6)
    assert advantages[0, 2] == 0 and advantages.shape == (2, 4) and advantages.dtype == rewards.dtype == np.float32
    np.testing.assert_allclose(advantages[1], (TOTALS[1] - np.mean(TOTALS[1])) / np.std(TOTALS[1]), rtol=1e-6)
    zero = {"answer": 0.0, "format": 0.0, "tool_gain": 0.0, "my_rewards:picky": 0.0, "total": 0.0}
    assert parts[0][2] == zero and parts[0][3] == zero | {"my_rewards:picky": 0.375, "total": 0.375}
    assert parts[1][0] == {"answer": 1.0, "format": 1.0, "tool_gain": 1.0, "my_rewards:picky": 0.0, "total": 2.75}
    assert parts[1][2] == {"answer": 1.0, "format": 0.0, "tool_gain": 0.0, "my_rewards:picky": 0.25, "total": 2.25}


def test_without_the_deviation_advantages_are_rewards_less_their_mean(rolled):
    _, advantages, _, metrics = judged(settings(grpo={"normalise_std": False}), rolled)
    np.testing.assert_allclose(advantages[1], TOTALS[1] - np.mean(TOTALS[1]), rtol=1e-6)
    three = np.delete(TOTALS[0], 2)
    np.testing.assert_allclose(advantages[0], [*(three - three.mean())[:2], 0, three[2] - three.mean()], rtol=1e-6)
    assert metrics["groups/std"] == pytest.approx((three.std() + np.std(TOTALS[1])) / 2)


@pytest.mark.parametrize("name, group, counted", [("truncated", 1, [0, 2, 3]), ("void", 0, [0, 1])])
def test_an_end_that_does_not_count_is_compared_with_those_that_do(rolled, name, group, counted):
    _, whole, _, _ = judged(settings(), rolled)
    _, advantages, _, _ = judged(settings(mask={f"count_{name}": False}), rolled)
    totals = np.asarray(TOTALS[group])
    expected = np.clip((totals - totals[counted].mean()) / totals[counted].std(), -np.sqrt(3), np.sqrt(3))
    faulted = np.asarray([t.end == EndReason.FAULT for t in rolled.trajectories[group]])
    np.testing.assert_allclose(advantages[group], np.where(faulted, 0, expected), rtol=1e-6)
    np.testing.assert_array_equal(advantages[1 - group], whole[1 - group])


def test_every_metric_of_a_judged_batch(rolled):
    metrics = judged(settings(), rolled)[3]
    flat = [t for group in rolled.trajectories for t in group]
    deviations = [np.std(np.delete(TOTALS[0], 2)), np.std(TOTALS[1])]
    own = {
        "reward/answer": 3 / 8, "reward/format": 4 / 8, "reward/tool_gain": 1 / 8, "reward/total": np.mean(TOTALS),
        "reward/my_rewards:picky": (1 + 3 + 0 + 1 + 2 + 3) / 64, "groups/flat": 0.0, "groups/std": np.mean(deviations),
        "rewards/failed": 1 / 8, "rewards/unpaid": 0.0, "reward/my_rewards:picky/abstained": 0.0,
    }  # fmt: skip
    use = {"tools/calls/visual_confirmation/executed": 1 / 8, "tools/calls/visual_confirmation/invalid": 1 / 8,
           "tools/calls/visual_confirmation/faulted": 0.0, "tools/calls/unknown/invalid": 0.0, "tools/earned": 1 / 8,
           "length/sampled": (5 * 2 + 3 * 4) / 8, "tools/gain": 0.5 - 0.5, "tools/time/visual_confirmation": 0.0}  # fmt: skip
    assert call_metrics(rolled.trajectories, ["visual_confirmation"]) == pytest.approx(use)
    assert metrics == pytest.approx(own | use | summarise(flat))
    assert metrics["end/fault"] == 1 / 8 and metrics["end/answered"] == 5 / 8 and metrics["accuracy"] == 4 / 8


def test_a_reward_that_abstains_is_left_out_of_sums_and_means(rolled):
    picky = sys.modules["my_rewards"].picky
    sys.modules["my_rewards"].picky = lambda t: None if t.task is B and t.rollout in (1, 2) else picky(t)
    rewards, advantages, parts, metrics = judged(settings(), rolled)
    totals = np.float32([TOTALS[0], [2.75, 0.0, 2.0, 0.875]])
    np.testing.assert_array_equal(rewards, totals)
    np.testing.assert_allclose(advantages[1], (totals[1] - totals[1].mean()) / totals[1].std(), rtol=1e-6)
    assert "my_rewards:picky" not in parts[1][1] and parts[1][1]["total"] == 0.0
    assert metrics["reward/my_rewards:picky"] == pytest.approx((0 + 1 + 0 + 3 + 0 + 3) / 8 / 6)
    assert metrics["reward/my_rewards:picky/abstained"] == 2 / 8 and metrics["rewards/unpaid"] == 0.0


def test_a_rollout_for_which_all_abstain_neither_trains_nor_counts(rolled):
    sys.modules["my_rewards"].picky = lambda t: None if (t.task.uid, t.rollout) == ("a", 1) else t.rollout / 8
    cfg = settings()
    cfg = dataclasses.replace(cfg, reward=dataclasses.replace(cfg.reward, answer=0.0, format=0.0, tool_gain=0.0))
    found = judge(cfg, rolled, reward_functions(cfg.reward))
    t, (first, _) = rolled.trajectories[0][1], found.advantages
    assert t.end == EndReason.FAULT and t.error == UNPAID and found.faults == {"rewards": "every reward with a weight abstained"}
    counted = np.asarray([0, 2, 3]) / 8
    np.testing.assert_allclose(np.delete(first, 1), (counted - counted.mean()) / counted.std(), rtol=1e-6)
    assert first[1] == 0 and found.metrics["rewards/unpaid"] == 1 / 8 and found.metrics["rewards/failed"] == 0.0
    assert found.parts[0][1] == {"answer": 0.0, "format": 1.0, "tool_gain": 0.0, "total": 0.0}


def test_a_batch_for_which_all_abstain_stops(rolled):
    sys.modules["my_rewards"].picky = lambda t: None
    cfg = settings()
    cfg = dataclasses.replace(cfg, reward=dataclasses.replace(cfg.reward, answer=0.0, format=0.0, tool_gain=0.0))
    with pytest.raises(ValueError, match="8 of them on rewards: every reward with a weight abstained"):
        judge(cfg, rolled, reward_functions(cfg.reward))


def test_a_group_without_spread_is_flat(rolled):
    rolled.trajectories[1] = [finished(B, [said("red")], "red") for _ in range(4)]
    _, advantages, _, metrics = judged(settings(), rolled)
    assert metrics["groups/flat"] == 0.5 and not advantages[1].any() and advantages[0].any()


def test_what_failed_is_named_with_its_error(rolled):
    rolled.trajectories[1][1] = faulted(1)
    found = judge(settings(), rolled, reward_functions(settings().reward))
    error, place = found.faults.pop("reward my_rewards:picky").rsplit(" (", 1)
    assert error == "OSError: the judge is away" and place.startswith("test_judge.py, line ")
    assert found.faults == {"tool visual_confirmation": DISK} and found.metrics["rewards/failed"] == 1 / 8


def test_a_batch_of_nothing_but_faults_stops_with_the_most_frequent_cause(rolled):
    sys.modules["my_rewards"].picky = lambda t: t.anwser if t.task is B or t.rollout else t.task.missing
    words = (
        r"^All 8 rollouts of this step failed on an environment error and nothing can train; 7 of them on reward "
        r"my_rewards:picky: AttributeError: 'Trajectory' object has no attribute 'anwser'.* \(test_judge.py, line \d+\)\. "
        "Mend it, then start again"
    )
    with pytest.raises(ValueError, match=words):
        judged(settings(), rolled)
    sys.modules["my_rewards"].picky = sys.exit
    with pytest.raises(ValueError, match="on reward my_rewards:picky: SystemExit"):
        judged(settings(), rolled)


def test_tools_that_always_fail_stop_it_too(rolled):
    rolled.trajectories[:] = [[faulted(i) for i in range(4)] for _ in range(2)]
    with pytest.raises(
        ValueError, match="All 8 rollouts .* 8 of them on tool visual_confirmation: OSError: the disk is full. Mend"
    ):
        judged(settings(), rolled)


def fails_or_pays(t):
    """A reward that fails where nothing is known."""
    return {"I do not know.<|im_end|>": float("nan")}.get(t.turns[-1].text, 0.25 * t.rollout)


@pytest.mark.slow(2)
@pytest.mark.parametrize("normalise_std", [True, False])
def test_judged_rewards_count_by_how_trajectories_ended(parts, normalise_std):
    cfg = small_config(
        tools={"max_turns": 3}, rollout={"prompt_tokens": 512, "response_tokens": 512},
        mask={"count_repeated": False, "drop_repeated": False},
        reward={"answer": 3.0, "custom": [f"{__name__}:fails_or_pays"]}, grpo={"normalise_std": normalise_std},
    )  # fmt: skip
    engine = Collector(parts.model, parts.processor, parts.tools, cfg)
    tasks = [task_at(3, "train", i) for i in range(2)]
    groups = [[play(engine, task, g, texts) for g, texts in enumerate(scripts(task)[:7])] for task in tasks]
    assert groups[0][6].end == EndReason.VOID
    rewards, advantages, scored, metrics, *_ = judge(
        cfg, Batch(trajectories=groups, replaced=[], grades=[], tools=cfg.tools.names), reward_functions(cfg.reward)
    )
    right = [True, False, True, True, True, False, False]
    for group, paid, gained, scores in zip(groups, rewards, advantages, scored, strict=True):
        assert (
            group[6].end == EndReason.FAULT and "must be a finite number" in group[6].error and group[3].end == EndReason.REPEATED
        )
        assert [s["answer"] for s in scores] == [
            float(ok and t.end == EndReason.ANSWERED) for ok, t in zip(right, group, strict=True)
        ]
        assert paid.dtype == np.float32 and paid.tolist() == pytest.approx([s["total"] for s in scores]) and paid[6] == 0
        assert paid[0] == pytest.approx(3 + 0.1 + 0.2) and paid[1] == pytest.approx(0.1 + 0.25)
        counted = paid[[0, 1, 2, 4, 5]]
        wanted = (paid - counted.mean()) / (counted.std() if normalise_std else 1)
        assert gained[:6] == pytest.approx(wanted[:6], rel=1e-5) and gained[6] == 0
    flat = [s for scores in scored for s in scores]
    for name in ("answer", "format", "tool_gain", "total", f"{__name__}:fails_or_pays"):
        assert metrics[f"reward/{name}"] == pytest.approx(np.mean([s[name] for s in flat]))
    assert metrics["end/fault"] == pytest.approx(1 / 7) and "fault" not in flat[6] and metrics["groups/flat"] == 0
    assert metrics["tools/calls/visual_reflection/executed"] == pytest.approx(1 / 7)
