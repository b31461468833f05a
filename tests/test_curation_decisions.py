"""Decisions of reviewers: agreement as scikit-learn computes it, a log that loses nothing, and the questions that remain."""

import json
import sqlite3
import subprocess
import sys
from collections import Counter
from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest
from review_folder import make_folder
from sklearn.metrics import cohen_kappa_score

from imagent_jax.curation.decisions import (
    BLIND,
    VERDICTS,
    Decision,
    Decisions,
    export,
    kappa,
    mend,
    read_questions,
    reviewed,
    settle,
)
from imagent_jax.curation.question import Event, Evidence


@pytest.mark.parametrize("seed", range(8))
def test_kappa_is_that_of_scikit_learn(seed):
    rng = np.random.default_rng(seed)
    first = rng.choice(VERDICTS, 60, p=[0.7, 0.1, 0.1, 0.1])
    second = np.where(rng.random(60) < rng.random(), first, rng.choice(VERDICTS, 60))
    assert kappa(list(first), list(second)) == pytest.approx(cohen_kappa_score(first, second), abs=1e-12)


def test_kappa_is_undefined_where_nobody_ever_differs_in_label():
    assert kappa([], []) is None and kappa(["accept"] * 5, ["accept"] * 5) is None
    assert kappa(["accept", "reject"], ["reject", "accept"]) == -1.0


@pytest.fixture
def folder(tmp_path):
    make_folder(tmp_path / "made", 6)
    return tmp_path / "made"


@pytest.fixture
def decisions(folder):
    with closing(Decisions(folder)) as made:
        yield made


def add(decisions, uid, reviewer, verdict, adjudicator=False, id=None, **facts):
    facts = {"reason": "vague"} | facts if verdict == "reject" else facts
    add.count += 1
    decisions.add(id or f"decision {add.count}", Decision(uid, reviewer, verdict, facts, adjudicator))


add.count = 0


def test_questions_that_a_filter_dropped_are_not_reviewed(folder, decisions):
    assert list(decisions.questions) == [f"q/{n}" for n in range(6)]
    lines = (folder / "questions.jsonl").read_text().splitlines()
    (folder / "questions.jsonl").write_text("\n".join([*lines, lines[0]]))
    with pytest.raises(ValueError, match=r"^Line 8 of .*questions.jsonl repeats the uid 'q/0'"):
        read_questions(folder)
    (folder / "questions.jsonl").write_text("\n".join([lines[0], "{}"]))
    with pytest.raises(ValueError, match="Line 2 of .* is no question"):
        read_questions(folder)
    with pytest.raises(ValueError, match="There is no .*; name a folder that imagent curate wrote"):
        read_questions(folder / "pool")


def test_an_id_counts_once_and_the_latest_decision_counts(decisions):
    for _ in range(3):
        add(decisions, "q/1", "anna", "reject", id="the same id")
    add(decisions, "q/1", "anna", "accept")
    add(decisions, "q/1", "anna", "unsure", id="the same id")
    [decision] = decisions.of("q/1")
    assert decision.verdict == "accept" and decisions.progress() == {"anna": 1}
    assert sqlite3.connect(decisions.path).execute("SELECT count(*) FROM log").fetchone() == (2,)


def test_nothing_in_the_log_can_be_changed_or_taken_out(decisions):
    add(decisions, "q/1", "anna", "accept")
    for statement in ("UPDATE log SET verdict = 'reject'", "DELETE FROM log"):
        with pytest.raises(sqlite3.IntegrityError, match="append-only"), sqlite3.connect(decisions.path) as base:
            base.execute(statement)
    assert sqlite3.connect(decisions.path).execute("PRAGMA journal_mode").fetchone() == ("wal",)


WRITER = """
import sys
from pathlib import Path
from imagent_jax.curation.decisions import Decision, Decisions
decisions, name = Decisions(Path(sys.argv[1])), sys.argv[2]
for n in range(60):
    decisions.add(f"{name} decides {n}", Decision(f"q/{n % 6}", name, "accept", {}))
"""


def test_processes_that_write_at_once_lose_nothing(folder, decisions):
    names = ("anna", "ben", "cleo")
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(folder), name]) for name in names]
    assert [writer.wait() for writer in writers] == [0, 0, 0]
    rows = sqlite3.connect(decisions.path).execute("SELECT reviewer, id FROM log").fetchall()
    assert Counter(name for name, _ in rows) == dict.fromkeys(names, 60) and len({id for _, id in rows}) == 180
    decisions.refresh()
    assert decisions.progress() == dict.fromkeys(names, 6)


def test_what_is_no_decision_is_refused(decisions):
    for uid, verdict, facts, words in [
        ("q/9", "accept", {}, "no question 'q/9'"), ("q/1", "maybe", {}, "verdict 'maybe' does not exist"),
        ("q/1", "reject", {"reason": " "}, "a rejection has a reason"), ("q/1", "mend", {}, "nothing is changed"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=words):
            add(decisions, uid, "anna", verdict, **facts)
    assert decisions.progress() == {}


@pytest.mark.parametrize(("changes", "words"), [
    ({"uid": "x"}, "'uid' cannot be mended"), ({"text": "  "}, "the text is empty"), ({"answer": 3}, "the answer is empty"),
    ({"options": ["a", ""]}, "an option is empty"), ({"options": ["a", "b"]}, "the answer is the letter of one, A to B, not '2'"),
    ({"options": ["a"], "answer": "B"}, "A to A, not 'B'"), ({"evidence": [{"image": 1}]}, "another form"),
    ({"options": ["a"], "answer": "A"}, "no list of 2 to 26"), ({"options": ["B", "A"], "answer": "A"}, "means A and B"),
    ({"evidence": [{"image": 3, "box": [0, 0, 5, 5]}]}, "names image 3"),
    ({"evidence": [{"image": 1, "box": [5, 0, 5, 5]}]}, "is empty"),
    ({"evidence": [{"image": 1, "box": [0, 0, 5]}]}, "left, top, right and bottom"), ({"evidence": 5}, "another form"),
    ({"answer": "2"}, "nothing is changed"), ({}, "nothing is changed"),
])  # fmt: skip
def test_a_change_that_gives_no_question_is_refused(folder, changes, words):
    with pytest.raises(ValueError, match=words):
        mend(read_questions(folder)["q/1"], changes)


def test_a_mended_question_is_what_the_reviewer_wrote(folder):
    question = read_questions(folder)["q/1"]
    changes = {"text": " Which? ", "options": ["one", "two "], "answer": "A", "evidence": [{"image": 2, "box": [1, 2, 3, 4]}]}
    wanted = replace(question, text="Which?", options=("one", "two"), answer="A", evidence=(Evidence(2, (1, 2, 3, 4)),))
    assert mend(question, changes) == replace(wanted, answer_type="choice")  # a task with options has no other


def test_a_moved_box_keeps_what_it_shows_and_another_image_does_not(folder):
    question = read_questions(folder)["q/1"]
    first, second = (replace(place, asks="What digit?", shows="7") for place in question.evidence)
    moved = [{"image": 1, "box": [1, 2, 3, 4]}, {"image": 1, "box": [5, 6, 7, 8]}, {"image": 2, "box": [5, 6, 7, 8]}]
    made = mend(replace(question, evidence=(first, second)), {"evidence": moved})
    assert made.evidence == (replace(first, box=(1, 2, 3, 4)), Evidence(1, (5, 6, 7, 8)), Evidence(2, (5, 6, 7, 8)))


def test_a_mended_answer_is_of_its_type_and_options_make_it_a_choice(folder):
    question = replace(read_questions(folder)["q/1"], options=(), answer="4", answer_type="number")
    assert mend(question, {"answer": "5"}).answer == "5"
    with pytest.raises(ValueError, match="'many' is not a number"):
        mend(question, {"answer": "many"})
    made = mend(question, {"options": ["4", "5"], "answer": "B"})
    assert (made.answer_type, made.options, made.answer) == ("choice", ("4", "5"), "B")
    assert mend(made, {"options": [], "answer": "four"}).answer_type == "exact"
    offered = made.after(Event("distractors", "offered", {"type": "number"}))
    assert mend(offered, {"options": [], "answer": "4"}).answer_type == "number"


def test_what_decisions_come_to(folder):
    question = read_questions(folder)["q/1"]

    def state(*verdicts, reviewers=2):
        made = [Decision("q/1", f"r{i}", *(v if isinstance(v, tuple) else (v,))) for i, v in enumerate(verdicts)]
        return settle(question, made, reviewers).state

    four, five = (("mend", {"changes": {"answer": answer}}) for answer in ("4", "5"))
    judge = {name: (name, {}, True) for name in VERDICTS}
    assert [state(), state("accept"), state("reject")] == ["open"] * 3
    assert [state("accept", reviewers=1), state("reject", reviewers=1), state("unsure", reviewers=1)] == [
        "kept",
        "rejected",
        "disagreed",
    ]
    assert state("accept", "accept") == state(four, four) == state("accept", "accept", "accept") == "kept"
    assert state("reject", ("reject", {"reason": "another"})) == "rejected"
    assert {state("accept", "reject"), state(four, five), state("accept", four), state("unsure", "unsure"),
            state("accept", "accept", "reject")} == {"disagreed"}  # fmt: skip
    assert [state("accept", "reject", judge[name]) for name in ("accept", "reject", "unsure")] == [
        "kept",
        "rejected",
        "disagreed",
    ]


def test_the_questions_that_people_kept_with_what_they_did(folder, decisions):
    with pytest.raises(ValueError, match="nobody has reviewed it yet"):
        next(reviewed(folder / "pool"))
    changed = {"answer": "7"}
    for uid, anna, ben in [
        ("q/0", "accept", "accept"),
        ("q/1", "mend", "accept"),
        ("q/2", "reject", "reject"),
        ("q/3", "accept", "reject"),
    ]:
        add(decisions, uid, "anna", anna, **({"changes": changed} if anna == "mend" else {}))
        add(decisions, uid, "ben", ben)
    add(decisions, "q/4", "anna", "accept")
    add(decisions, "q/0", "ben", BLIND, answer="1")
    assert decisions.disputed() == ["q/1", "q/3"]
    add(decisions, "q/1", "cleo", "mend", adjudicator=True, changes=changed)
    first, second = reviewed(folder)
    before = decisions.questions
    assert first == before["q/0"].after(Event("review:anna", "accepted")).after(Event("review:ben", "accepted", {"answer": "1"}))
    assert second.answer == "7" and second.history[:-3] == before["q/1"].history
    assert second.history[-3:] == (
        Event("review:anna", "mended", {"changes": changed}), Event("review:ben", "accepted"),
        Event("review:cleo", "mended", {"changes": changed, "adjudicator": True}),
    )  # fmt: skip
    assert [q.uid for q in reviewed(folder, reviewers=1)] == ["q/0", "q/1", "q/4"]
    assert decisions.disputed() == ["q/1", "q/3"]  # an adjudicator can look again
    lines = [json.loads(line) for line in export(folder).read_text().splitlines()]
    assert [(line["question"], line["reviewer"], line["verdict"]) for line in lines[:4]] == [
        ("q/0", "anna", "accept"), ("q/0", "ben", "accept"), ("q/1", "anna", "mend"), ("q/1", "ben", "accept"),
    ]  # fmt: skip
    assert len(lines) == 10 and lines[1]["blind"] == "1" and lines[2]["facts"] == {"changes": changed}
    assert {line["question"]: line["state"] for line in lines} == {
        "q/0": "kept",
        "q/1": "kept",
        "q/2": "rejected",
        "q/3": "disagreed",
        "q/4": "open",
    }


def test_agreement_is_of_reviewers_and_of_what_both_decided(decisions):
    pairs = [("accept", "accept"), ("accept", "reject"), ("reject", "reject"), ("unsure", "accept"), ("accept", "accept")]
    for n, (anna, ben) in enumerate(pairs):
        add(decisions, f"q/{n}", "anna", anna)
        add(decisions, f"q/{n}", "ben", ben)
        add(decisions, f"q/{n}", "cleo", "accept", adjudicator=True)
    add(decisions, "q/5", "anna", "accept")
    [found] = decisions.agreement()
    assert found == {
        "reviewers": ["anna", "ben"],
        "questions": 5,
        "alike": 3,
        "kappa": pytest.approx(cohen_kappa_score(*zip(*pairs, strict=True))),
    }


def test_a_decision_on_another_wording_does_not_count(folder, decisions):
    add(decisions, "q/0", "anna", "accept")
    add(decisions, "q/1", "anna", "accept")
    path = folder / "questions.jsonl"
    path.write_text(path.read_text().replace("<b>0</b>", "0"))
    with closing(Decisions(folder)) as again:
        assert again.progress() == {"anna": 1} and not again.of("q/0") and len(again.of("q/1")) == 1
    path.write_text(path.read_text().replace('"kept"', '"passed"'))  # a longer or other history changes nothing
    with closing(Decisions(folder)) as again:
        assert len(again.of("q/1")) == 1


def test_a_file_that_is_no_database_is_a_sentence(folder):
    (folder / "review.sqlite").write_text("no database" * 100)
    with pytest.raises(ValueError, match="review.sqlite cannot be opened .*; move it away"):
        Decisions(folder)
