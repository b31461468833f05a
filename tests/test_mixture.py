"""Mixtures: the order of tasks by weight, sources with their own settings, held-out shares, tasks that are given back."""

import dataclasses
import itertools
import json
import os
import re

import numpy as np
import pytest
import yaml
from conftest import small_config
from scripted_run import ANSWER, crop, finished, play, scripted_collector

from imagent_jax.chat import QWEN
from imagent_jax.config import Config, DataConfig, SourceConfig
from imagent_jax.data.check import left_out
from imagent_jax.data.mixture import Mixture, next_source, of_source
from imagent_jax.data.pipeline import check_source, open_tasks, task_iterator
from imagent_jax.rl.rewards import reward_functions, score_trajectories
from imagent_jax.rollout.environment import ToolEnvironment
from imagent_jax.rollout.metrics import summarise
from imagent_jax.rollout.policy import Policy
from imagent_jax.tiny.world import task_at
from imagent_jax.types import CallStatus, Task

SIZES, WEIGHTS = {"a": 40, "b": 7, "c": 100}, {"a": 1.0, "b": 0.25, "c": 2.5}


def tasks_of(name, count):
    return [Task(f"{name}/{i}", "", (), "right", source=name) for i in range(count)]


@pytest.fixture
def mixed():
    return Mixture({name: tasks_of(name, count) for name, count in SIZES.items()}, WEIGHTS)


def series(tasks, count, seed=1, batch=1):
    iterator = task_iterator(tasks, batch, seed=seed)
    return [task.uid for task in itertools.chain.from_iterable(next(iterator) for _ in range(count // batch))]


# ---- the order --------------------------------------------------------------------------------------------------------


def webster(weights, count):
    """The order of Webster's method in closed form: all (i + 1/2) / w, sorted."""
    turns = [((i + 0.5) / w, place, name) for place, (name, w) in enumerate(weights.items()) for i in range(count)]
    return [name for *_, name in sorted(turns)[:count]]


def test_sources_take_turns_by_their_weights_at_every_length(mixed):
    found = [uid[0] for uid in series(mixed, 3000)]
    assert found == webster(WEIGHTS, 3000)
    counts = np.stack([np.cumsum([name == one for name in found]) for one in WEIGHTS])
    ideal = np.outer(np.asarray([*WEIGHTS.values()]) / sum(WEIGHTS.values()), np.arange(1, 3001))
    assert np.abs(counts - ideal).max() < 1
    assert (((counts - ideal) ** 2 / ideal).sum(0)[100:] < 0.2).all()  # of random draws it is 2 in the mean


def test_one_source_among_equals_begins_with_the_first():
    assert [next_source({"x": n, "y": n}, {"x": 2.0, "y": 2.0}) for n in (0, 3)] == ["x", "x"]
    assert next_source({"x": 1, "y": 0}, {"x": 1.0, "y": 1.0}) == "y"


def test_every_source_runs_through_epochs_of_its_own_that_no_other_source_changes(mixed):
    found = series(mixed, 3000)
    for name, count in SIZES.items():
        own = [uid for uid in found if uid[0] == name]
        epochs = [own[i : i + count] for i in range(0, len(own) - count + 1, count)]
        assert len(epochs) >= 18 and all(sorted(epoch) == sorted(t.uid for t in mixed.sources[name]) for epoch in epochs)
        assert epochs[0] != epochs[1]
        alone = series(Mixture({name: mixed.sources[name]}, {name: 7.0}), 200)
        assert alone[: len(own)] == own[:200]
    assert series(mixed, 50) == found[:50] != series(mixed, 50, seed=2)
    assert series(mixed, 60, batch=5) == found[:60]  # whatever the size of the batch


def test_equal_sources_are_shuffled_differently():
    a, b = tasks_of("a", 30), tasks_of("b", 30)
    found = series(Mixture({"a": a, "b": b}, {"a": 1.0, "b": 1.0}), 60)
    assert [uid[2:] for uid in found[::2]] != [uid[2:] for uid in found[1::2]]


@pytest.mark.parametrize("weights", [WEIGHTS, {"b": 1.0, "c": 1.0, "a": 1.0}], ids=["shares", "equals"])
def test_a_series_resumes_within_an_epoch_from_a_state_that_went_through_json(mixed, weights):
    mixed = Mixture({name: mixed.sources[name] for name in weights}, weights)
    iterator = task_iterator(mixed, 7, seed=5)
    for batches in (0, 3, 20):
        for _ in range(batches):
            next(iterator)
        state = json.dumps(iterator.get_state(), sort_keys=True)
        following = [next(iterator) for _ in range(9)]
        resumed = task_iterator(mixed, 7, seed=5)
        resumed.set_state(json.loads(state))
        assert [next(resumed) for _ in range(9)] == following and len(state) < 300


def test_a_state_of_other_sources_is_refused(mixed):
    other = task_iterator(tasks_of("x", 3), 1, seed=0)
    with pytest.raises(ValueError, match=r"has sources \[''\], not \['a', 'b', 'c'\]; set the same data.mixture"):
        task_iterator(mixed, 1, seed=0).set_state(other.get_state())
    with pytest.raises(ValueError, match="has sources"):
        task_iterator(mixed, 1, seed=0).set_state({"next_index": 3})  # of another version


def test_tasks_that_are_given_back_come_next_and_nothing_is_lost(mixed):
    """A step that draws spares and gives them back leaves the series as it would be without them, also across epochs."""
    plain, spare = task_iterator(mixed, 6, seed=3), task_iterator(mixed, 6, seed=3)
    rng = np.random.default_rng(0)
    for step in range(60):
        tasks, drawn = spare.draw(6 + 5)
        assert tasks[:6] == next(plain)
        spare.give_back(drawn[6:])
        if step % 7 == 0:
            state = json.loads(json.dumps(spare.get_state()))
            spare = task_iterator(mixed, 6, seed=3)
            spare.set_state(state)
    used = []
    for _ in range(100):  # some spares are used
        tasks, drawn = spare.draw(11)
        keep = 6 + rng.integers(6)
        used += [task.uid for task in tasks[:keep]]
        spare.give_back(drawn[keep:])
    assert used[:400] == [task.uid for task in itertools.chain.from_iterable(next(plain) for _ in range(200))][:400]


# ---- held-out tasks ---------------------------------------------------------------------------------------------------


def test_the_first_tasks_of_a_split_have_the_shares_of_the_weights_and_all_come_once(mixed):
    everything = [task.uid for task in mixed]
    assert len(mixed) == 147 and sorted(everything) == sorted(t.uid for own in mixed.sources.values() for t in own)
    assert [uid[0] for uid in everything[:30]] == webster(WEIGHTS, 30)
    assert [uid for uid in everything if uid[0] == "b"] == [f"b/{i}" for i in range(7)]  # not shuffled
    assert [task.uid for task in mixed[:15]] == everything[:15] and mixed[-1].uid == everything[-1]


def test_accuracy_is_reported_by_source(mixed):
    done = [finished(mixed.sources[name][0], ["x"], answer) for name, answer in (("a", "right"), ("a", "no"), ("b", "right"))]
    metrics = summarise(done)
    assert metrics["accuracy"] == pytest.approx(2 / 3)
    assert {k: v for k, v in metrics.items() if "source" in k} == {"source/a/accuracy": 0.5, "source/b/accuracy": 1.0}
    assert not any("source" in key for key in summarise([finished(Task("x", "", (), ""), ["x"], "")]))


# ---- sources of files -------------------------------------------------------------------------------------------------


def row(number, **more):
    return {"question": f"What is {number}?", "answer": str(number)} | more


@pytest.fixture
def folder(tmp_path):
    """Two sources of text: sums (some rows say more of themselves) and words, whose test split is elsewhere."""
    own = {"tools": ["visual_reflection"], "answer_type": "exact", "uid": "own"}
    own["reward"] = {"format": 0.5, "answer": 2, "tool_gain": None}
    for name, rows in (
        ("sums/train", [row(1), row(2), row(3, **own)]), ("sums/test", [row(4)]), ("words/train", [row(5), row(6, tools=[])]),
        ("held", [row(7), row(8)]),
    ):  # fmt: skip
        path = tmp_path / f"{name}.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    return tmp_path


def config_of(folder, sections=None, **changes):
    sources = {
        "sums": {"path": f"{folder}/sums", "weight": 2, "answer_type": "number", "tools": ["visual_confirmation"],
                 "reward": {"answer": 3.0}},
        "words": {"path": f"{folder}/words/train.jsonl", "test_path": f"{folder}/held.jsonl"},
        "world": {"name": "tiny_world", "weight": 0.5, "tools": []},
    }  # fmt: skip
    for name, change in changes.items():
        sources[name] = sources.get(name, {}) | change
    data = {"mixture": sources, "cache_dir": str(folder), "train_size": 4, "test_size": 2, "answer_type": "f1"}
    return small_config(**{"data": data, "rollout": {"prompt_tokens": 512}, **(sections or {})})


def test_a_task_has_what_its_source_says_and_its_row_goes_before(folder):
    cfg = config_of(folder)
    found = {task.uid: task for task in open_tasks(cfg.data, "train", scripted_collector(cfg).check)}
    assert len(found) == 3 + 2 + 4
    plain, own = found["sums/train:1"], found["sums/own"]
    assert (plain.source, plain.answer_type, plain.tools, plain.reward) == (
        "sums", "number", ("visual_confirmation",), {"answer": 3.0},
    )  # fmt: skip
    assert (own.answer_type, own.tools, own.reward) == ("exact", ("visual_reflection",), {"answer": 2.0, "format": 0.5})
    assert own.meta == {}
    words = found["words/train:1"]
    assert (words.source, words.answer_type, words.tools, words.reward) == ("words", "f1", None, {})
    assert found["words/train:2"].tools == () and found[f"world/{task_at(0, 'train', 2).uid}"].tools == ()
    assert found[f"world/{task_at(0, 'train', 2).uid}"].answer_type == task_at(0, "train", 2).answer_type
    held = [task.uid for task in open_tasks(cfg.data, "test")]
    assert held == ["sums/test:1", "words/held:1", "world/tiny_world/test/0/0", "words/held:2", "world/tiny_world/test/0/1"]


def test_a_row_of_a_run_without_a_mixture_names_its_tools_and_rewards_too(folder):
    cfg = small_config(data={"name": "files", "path": f"{folder}/sums", "cache_dir": str(folder)})
    own = next(task for task in open_tasks(cfg.data, "train", scripted_collector(cfg).check) if task.uid == "own")
    assert (own.source, own.tools, own.reward) == ("", ("visual_reflection",), {"format": 0.5, "answer": 2.0})


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            {"tools": ["zoom"]},
            r'sums.jsonl, line 3: there is no tool "zoom" among those of the run \(visual_ref',
        ),
        ({"tools": "zoom"}, r'line 3: "tools" is "zoom"; write a list of names of tools, or leave it out'),
        ({"tools": [3]}, r'line 3: "tools" is \[3\]; write a list'),
        ({"reward": {"fomat": 1}}, "line 3: the run has no reward 'fomat'; its rewards are answer, format, tool_gain"),
        ({"reward": {"format": "much"}}, r'line 3: "reward" is {.*}; write weights by name, such as {"format": 0}'),
        ({"reward": {"format": True}}, r'line 3: "reward" is'),
        ({"reward": 2}, r'line 3: "reward" is 2; write'),
    ],
)
def test_a_row_that_names_what_the_run_does_not_have_is_a_fault(folder, change, sentence):
    path = folder / "sums.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in [row(1), row(2), row(3, **change)]))
    cfg = config_of(folder, sums={"path": str(path), "answer_type": ""})
    with pytest.raises(ValueError, match=sentence):
        open_tasks(cfg.data, "train", scripted_collector(cfg).check)


def test_rows_that_are_left_out_are_counted_over_all_sources(folder):
    for name in ("sums/train", "words/train"):
        with (folder / f"{name}.jsonl").open("a") as file:
            file.write("{}\n")
    os.rename(folder / "words/train.jsonl", folder / "words/more.jsonl")
    cfg = config_of(folder, words={"path": f"{folder}/words/more.jsonl"})
    tasks = open_tasks(dataclasses.replace(cfg.data, skip_bad=True), "train")
    assert len(tasks) == 9 and [fault.line for fault in tasks.faults] == [4, 3]
    assert left_out(tasks).startswith("train.jsonl, more.jsonl: 2 of 11 rows are left out (2 no question). The first: ")


@pytest.mark.parametrize(
    ("source", "split", "sentence"),
    [
        ({"path": ""}, "train", "data.mixture.words.name is 'files' but data.mixture.words.path is empty; name the folder"),
        (
            {"test_path": ""},
            "test",
            "data.mixture.words.path .*train.jsonl names training tasks only; set data.mixture.words.te",
        ),
        (
            {"name": "tiny_world"},
            "train",
            "data.mixture.words.name is 'tiny_world', which does not read .*; set data.mixture.words",
        ),
        ({"path": "/nowhere"}, "train", "The task file /nowhere does not exist; write it or correct data.mixture.words.path."),
        (
            {"answer_type": "guess"},
            "train",
            "data.mixture.words.answer_type is 'guess'; set one of exact, choice, number, f1",
        ),
    ],
)
def test_a_source_that_cannot_be_opened_is_named_with_its_setting(folder, source, split, sentence):
    with pytest.raises(ValueError, match=sentence):
        open_tasks(config_of(folder, words=source).data, split)


def test_an_unknown_answer_type_is_refused_without_a_mixture():
    with pytest.raises(ValueError, match="data.answer_type is 'guess'"):
        check_source(DataConfig("tiny_world", answer_type="guess"))


def test_a_tool_of_a_source_that_the_run_does_not_have_is_refused_before_the_model_is_looked_for(folder):
    cfg = config_of(folder, {"model": {"path": "nowhere"}}, sums={"tools": ["visual_reflection", "python"]})
    sentence = r'data.mixture.sums.tools: there is no tool "python" among those of the run .*; name some of tools.names'
    with pytest.raises(ValueError, match=sentence):
        Policy(cfg)


def test_a_verdict_is_remembered_for_the_settings_of_its_source_alone(folder):
    """Rows that are numbers are fit for one answer type and not for another, and prompts for some tools."""
    path = folder / "sums/train.jsonl"
    path.write_text(json.dumps(row(1, answer="one")) + "\n")
    for _ in range(2):
        cfg = config_of(folder, sums={"answer_type": "exact"})
        assert len(open_tasks(cfg.data, "train", scripted_collector(cfg).check)) == 1 + 2 + 4
        with pytest.raises(ValueError, match="line 1: answer 'one' is not a number"):
            open_tasks(config_of(folder).data, "train", scripted_collector(cfg).check)
    room, few = {"rollout": {"prompt_tokens": 70}}, {"words": {"tools": []}}
    short = config_of(folder, room, sums={"answer_type": "exact", "tools": []}, **few)
    assert len(open_tasks(short.data, "train", scripted_collector(short).check)) == 7
    more = config_of(folder, room, sums={"answer_type": "exact", "tools": None}, **few)
    with pytest.raises(ValueError, match="sums/train.jsonl, line 1: the prompt needs"):
        open_tasks(more.data, "train", scripted_collector(more).check)


# ---- tools and rewards of a task ---------------------------------------------------------------------------------------


def test_a_task_is_shown_its_tools_only_and_a_call_of_another_is_invalid(folder):
    cfg = config_of(folder, {"tools": {"max_turns": 5}})
    collector = scripted_collector(cfg)
    task = task_at(3, "train", 0)
    both = [QWEN.render_call("visual_reflection", {"images": [1]}), crop(1, 0, 0, 500, 500), ANSWER.format("x")]

    def statuses(tools):
        shown = of_source(task, "s", SourceConfig(tools=tools))
        prompt = collector.processor.decode(collector.open_task(shown).prompt.ids)
        listed = re.findall(r'"name": "(\w+)"', prompt)
        calls = [turn.call for turn in play(collector, shown, 0, both).turns if turn.call]
        return listed, [call.status for call in calls], calls[0].error

    done, bad = CallStatus.EXECUTED, CallStatus.INVALID
    assert statuses(None)[:2] == (["visual_reflection", "visual_confirmation", "broken"], [done, done])
    listed, found, error = statuses(("visual_confirmation",))
    assert (listed, found) == (["visual_confirmation"], [bad, done]) and 'there is no tool "visual_reflection"' in error
    assert statuses(("broken", "visual_reflection"))[:2] == (["visual_reflection", "broken"], [done, bad])
    assert statuses(())[:2] == ([], [bad, bad])


def test_a_prompt_for_all_tools_has_the_same_tokens_whether_they_are_named_or_not():
    collector = scripted_collector(small_config(rollout={"prompt_tokens": 512}))
    task = task_at(3, "train", 1)
    named = of_source(task, "s", SourceConfig(tools=collector.tools.names))
    assert collector.open_task(named).prompt.ids.tolist() == collector.open_task(task).prompt.ids.tolist()


def test_weights_of_a_task_take_the_place_of_those_of_the_run():
    functions = reward_functions(Config().reward)
    for reward, total in (({}, 1.1), ({"format": 0.0}, 1.0), ({"answer": 3.0, "tool_gain": 9.0}, 3.1)):
        t = finished(Task("a", "?", (), "7", reward=reward), ["<answer>7</answer><|im_end|>"], "7")
        [scored] = score_trajectories([t], functions)
        assert scored == {"answer": 1.0, "format": 1.0, "tool_gain": 0.0, "total": pytest.approx(total)}


def test_a_mixture_is_complete_in_a_saved_configuration(folder):
    cfg = config_of(folder)
    saved = yaml.safe_load(cfg.to_yaml())["data"]["mixture"]
    assert [*saved] == ["sums", "words", "world"] and all({*source} == {*vars(SourceConfig())} for source in saved.values())
    assert Config.from_yaml(cfg.to_yaml()) == cfg


# ---- environments ------------------------------------------------------------------------------------------------------


class Greeting(ToolEnvironment):
    """An environment that changes what a call says."""

    def step(self, call):
        result = super().step(call)
        result.parts.insert(0, f"hello from {type(self).__name__}")
        return result


class Farewell(Greeting):
    """Another one."""


def test_a_task_lives_in_the_environment_of_its_row_or_else_of_its_source(folder):
    path = folder / "sums/train.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in [row(1), row(2, environment=f"{__name__}:Farewell")]))
    cfg = config_of(folder, sums={"environment": f"{__name__}:Greeting", "tools": ["visual_reflection"]})
    collector = scripted_collector(cfg)
    found = {task.uid: task for task in open_tasks(cfg.data, "train", collector.check)}

    def said(task):
        call = (
            play(collector, task, 0, [QWEN.render_call("visual_reflection", {"images": [1]}), ANSWER.format("1")]).turns[0].call
        )
        return call.parts[0]

    assert said(found["sums/train:1"]) == "hello from Greeting" and said(found["sums/train:2"]) == "hello from Farewell"
    assert "hello" not in said(found["words/train:1"])
    assert found["sums/train:2"].meta == {}


def test_an_environment_that_cannot_be_imported_is_refused_at_the_start(folder):
    with pytest.raises(ValueError, match="data.mixture.sums.environment.*nowhere:World"):
        open_tasks(config_of(folder, sums={"environment": "nowhere:World"}).data, "train")
    path = folder / "sums/train.jsonl"
    path.write_text(json.dumps(row(1, environment="nowhere:World")) + "\n")
    for _ in range(2):  # also where the verdict is remembered
        with pytest.raises(ValueError, match="environment of a row.*nowhere:World"):
            open_tasks(config_of(folder).data, "train")
