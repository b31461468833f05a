"""The curriculum: pass rates as they are measured, how often tasks come again, and resuming."""

import itertools
import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from imagent_jax.config import DataConfig
from imagent_jax.config.settings import SourceConfig
from imagent_jax.data.curriculum import PassRates
from imagent_jax.data.mixture import Mixture
from imagent_jax.data.pipeline import open_tasks, task_iterator
from imagent_jax.types import Task

TASKS = [Task(str(i), "", (), "") for i in range(60)]


def test_a_pass_rate_is_the_mean_of_four_measurements_and_then_follows_new_ones():
    rates, shares = PassRates(8, 0.1), [0.5, 0.0, 1.0, 0.25, 1.0, 0.0]
    found = []
    for share in shares:
        rates.learn("a", share)
        found.append(rates.known["a"])
    assert [count for count, _ in found] == [1, 2, 3, 4, 5, 6]
    assert [rate for _, rate in found[:4]] == pytest.approx([np.mean(shares[:n]) for n in range(1, 5)])
    assert found[4][1] == pytest.approx(0.75 * found[3][1] + 0.25) and found[5][1] == pytest.approx(0.75 * found[4][1])


@pytest.mark.parametrize("group_size", [2, 3, 8])
@pytest.mark.parametrize("rate", [0.0, 0.125, 0.5, 0.9, 1.0])
def test_the_chance_is_that_of_a_group_with_right_and_wrong_rollouts(group_size, rate):
    """Against the sum over all outcomes of a group."""
    rates = PassRates(group_size, 0.05)
    assert rates.chance("a") == 1.0  # not measured
    rates.learn("a", rate)
    mixed = [g for g in itertools.product((0, 1), repeat=group_size) if 0 < sum(g) < group_size]
    expected = sum(rate ** sum(g) * (1 - rate) ** (group_size - sum(g)) for g in mixed)
    assert rates.chance("a") == pytest.approx(max(0.05, expected))


def test_a_pass_rate_that_the_data_names_counts_until_the_task_is_measured():
    rates = PassRates(2, 0.1)
    assert (
        rates.chance("a", 0.5) == 0.5 and rates.chance("a", 0) == rates.chance("a", 1.0) == 0.1 and rates.chance("a", None) == 1.0
    )
    rates.learn("a", 0.5)
    assert rates.chance("a", 1.0) == 0.5


@pytest.mark.parametrize("rate", ["0.5", True, 50, -0.1, [0.5]])
@pytest.mark.parametrize("mixed", [False, True])
def test_a_bad_pass_rate_is_a_fault_of_its_line_before_training_with_a_curriculum(tmp_path, rate, mixed):
    rows = [{"question": f"{i}?", "answer": "a", "pass_rate": value} for i, value in enumerate([0.5, rate, None, 1])]
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = {"name": "files", "path": str(tmp_path)}
    cfg = DataConfig(**({"mixture": {"own": SourceConfig(**files)}} if mixed else files), cache_dir=str(tmp_path))
    assert len(open_tasks(cfg, "train")) == 4
    cfg = replace(cfg, curriculum="pass_rate")
    with pytest.raises(ValueError, match="line 2: the row has pass_rate .*; a curriculum needs numbers from 0 to 1"):
        open_tasks(cfg, "train")
    skipping = open_tasks(replace(cfg, skip_bad=True), "train")
    assert len(skipping) == 3 and [(fault.line, fault.kind) for fault in skipping.faults] == [(2, "bad pass_rate")]
    assert len(open_tasks(cfg, "test")) == 4


def test_rows_name_pass_rates_and_the_hopeless_come_less_often_from_the_first_epoch_on(tmp_path):
    """By files of our own, alone and as a source of a mixture. Without the curriculum the column changes nothing."""
    named = [0.0, 0.5, 1.0, None]
    rows = [{"uid": str(i), "question": "q", "images": [], "answer": "a"} for i in range(60)]
    lines = [row | ({} if named[i % 4] is None else {"pass_rate": named[i % 4]}) for i, row in enumerate(rows)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    files = {"name": "files", "path": str(tmp_path)}
    for cfg in (
        DataConfig(**files, cache_dir=str(tmp_path)),
        DataConfig(mixture={"own": SourceConfig(**files)}, cache_dir=str(tmp_path)),
    ):
        tasks = open_tasks(cfg, "train")
        iterator = task_iterator(tasks, 15, 0, rates=PassRates(8, 0.1))
        counts = Counter(int(task.uid.rpartition("/")[2]) % 4 for _ in range(40) for task in next(iterator))
        epochs = counts[3] / 15
        assert epochs > 10 and counts[1] == pytest.approx(counts[3], rel=0.05)  # 1 - 2 / 2**8
        assert counts[0] == pytest.approx(0.1 * counts[3], rel=0.6) and counts[2] == pytest.approx(0.1 * counts[3], rel=0.6)
        plain = task_iterator(tasks, 60, 0)
        assert len({task.uid for task in next(plain)}) == 60
    (tmp_path / "train.jsonl").write_text(json.dumps(rows[0] | {"pass_rate": 50}) + "\n")
    with pytest.raises(ValueError, match="Task 0 has pass_rate 50; a curriculum needs numbers from 0 to 1, or none."):
        next(task_iterator(open_tasks(DataConfig(**files, cache_dir=str(tmp_path)), "train"), 1, 0, rates=PassRates(8, 0.1)))


def test_metrics_are_of_the_tasks_measured():
    rates = PassRates(2, 0.2)
    assert rates.metrics() == {"curriculum/measured": 0, "curriculum/chance": 0.0}
    rates.learn("a", 1.0)
    rates.learn("b", 0.5)
    assert rates.metrics() == {"curriculum/measured": 2, "curriculum/chance": pytest.approx((0.2 + 0.5) / 2)}


def solved(uid):
    """A third of the tasks is always solved, a third never, a third half the time."""
    return (0.0, 0.5, 1.0)[int(uid) % 3]


def drawn_in(iterator, batches):
    found = []
    for _ in range(batches):
        tasks = next(iterator)
        iterator.learn([(task.uid, solved(task.uid)) for task in tasks])
        found.append([task.uid for task in tasks])
    return found


def test_tasks_always_and_never_solved_come_as_rarely_as_the_floor_says():
    iterator = task_iterator(TASKS, 10, seed=3, rates=PassRates(8, 0.2))
    first = sum(drawn_in(iterator, 6), [])
    assert sorted(first) == sorted(task.uid for task in TASKS)  # the first epoch has them all
    counts = Counter(sum(drawn_in(iterator, 150), []))
    epochs = iterator.state[""]["next"] / 60 - 1
    often = [counts[uid] / epochs for uid in counts if solved(uid) == 0.5]
    rare = [counts[uid] / epochs for uid in counts if solved(uid) != 0.5]
    assert len(often) == 20 and len(rare) == 40
    assert np.mean(often) == pytest.approx(1 - 2 * 0.5**8, abs=0.01)
    assert np.mean(rare) == pytest.approx(0.2, abs=4 * np.sqrt(0.2 * 0.8 / (epochs * 40)))  # four standard errors
    assert max(rare) < 0.5
    state = iterator.state[""]
    assert iterator.metrics()["curriculum/skipped"] == state["skipped"] == state["next"] - 6 * 10 - 150 * 10


def test_without_a_curriculum_nothing_is_left_out_and_nothing_is_learned():
    plain, told = task_iterator(TASKS, 10, seed=3), task_iterator(TASKS, 10, seed=3)
    assert drawn_in(told, 30) == [[task.uid for task in next(plain)] for _ in range(30)]
    assert told.metrics() == {} and told.get_state() == plain.get_state() and told.get_state()["pass_rates"] == {}


def test_what_was_learned_resumes_with_the_series():
    """Also between a draw and what is learned of it, and with tasks that were given back."""
    mixed = Mixture({"a": TASKS[:40], "b": TASKS[40:]}, {"a": 2.0, "b": 1.0})

    def begun(state=None):
        iterator = task_iterator(mixed, 8, seed=1, rates=PassRates(4, 0.1))
        if state:
            iterator.set_state(json.loads(json.dumps(state, sort_keys=True)))
        return iterator

    whole = begun()
    drawn_in(whole, 40)
    tasks, drawn = whole.draw(11)
    whole.give_back(drawn[8:])
    whole.learn([(task.uid, solved(task.uid)) for task in tasks[:8]])
    state = whole.get_state()
    following = drawn_in(whole, 40)
    assert drawn_in(begun(state), 40) == following
    assert [uid for batch in following for uid in batch][:3] != [] and state["sources"]["a"]["skipped"] > 0
    changed = {**state, "pass_rates": {}}
    assert drawn_in(begun(changed), 40) != following
    again = begun(state)
    assert again.get_state() == state  # a state is a copy
    drawn_in(again, 3)
    assert begun(state).get_state() == state


def test_sources_keep_their_shares_where_tasks_are_left_out():
    mixed = Mixture({"a": TASKS[::3], "b": TASKS[1::3]}, {"a": 3.0, "b": 1.0})  # one never solved, one half the time
    iterator = task_iterator(mixed, 4, seed=0, rates=PassRates(8, 0.1))
    for batch in drawn_in(iterator, 100):
        assert sum(solved(uid) == 0.0 for uid in batch) == 3
    assert iterator.state["a"]["skipped"] > 5 * iterator.state["a"]["next"] / 10 and iterator.state["b"]["skipped"] < 5
