"""The tool worlds end to end: scripted agents whose every program runs in the sandbox and whose every query is searched."""

import json
import re

import numpy as np
import pytest
from conftest import tiny_config
from scripted_run import play, without_weights

from imagent_jax.chat import QWEN, answer_markup
from imagent_jax.chat.prompts import read_prompt
from imagent_jax.config import TINY, load_config, read_args
from imagent_jax.data.pipeline import open_tasks
from imagent_jax.evals.controls import controlled
from imagent_jax.rollout.collect import Collector
from imagent_jax.tiny import encyclopaedia
from imagent_jax.tiny.encyclopaedia import RELATIONS, articles, mark_words
from imagent_jax.tiny.prints import program, repair
from imagent_jax.tiny.search_world import KIND_MIX, task_at
from imagent_jax.tools import tools_by_name
from imagent_jax.tools.sandbox import Worker
from imagent_jax.tools.search import Index
from imagent_jax.train import main
from imagent_jax.types import CallStatus, Task

END = QWEN.turn_close


@pytest.fixture(scope="module")
def index(tmp_path_factory) -> str:
    return encyclopaedia.index_folder(str(tmp_path_factory.mktemp("search")))


@pytest.fixture
def collector_of(index, monkeypatch):
    """A function of a config's name that returns a collector of its run, with the shipped base's tokenizer."""
    monkeypatch.setattr(encyclopaedia, "index_folder", lambda: index)

    def make(name: str, **options) -> Collector:
        cfg = load_config(f"configs/{name}.yaml")
        assert (cfg.model.path, cfg.tools.prompt) == ("tiny_tools", "tiny")
        wide = {"rollout.prompt_tokens": 640, "rollout.response_tokens": 1024, "rollout.observation_tokens": 512}
        cfg = cfg.changed(wide)
        tools = tools_by_name(cfg.tools.names, cfg.sandbox, cfg.search, read_prompt(cfg.tools.prompt))
        return Collector(*without_weights(), tools, cfg, **options)

    return make


def digit_of(task: Task, number: int) -> int:
    return task.meta["tags"][number - 1][0]["digit"]


def repairing(task: Task) -> list[str]:
    """Turns of an agent that repairs the prints that a question of the code world is about, and answers."""
    numbers = [number for number, _ in task.meta["targets"]]
    codes = [program(n, repair(task.meta["problems"][n - 1])) for n in numbers]
    return [*(QWEN.render_call("python", {"code": code}) + END for code in codes), answer_markup(task.answer) + END]


def searching(task: Task) -> list[str]:
    """Turns of an agent that searches for what a question of the search world needs, in order, and answers."""
    queries = list(task.meta["needs"])
    if task.images:
        article = articles()[tuple(queries[0].split())]
        queries[0] = f"{article.kind} {mark_words(article.mark)}"
    return [*(QWEN.render_call("search", {"query": query}) + END for query in queries), answer_markup(task.answer) + END]


# ---- the search world ---------------------------------------------------------------------------------------------------


def test_an_article_is_found_by_its_title_and_not_by_a_vague_query(index):
    backend, found, rng = Index(index), list(articles().values()), np.random.default_rng(0)
    assert len(found) == 3200 and backend.passages == 3200 and index == encyclopaedia.index_folder(index.rpartition("/")[0])
    some = [found[i] for i in rng.permutation(len(found))[:300]]

    def rate(query, among, k):
        return np.mean([article.text in [hit.text for hit in backend.search(query(article), k)] for article in among])

    marked = [article for article in some if article.mark]
    assert rate(lambda a: a.title, some, 1) == 1.0
    assert rate(lambda a: f"{a.kind} {mark_words(a.mark)}", marked, 1) == 1.0
    assert 0.3 < rate(lambda a: a.name, some, 2) < 0.7
    assert rate(lambda a: f"{a.kind} {mark_words(a.mark[:1])}", marked, 2) < 0.2
    assert rate(lambda a: a.kind, some, 2) < 0.02


def test_facts_name_articles_of_the_kind_that_their_relation_says():
    found = articles()
    for article in found.values():
        assert list(article.facts) == list(RELATIONS[article.kind]) and article.name not in article.facts.values()
        assert all((RELATIONS[article.kind][relation], name) in found for relation, name in article.facts.items())
        assert article.kind not in RELATIONS[article.kind].values() and (article.mark == ()) == (
            article.kind in ("person", "place")
        )
    for kind in encyclopaedia.MARKED:
        marks = [frozenset(article.mark) for article in found.values() if article.kind == kind]
        assert len(set(marks)) == len(marks) == 800


def test_every_answer_of_the_search_world_follows_from_the_articles_that_it_needs():
    kinds, subjects = set(), {"train": set(), "test": set()}
    for split in ("train", "test"):
        for i in range(40):
            task = task_at(5, split, i)
            assert task == task_at(5, split, i) and task.uid == f"tiny_search/{split}/5/{i}"
            first = articles()[tuple(task.meta["needs"][0].split())]
            chain = re.match("Name the (.*) of the (?:ship|star|person|place) ", task.question)[1].split(" of the ")
            here = first
            for relation in reversed(chain):
                name = here.facts[relation]
                here = articles()[RELATIONS[here.kind][relation], name]
            assert here.name == task.answer and len(chain) == len(task.meta["needs"]) == (2 if "twice" in task.kind else 1)
            subjects[split].add(first.name)
            kinds.add(task.kind)
            if task.images:
                (number,) = task.meta["targets"]
                shown = [tuple((tag["colour"], tag["digit"]) for tag in image) for image in task.meta["tags"]]
                assert shown[number - 1] == first.mark and sum(set(mark) == set(first.mark) for mark in shown) == 1
                assert f"the {first.kind} with the mark in Image {number}." in task.question
            else:
                assert f"the {first.kind} {first.name}." in task.question
    assert kinds == set(KIND_MIX) and not subjects["train"] & subjects["test"]


# ---- scripted agents ------------------------------------------------------------------------------------------------------


@pytest.mark.slow(20)
def test_every_program_of_the_code_world_runs_in_the_sandbox_and_repairs_the_print(collector_of, monkeypatch):
    ran, whole = [], Worker.run
    monkeypatch.setattr(Worker, "run", lambda self, code, *rest: ran.append(code) or whole(self, code, *rest))
    collector = collector_of("tiny_code")
    tasks = open_tasks(collector.cfg.data, "test")[:12]
    tests, calls = len(ran), 0
    for task in tasks:
        trajectory = play(collector, task, 0, repairing(task))
        assert trajectory.right and trajectory.executed_calls == len(task.meta["targets"])
        for turn in trajectory.turns[:-1]:
            number = int(re.search(r"images\[(\d)\]", turn.call.arguments["code"])[1])
            (shown,) = turn.call.images
            entry = trajectory.images[shown - 1]
            assert entry.parent == number and entry.shown == (84, 84) and turn.call.parts[0] == entry.describe()
            tag = task.meta["tags"][number - 1][0]
            x, y = round(tag["x"] * 168), round(tag["y"] * 168)
            patch = np.asarray(entry.pixels)[y - 28 : y + 28, x - 28 : x + 28].reshape(-1, 3).mean(0)
            assert np.ptp(patch) > 30  # the tag stands where it stood before it was spoilt
            calls += 1
    assert len(ran) - tests == calls > 12


@pytest.mark.slow(10)
def test_every_query_of_the_search_world_is_searched_and_shows_the_answer(collector_of):
    collector = collector_of("tiny_search")
    tasks = open_tasks(collector.cfg.data, "test")[:20]
    done = [play(collector, task, 0, searching(task)) for task in tasks]
    for task, trajectory in zip(tasks, done, strict=True):
        assert trajectory.right and trajectory.executed_calls == len(task.meta["needs"])
        passages = trajectory.turns[-2].call.parts
        assert len(passages) == 2 and f" {task.answer}" in passages[0]
    make = controlled("shuffle", done, 0)
    shuffled = collector_of("tiny_search", environment=make)
    again = [play(shuffled, task, 0, searching(task)) for task in tasks]
    told = [sum(f" {t.task.answer}" in part for part in t.turns[-2].call.parts) for t in again]
    assert sum(told) < 4  # what is found is of another task


@pytest.mark.slow(10)
def test_one_reflection_shows_all_digits_of_a_page_larger(collector_of):
    collector = collector_of("tiny_all")
    assert set(collector.names) == {"visual_reflection", "visual_confirmation", "python", "search"}
    tasks = open_tasks(collector.cfg.data, "test")
    kinds = {}
    for i in range(40):
        kinds.setdefault(tasks[i].kind, tasks[i])
    assert {"read", "sum", "code_read", "mark_once", "name_twice", "total"} <= set(kinds)
    task = kinds["total"]
    number = task.meta["targets"][0][0]
    look = QWEN.render_call("visual_reflection", {"images": [number], "resolution": "high"}) + END
    trajectory = play(collector, task, 0, [look, answer_markup(task.answer) + END])
    (shown,) = trajectory.turns[0].call.images
    assert (
        trajectory.right and trajectory.images[shown - 1].shown == (168, 168) and trajectory.images[number - 1].shown == (84, 84)
    )
    assert trajectory.turns[0].call.status == CallStatus.EXECUTED
    assert task.answer == str(sum(tag["digit"] for tag in task.meta["tags"][number - 1]))


@pytest.mark.slow(90)
def test_all_worlds_train_together_with_all_tools(index, monkeypatch, tmp_path):
    """Two steps with the shipped base, which has never seen these worlds: their metrics, by kind, of finite rewards."""
    monkeypatch.setattr(encyclopaedia, "index_folder", lambda: index)
    status = main([
        "--config=configs/tiny_all.yaml", "--model.path=tiny", f"--run.dir={tmp_path}", "--run.name=all", "--run.steps=2",
        "--run.compile_cache=", "--run.checkpoint_every=0", "--eval.tasks=8", "--eval.every=0", "--eval.groups=8",
        "--rollout.groups=7", "--rollout.group_size=2", "--rollout.prompt_tokens=640", "--rollout.response_tokens=96",
        "--grpo.micro_groups=7", "--grpo.minibatches=1", "--grpo.length_buckets=1", "--data.test_size=8",
        "--data.train_size=64",
    ])  # fmt: skip
    assert status == 0
    records = [json.loads(line) for line in (tmp_path / "all" / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if "reward/total" in record]
    assert len(steps) == 2 and all(np.isfinite(record["reward/total"]) for record in steps)
    assert {key.split("/")[1] for record in steps for key in record if key.startswith("source/")} == {
        "look", "code", "search", "total",
    }  # fmt: skip


@pytest.mark.parametrize("name", ["tiny_code", "tiny_search", "tiny_all"])
def test_the_configs_name_only_what_differs_from_the_defaults(name):
    """And agree with the corpus of their base on sizes and tools."""
    from imagent_jax.tiny.corpus_style import GIVEN, PASSAGES, SETTINGS, TOOLSETS

    cfg = read_args([f"--config=configs/{name}.yaml"])
    assert cfg.tools.names == TOOLSETS[name.removeprefix("tiny_")]
    assert (cfg.images.min_pixels, cfg.images.max_pixels) == GIVEN
    for setting in ("low_pixels", "high_pixels", "confirm_min_pixels", "confirm_max_pixels", "min_box", "max_images"):
        assert getattr(cfg.tools, setting) == getattr(SETTINGS, setting)
    assert "search" not in cfg.tools.names or (cfg.search.path, cfg.search.passages) == ("tiny", PASSAGES)
    assert cfg.images.vision_block * 14 * 14 >= cfg.tools.high_pixels and load_config(TINY) == tiny_config({})
