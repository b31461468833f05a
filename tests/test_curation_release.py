"""The release: splits that share no picture, three containers that training reads, a card, checksums."""

import json
import os
import random
import shutil
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.sparse
from curation_parts import ROOT, ask, tiny_pictures, tiny_settings

from imagent_jax.config import DataConfig
from imagent_jax.curation.card import card
from imagent_jax.curation.difficulty import PolicyRates, PolicyRatesSettings, RateFile, measured
from imagent_jax.curation.groups import make_groups
from imagent_jax.curation.pipeline import curate, is_kept
from imagent_jax.curation.pool import Pool
from imagent_jax.curation.question import Event, Question
from imagent_jax.curation.release import _write_parquet, components, release, row_of, split_of
from imagent_jax.curation.roles import task_of
from imagent_jax.curation.settings import DifficultySettings, ReleaseSettings
from imagent_jax.data.pipeline import open_tasks
from imagent_jax.tiny.world import task_at
from imagent_jax.types import EndReason


def random_questions(count, images, seed):
    luck = random.Random(seed)
    names = [f"i{n}" for n in range(images)]
    return [ask("?", "1", uid=str(n), images=tuple(luck.sample(names, luck.choice((2, 3)))), evidence=()) for n in range(count)]


@pytest.mark.parametrize("seed", range(4))
def test_sets_that_share_no_picture_are_the_connected_components(seed):
    questions = random_questions(40, 90, seed)
    places = {name: i for i, name in enumerate(sorted({image for q in questions for image in q.images}))}
    edges = np.zeros((len(places), len(places)))
    for question in questions:
        for image in question.images:
            edges[places[question.images[0]], places[image]] = 1
    count, labels = scipy.sparse.csgraph.connected_components(edges, directed=False)
    ours = components(questions)
    assert len(ours) == count > 5
    assert all(len({labels[places[image]] for question in own for image in question.images}) == 1 for own in ours)
    assert sorted(q.uid for own in ours for q in own) == sorted(q.uid for q in questions)


def test_questions_of_one_group_are_not_parted():
    questions = [ask("?", "1", uid=str(n), images=(f"a{n}", f"b{n}"), evidence=(), group=f"g{n // 2}") for n in range(6)]
    assert [[q.uid for q in own] for own in components(questions)] == [["0", "1"], ["2", "3"], ["4", "5"]]


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5])
def test_no_picture_is_in_both_splits_and_the_share_is_kept(share):
    questions = random_questions(120, 400, 1)
    splits = split_of(questions, share, 0)
    images = [{image for q in own for image in q.images} for own in splits.values()]
    assert not images[0] & images[1] and [*splits["train"], *splits["test"]] != []
    assert share * 120 - 4 <= len(splits["test"]) <= share * 120
    assert sorted(q.uid for own in splits.values() for q in own) == sorted(q.uid for q in questions)
    assert split_of(questions, share, 0) == splits and (share == 0 or split_of(questions, share, 1) != splits)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tiny_pictures(tmp_path_factory.mktemp("release"), 24)
    cfg = tiny_settings(folder, run={"proposals": 20})
    funnel = curate(cfg)
    questions = [Question.from_json(line) for line in (folder / "run" / "questions.jsonl").read_text().splitlines()]
    kept = [question for question in questions if is_kept(question)]
    return folder / "run", kept, funnel, release(folder / "run", kept, funnel, cfg.release, 0)


@pytest.mark.parametrize("container", ["arrayrecord", "parquet", "jsonl"])
def test_training_reads_every_container_and_finds_the_same_tasks(run, container):
    out, kept, _, counts = run
    pool, read = Pool(out), {}
    for split in ("train", "test"):
        tasks = open_tasks(DataConfig(name="files", path=str(out / "release" / container)), split)
        assert len(tasks) == counts[split] > 0
        read |= {task.uid: task for task in tasks}
    assert sorted(read) == sorted(question.uid for question in kept)
    for question in kept:
        expected, task = task_of(question, [pool.data(image) for image in question.images]), read[question.uid]
        assert (task.question, task.images, task.answer, task.answer_type, task.kind) == (
            expected.question, expected.images, expected.answer, expected.answer_type, expected.kind,
        )  # fmt: skip
        history = task.meta["history"] if container != "parquet" else json.loads(task.meta["history"])
        assert [event["what"] for event in history] == [event.what for event in question.history]


def test_parquet_has_the_columns_that_only_later_rows_have(run, tmp_path):
    out, kept, *_ = run
    lettered = replace(kept[1], options=("one", "two"), answer="B", answer_type="choice")
    _write_parquet(tmp_path / "parquet", {"train": [kept[0], lettered]}, Pool(out))
    open_one, choice = open_tasks(DataConfig(name="files", path=str(tmp_path / "parquet")), "train")
    assert (open_one.options, open_one.answer_type) == ((), kept[0].answer_type)
    assert (choice.options, choice.answer, choice.answer_type) == (("one", "two"), "B", "choice")


def test_tfds_reads_the_release_too(run):
    import tensorflow_datasets as tfds

    out, kept, _, counts = run
    builder = tfds.builder_from_directory(out / "release" / "tfds" / "mifg_qa" / "1.0.0")
    assert {name: split.num_examples for name, split in builder.info.splits.items()} == counts
    examples = {row["uid"].decode(): row for split in counts for row in builder.as_data_source(split)}
    pool = Pool(out)
    for question in kept:
        row = examples.pop(question.uid)
        assert list(row["images"]) == [pool.data(image) for image in question.images]
        assert (row["question"].decode(), row["answer"].decode(), bool(row["several"])) == (
            question.text, question.answer, question.several,
        )  # fmt: skip
        assert (
            json.loads(row["history"])[-1]["what"] == "kept"
            and json.loads(row["evidence"])[0]["asks"] == question.evidence[0].asks
        )
    assert examples == {}


@pytest.mark.slow(5)
def test_checksums_hold_and_another_process_writes_the_same_bytes(run, tmp_path):
    out, kept, *_ = run
    checked = subprocess.run(["sha256sum", "--strict", "-c", "SHA256SUMS"], cwd=out / "release", capture_output=True, text=True)
    files = {p.relative_to(out).as_posix(): p.read_bytes() for p in (out / "release").rglob("*") if p.is_file()}
    assert checked.returncode == 0 and checked.stdout.count(": OK") == len(files) - 1
    shutil.copytree(out, tmp_path / "run")
    (tmp_path / "run" / "release" / "odd").write_text("what is left of an earlier release")
    code = """if True:
        import json, pathlib, sys
        from imagent_jax.curation.question import Question
        from imagent_jax.curation.release import release
        from imagent_jax.curation.settings import ReleaseSettings
        out = pathlib.Path(sys.argv[1])
        kept = [q for q in map(Question.from_json, open(out / "questions.jsonl")) if q.history[-1].what != "dropped"]
        release(out, kept, json.load(open(out / "funnel.json")), ReleaseSettings(test=0.3), 0)
    """
    env = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "7"}
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "run")], env=env, check=True, timeout=300)
    written = tmp_path / "run"
    assert {p.relative_to(written).as_posix(): p.read_bytes() for p in (written / "release").rglob("*") if p.is_file()} == files


def test_the_card_says_where_everything_comes_from(run):
    out, kept, funnel, counts = run
    text, pool = (out / "release" / "README.md").read_text(), Pool(out)
    assert text.startswith("# MIFG-QA 1.0.0\n") and f"{counts['train']} train, {counts['test']} test" in text
    for image in {image for question in kept for image in question.images}:
        assert f"- `{image}`: {pool.pictures[image].origin} (see tiny/assets/world/README.md)" in text
    kinds = {question.kind: sum(other.kind == question.kind for other in kept) for question in kept}
    assert all(f"| {kind} | {count} |" in text for kind, count in kinds.items())
    answers = [event.facts for question in kept for event in question.history if event.what == "answered"]
    at_a_glance = [facts["right"] for facts in answers if not facts["tools"]]
    assert f"- at a glance: {100 * np.mean(at_a_glance):.1f} % of {len(at_a_glance)} answers" in text or any(
        event.what == "repaired" for question in kept for event in question.history
    )
    assert f"{funnel['proposed']} proposals, {funnel['kept']} kept" in text and "Not measured." in text
    assert f"- {sum(not q.several for q in kept)} questions say that one image is enough" in text


def test_a_release_without_questions_or_without_a_test_split_is_told(run, tmp_path):
    out, kept, funnel, _ = run
    with pytest.raises(ValueError, match="there is nothing to release"):
        release(out, [], funnel, ReleaseSettings(), 0)
    shutil.copytree(out, tmp_path / "run")
    assert release(tmp_path / "run", kept, funnel, ReleaseSettings(test=0.0), 0) == {"train": len(kept), "test": 0}
    assert "There is no test split" in (tmp_path / "run" / "release" / "README.md").read_text()
    assert not (tmp_path / "run" / "release" / "jsonl" / "test.jsonl").exists()


def test_the_card_has_a_histogram_of_difficulty_and_what_people_saw(run):
    out, kept, funnel, _ = run
    rates = [(0.0, 0.0), (0.25, 0.5), (0.75, 0.75), (1.0, 0.0)]
    some = [
        question.after(Event("policy", "measured", {"with tools": a, "without": b, "rollouts": 4}))
        for question, (a, b) in zip(kept, rates, strict=False)
    ]
    some[0] = some[0].after(Event("review:anna", "accepted"))
    text = card(ReleaseSettings(), {"train": some, "test": []}, Pool(out), funnel)
    rows = [
        "| 0 to 20 % | 1 | 2 |",
        "| 20 to 40 % | 1 | 0 |",
        "| 40 to 60 % | 0 | 1 |",
        "| 60 to 80 % | 1 | 1 |",
        "| 80 to 100 % | 1 | 0 |",
    ]
    assert "\n".join(rows) in text and "1 of 4 questions were seen by a person." in text
    mended = some[1].after(Event("review:anna", "mended", {"changes": {"answer": "9"}}), answer="9")
    assert "pass_rate" not in row_of(mended)  # it was that of another answer
    assert [row_of(question)["pass_rate"] for question in some] == [a for a, _ in rates] and "pass_rate" not in row_of(kept[0])


# ---- difficulty -----------------------------------------------------------------------------------------------------------


RATES = {
    "hard": (0.0, 0.0),
    "easy": (1.0, 1.0),
    "some": (0.5, 0.5),
    "tools": (1.0, 0.0),
    "worse": (0.0, 0.25),
    "few": (0.25, 0.75),
}


class Told:
    """Pass rates that a test wrote down, by the answer of the question."""

    Settings, asked = PolicyRatesSettings, []

    def __init__(self, cfg):
        self.cfg = cfg

    def pass_rate(self, questions, k, tools):
        assert k == 4
        Told.asked.append((len(questions), tools))
        return [RATES[task.answer][0 if tools else 1] for task in questions]


class Same(Told):
    """Another policy, with the settings of the first."""


def test_questions_that_are_always_or_never_answered_are_dropped_unless_tools_help(run, tmp_path):
    pool, cfg = Pool(run[0]), DifficultySettings(policy="test_curation_release:Told")
    images = tuple([*pool.pictures][:2])
    questions = [ask("?", name, uid=name, images=images, evidence=(), history=(Event("pipeline", "kept"),)) for name in RATES]
    Told.asked.clear()
    for repeat in range(2):  # the second time reads what was written
        done = list(measured(questions, pool, cfg, RateFile(tmp_path / "rates.jsonl"), lambda words: None))
        assert [question.uid for question in done if is_kept(question)] == ["some", "tools", "few"]
        assert Told.asked == [(6, True), (6, False)], repeat
    assert done[3].history[-1].facts == {"with tools": 1.0, "without": 0.0, "rollouts": 4}
    assert done[1].history[-1].by == "filter:difficulty" and "100 % right with tools" in done[1].history[-1].facts["why"]
    more = [*questions, ask("??", "some", uid="new", images=images, evidence=(), history=(Event("pipeline", "kept"),))]
    assert len(list(measured(more, pool, cfg, RateFile(tmp_path / "rates.jsonl"), lambda words: None))) == 7
    assert Told.asked[2:] == [(1, True), (1, False)]
    other, shown = replace(cfg, policy="test_curation_release:Same"), replace(questions[2], images=images[::-1])
    for asked, settings in ((more, other), ([shown], cfg)):  # another policy of the same settings, the same words about others
        list(measured(asked, pool, settings, RateFile(tmp_path / "rates.jsonl"), lambda words: None))
    assert Told.asked[4:] == [(7, True), (7, False), (1, True), (1, False)]


def test_the_policy_answers_k_times_with_all_tools_or_none_and_faults_do_not_count(monkeypatch):
    asked = []

    class Collector:
        def collect(self, params, tasks, *, group_size, seed, temperature, slots):
            asked.append(([task.tools for task in tasks], group_size, seed, temperature, slots))
            ends = [EndReason.ANSWERED, EndReason.FAULT, EndReason.TRUNCATED, EndReason.ANSWERED]
            groups = [[SimpleNamespace(task=t, right=i == 0, end=e, error="disk") for i, e in enumerate(ends)] for t in tasks]
            return SimpleNamespace(trajectories=groups if params == "weights" else [group[1:2] for group in groups])

    import jax

    mesh = jax.make_mesh((1,), ("data",))
    policy = SimpleNamespace(collector=Collector(), params="weights", mesh=mesh)
    monkeypatch.setattr("imagent_jax.runs.loading.load_policy", lambda path, settings: (policy,))
    rates = PolicyRates(PolicyRatesSettings(slots=3, seed=5, temperature=0.7))
    tasks = [task_at(0, "test", n) for n in range(2)]
    assert rates.pass_rate(tasks, 4, True) == rates.pass_rate(tasks, 4, False) == [1 / 3, 1 / 3]
    assert asked == [([None, None], 4, 5, 0.7, 3), ([(), ()], 4, 5, 0.7, 3)]
    policy.params = "broken"
    with pytest.raises(ValueError, match="All rollouts of tiny_world/test/0/0 ended with an environment error: disk"):
        rates.pass_rate(tasks, 4, True)


def test_groups_of_a_run_are_those_of_its_questions(run):
    out, kept, *_ = run
    groups = {group.name: group.images for group in make_groups(tiny_settings(out.parent).groups, Pool(out), 0)}
    assert all(groups[question.group] == question.images for question in kept)
