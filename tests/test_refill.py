"""Refill: groups without spread are replaced by fresh ones; the batch is a function of what was sampled, whatever tools do."""

import dataclasses
import json
import random
import signal
import threading
import time

import jax
import numpy as np
import pytest
from conftest import small_config
from test_prefetch import Recorder, uids
from test_train import assert_equal
from watched_run import Watched

from imagent_jax.data.pipeline import task_iterator
from imagent_jax.rl.judge import grade as grade_group
from imagent_jax.rl.judge import judge
from imagent_jax.rl.rewards import reward_functions
from imagent_jax.rollout.batch import Grade, Refill
from imagent_jax.rollout.collect import Collector, draws
from imagent_jax.rollout.environment import ToolEnvironment
from imagent_jax.rollout.prefetch import Prefetcher
from imagent_jax.tiny.world import task_at
from imagent_jax.types import CallStatus

N, SPARES, SEED = 3, 4, 5


@pytest.fixture(scope="module")
def cfg():
    return small_config(rollout={"groups": N, "group_size": 2, "response_tokens": 96, "refill": SPARES})


@pytest.fixture(scope="module")
def fresh():
    """Three tasks and four spares; the last spare is the first task again."""
    return [*(task_at(7, "train", i) for i in range(N + SPARES - 1)), task_at(7, "train", 0)]


@pytest.fixture(scope="module")
def alone(parts, cfg, fresh):
    """The groups of all of them, without refill."""
    return Collector(parts.model, parts.processor, parts.tools, cfg).collect(parts.params, fresh, group_size=2, seed=SEED)


def signature(group):
    return [(t.task.uid, t.rollout, t.ids.tolist(), t.end) for t in group]


class Spread:
    """A grade that finds spread in the groups of a list of places, and notes what it was asked."""

    def __init__(self, alone, places):
        self.known = [signature(group) for group in alone.trajectories]
        self.places, self.asked = places, []

    def __call__(self, group):
        place = self.known.index(signature(group))
        self.asked.append(place)
        return Grade(place in self.places, [f"scores of {place}"])


def by_definition(places):
    """The places in the batch, those replaced and those not started: the fewest spares that complete the batch."""
    used = next((m for m in range(SPARES) if sum(p < N + m for p in places) == N), SPARES)
    started = [*range(N + used)]
    order = [p for p in started if p in places] + [p for p in started if p not in places]
    return order[:N], order[N:], [*range(N + used, N + SPARES)]


CASES = [[0, 1, 2, 3, 4, 5, 6], [0, 2, 4], [3, 4, 5, 6], [6], [], [1, 2, 5], [0, 1, 3]]


@pytest.mark.slow(8)
@pytest.mark.parametrize("places", CASES, ids=lambda places: "-".join(map(str, places)) or "none")
def test_the_batch_is_the_first_groups_with_spread_then_those_without(parts, cfg, fresh, alone, places, monkeypatch):
    """Under random delays of the tools too, far beyond the patience for slow calls."""
    patient = dataclasses.replace(cfg, tools=dataclasses.replace(cfg.tools, patience_s=0.01, timeout_s=60.0))
    call, clock, lock = ToolEnvironment.step, random.Random(str(places)), threading.Lock()

    def slow(*args):
        with lock:
            delay = clock.random() * 0.1
        time.sleep(delay)
        return call(*args)

    monkeypatch.setattr(ToolEnvironment, "step", slow)
    spread = Spread(alone, places)
    collector = Collector(parts.model, parts.processor, parts.tools, patient)
    opened = collector.open_in_background(fresh[:N], fresh[N:])
    batch = collector.collect(
        parts.params, fresh[:N], group_size=2, seed=SEED, slots=2, opened=opened, refill=Refill(fresh[N:], spread)
    )
    kept, replaced, unused = by_definition(places)
    assert [signature(group) for group in batch.trajectories] == [spread.known[p] for p in kept]
    assert [signature(group) for group in batch.replaced] == [spread.known[p] for p in replaced]
    assert batch.unused == unused and sorted(spread.asked) == sorted(kept + replaced)  # each is graded once
    assert batch.grades == [[f"scores of {p}"] for p in kept + replaced]
    assert [task.uid for task in batch.tasks] == [fresh[p].uid for p in kept]
    for p, prompt, group in zip(kept, batch.prompts, batch.trajectories, strict=True):
        np.testing.assert_array_equal(prompt.ids, alone.prompts[p].ids)
        for a, b in zip(group, alone.trajectories[p], strict=True):
            np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-4)
    assert batch.sampled_tokens == sum(len(t.turns) and sum(turn.stop - turn.start for turn in t.turns)
                                       for p in kept + replaced for t in alone.trajectories[p])  # fmt: skip


def test_without_refill_the_batch_is_in_the_order_of_the_tasks_and_nothing_is_graded(alone, fresh):
    assert [task.uid for task in alone.tasks] == [task.uid for task in fresh]
    assert alone.grades == alone.replaced == alone.unused == []
    assert [draw.place for draw in draws(fresh)] == [*range(7)] and len({draw.stream for draw in draws(fresh)}) == 7


# ---- the judgement ----------------------------------------------------------------------------------------------------

CALLS = []


def counted(t):
    """A reward of the tests' own that counts its calls; it fails for the second rollout of task 2 of the split."""
    CALLS.append((t.task.uid, t.rollout))
    if t.task.uid.endswith("/2") and t.rollout == 1:
        raise OSError("the judge is away")
    return float(t.task.uid[-1] == "2" or (t.task.uid[-1] in "13" and t.rollout))


@pytest.mark.slow(3)
def test_rewards_are_computed_once_and_the_metrics_tell_what_was_replaced(parts, cfg, fresh):
    """Tasks 1 and 3 have spread; of task 2 a rollout fails, and the other is alone."""
    cfg = dataclasses.replace(
        cfg, reward=dataclasses.replace(cfg.reward, answer=0.0, format=0.0, tool_gain=0.0, custom=(f"{__name__}:counted",))
    )
    functions = reward_functions(cfg.reward)
    CALLS.clear()
    collector = Collector(parts.model, parts.processor, parts.tools, cfg)
    grade = Refill(fresh[N:], lambda group: grade_group(cfg, functions, group))
    batch = collector.collect(parts.params, fresh[:N], group_size=2, seed=SEED, refill=grade)
    for t in (t for group in batch.replaced for t in group if t.task.uid.endswith("/2")):
        t.__dict__["score"] = float(t.error is None)  # the one that did not fail is right
    judged = judge(cfg, batch, functions)
    assert len(CALLS) == 2 * 7 and len(set(CALLS)) == 2 * 6  # the last spare is the first task again
    assert [group[0].task.uid[-1] for group in batch.trajectories] == ["1", "3", "0"]
    assert judged.rewards.tolist() == [[0.0, 1.0], [0.0, 1.0], [0.0, 0.0]] and judged.advantages.tolist()[2] == [0.0, 0.0]
    assert judged.metrics["groups/refilled"] == 4 and judged.metrics["groups/flat"] == pytest.approx(1 / 3)
    assert judged.metrics["groups/flat_sampled"] == pytest.approx(5 / 7)
    assert judged.metrics["rewards/failed"] == judged.metrics["end/fault"] == pytest.approx(1 / 14)
    assert "the judge is away" in judged.faults[f"reward {__name__}:counted"]
    assert judged.metrics["reward/total"] == pytest.approx(2 / 6) and len(judged.parts) == 3
    everyone = [t for group in [*batch.trajectories, *batch.replaced] for t in group]
    assert judged.metrics["accuracy"] == pytest.approx(np.mean([t.right for t in everyone]))
    shares = [(group[0].task.uid, [t.right for t in group if t.error is None]) for group in batch.trajectories + batch.replaced]
    assert dict(judged.pass_rates)[fresh[2].uid] == 1.0
    assert judged.pass_rates == [(uid, pytest.approx(np.mean(right))) for uid, right in shares]


def test_without_refill_there_are_no_metrics_of_it(parts, alone):
    plain = small_config(rollout={"groups": 7, "group_size": 2})
    metrics = judge(plain, alone, reward_functions(plain.reward)).metrics
    assert not any(key in metrics for key in ("groups/refilled", "groups/flat_sampled"))


# ---- spares are drawn ahead, and given back ---------------------------------------------------------------------------


class Using(Recorder):
    """A collector that uses `used` spares, and notes the tasks and the spares that it got."""

    used, got = 0, ()

    def open_in_background(self, tasks, spares):
        self.opened = [*tasks, *spares]
        return "opened"

    def collect(self, weights, tasks, *, refill, **how):
        batch = super().collect(weights, tasks, **how)
        self.got, n = (uids(tasks), uids(refill.spares), refill.grade), len(tasks)
        batch.unused = [*range(n + self.used, n + len(refill.spares))]
        return batch


@pytest.mark.parametrize("overlap", [False, True])
def test_spares_that_a_step_does_not_use_are_the_first_of_the_next(overlap):
    cfg = small_config(rollout={"groups": 3, "group_size": 2, "refill": 2}).rollout
    tasks = [task_at(0, "train", i) for i in range(10)]
    ahead = Prefetcher(Using(), task_iterator(tasks, 3, seed=1), cfg, 0, "grade")
    series, at, places = uids(sum((next(task_iterator(tasks, 30, seed=1)) for _ in range(1)), [])), 0, []
    with jax.set_mesh(jax.make_mesh((1,), ("data",))):
        for step, used in enumerate([0, 1, 2, 0, 1, 2]):
            ahead.collector.used = used
            places.append(ahead.place)
            ahead.begin(step, {} if overlap else None)
            batch, _ = ahead.take(step, {})
            assert ahead.collector.got == (series[at : at + 3], series[at + 3 : at + 5], "grade")
            assert overlap or uids(ahead.collector.opened) == series[at : at + 5]
            assert uids(batch.tasks) == series[at : at + 3]
            at += 3 + used
    resumed = task_iterator(tasks, 3, seed=1)
    resumed.set_state(places[3])
    assert uids(resumed.draw(5)[0]) == series[3 * 3 + 3 : 3 * 3 + 3 + 5]
    ahead.close()


# ---- a run ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow(25)
@pytest.mark.parametrize("flags", [(), ("--rollout.overlap=true", "--run.checkpoint_every=2")], ids=["plain", "overlap"])
def test_a_run_of_a_mixture_with_refill_and_curriculum_resumes_to_the_same_bits(tmp_path, flags):
    """Sums that the tiny base cannot read, and its own world; stopped after two steps."""
    for name, numbers in (("train", range(5)), ("test", range(5, 9))):
        rows = [{"question": f"What is {n} + 1?", "answer": n + 1, "answer_type": "number"} for n in numbers]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    world = {"name": "tiny_world", "weight": 3, "tools": ["visual_confirmation"], "reward": {"answer": 1}}
    mixture = json.dumps({"sums": {"path": str(tmp_path), "tools": []}, "world": world})
    flags = [*flags, f"--data.mixture={mixture}", "--rollout.refill=2", "--data.curriculum=pass_rate", "--grpo.kl=0"]
    whole = Watched(tmp_path, tmp_path, "whole", *flags)
    assert whole.code == 0 and "of tiny on sums, world" in whole.out
    cut = Watched(tmp_path, tmp_path, "cut", *flags, when=lambda record: record["step"] == 2, strike=signal.SIGINT)
    assert cut.code == 0 and [record["step"] for record in cut.records] == [0, 1, 2]
    resumed = Watched(tmp_path, tmp_path, "cut", *flags, "--run.resume=true")
    assert resumed.code == 0
    assert_equal(whole, resumed)
    assert sum(record["groups/refilled"] for record in whole.steps) > 0
    for record, roll in zip(whole.steps, whole.training, strict=True):
        batch, n = roll["result"], 3
        assert record["groups/refilled"] == len(batch.replaced) and record["curriculum/measured"] > 0
        sources = [task.source for task in batch.tasks]
        assert {key: value for key, value in record.items() if key.endswith("/tasks")} == {
            f"source/{name}/tasks": sources.count(name) / n for name in sources
        }
        assert all(turn.call.name != "visual_reflection" or turn.call.status == CallStatus.INVALID
                   for group in batch.trajectories for t in group for turn in t.turns if turn.call)  # fmt: skip
    held = [record["task"].split("/")[0] for record in whole.logged("base-000000")]
    assert held == ["world", "sums", "world", "world", "world", "sums"]  # by weight, 3 to 1
    for name in ("sums", "world"):
        right = [record["right"] for record in whole.logged("base-000000") if record["task"].startswith(name)]
        assert whole.records[0][f"base/source/{name}/accuracy"] == pytest.approx(np.mean(right))
    assert "accuracy by source" in (whole.path / "report.html").read_text()
