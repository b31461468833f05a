"""Filters of questions: what they drop, and what they leave."""

import random
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
from curation_parts import ask, tiny_pictures, tiny_settings

from imagent_jax.curation.filters import Benchmarks, Checks, answer_in_text, balanced, same, without_duplicates
from imagent_jax.curation.making import BadProposal, question_of
from imagent_jax.curation.pipeline import is_kept
from imagent_jax.curation.pool import build_pool
from imagent_jax.curation.question import Evidence
from imagent_jax.curation.settings import AgentSettings, FilterSettings

NONE = SimpleNamespace(has=lambda question: "")


@pytest.mark.parametrize(
    ("text", "answer", "given"),
    [
        ("What digit is on the red tag in Image 2 (it is a 7)?", "7", True),
        ("What digit is on the red tag in Image 7?", "7", False),
        ("How many tags show a digit larger than 4?", "4", False),
        ("How many of the 4 tags are red?", "4", True),
        ("The city is New York. Which city is it?", "New York", True),
        ("Is New or old York shown?", "New York", False),
        ("Which image has more, Image 1 or Image 3?", "Image 3", False),
        ("Which image has more, Image 1 or Image 3? Look at Image 3.", "Image 3", True),
        ("Which image has a red tag? Look at Image 3.", "Image 3", True),
        ("Which image has a red tag?", "Image 3", False),
        ("Is it larger, yes or no?", "yes", False),
        ("Is it larger? The answer is yes.", "yes", True),
        ("Order Image 1, Image 2 and Image 3 by size.", "Image 1, Image 2, Image 3", False),
        ("Order Image 1, Image 2, Image 3 by size.", "Image 1, Image 2, Image 3", False),
        ("Order Image 1, Image 2 and Image 3 by size (Image 3, Image 1, Image 2).", "Image 3, Image 1, Image 2", True),
        ("What is Thai for cat? แมว", "แมว", True),
    ],
)
def test_a_question_that_contains_its_answer_is_found(text, answer, given):
    kind = "choice" if answer.startswith("Image") and "," not in answer else "exact"
    assert answer_in_text(ask(text, answer, answer_type=kind)) is given


def test_options_may_be_in_the_question():
    assert not answer_in_text(ask("Is A or B larger?", "A", options=("red", "blue"), answer_type="choice"))


@pytest.mark.parametrize(("answer", "claim", "equal"), [
    ("7", "7", True), ("seven", "7", False), ("7.0", "7", True), ("The red one.", "red one", True), ("red", "blue", False),
    ("", "red", False), ("cannot tell", "7", False), ("17", "7", False),
])  # fmt: skip
def test_short_answers_are_the_same_as_numbers_or_words(answer, claim, equal):
    assert same(answer, claim) is equal


def test_options_that_training_cannot_read_are_found():
    letters = ask("Which letter is on the red tag?", "B", options=("B", "A", "C"), answer_type="choice")  # text of the first
    names, _, question = found_by(letters)
    assert names == ["options"] and "means A and B of the options" in question.history[-1].facts["why"]
    assert found_by(replace(letters, answer="C"), answers=["C"] * 3)[0] == []


# ---- duplicates and balance -----------------------------------------------------------------------------------------------


def kept(questions):
    return [question.uid for question in questions if not question.history or question.history[-1].what != "dropped"]


RED = ask("What digit is on the red tag in Image 1?", "7", uid="first")


@pytest.mark.parametrize(("changes", "twin"), [
    ({"text": "Look: what digit is on the red tag in Image 1?"}, True),
    ({"text": "Read the tag that is red in the first image.", "answer": "7"}, True),  # the same place and answer
    ({"text": "Read the tag.", "evidence": (Evidence(1, (5, 0, 100, 95)),)}, True),
    ({"text": "Read the tag.", "evidence": (Evidence(1, (60, 60, 160, 160)),)}, False),
    ({"text": "Read the tag.", "answer": "8"}, False),
    ({"text": "Read the tag.", "kind": "count"}, False),
    ({"text": "What digit is on the blue tag in Image 1?", "answer": "3"}, False),
    ({"text": "What digit is on the red tag in Image 2?", "answer": "3", "evidence": (Evidence(2, (0, 0, 100, 100)),)}, False),
    ({"text": RED.text.replace("1", "2"), "images": ("b", "a"), "evidence": (Evidence(2, (0, 0, 99, 99)),)}, True),
    ({"images": ("a", "c")}, False),
    ({"images": ("b", "a")}, False),  # the same words, but Image 1 is the other picture
])  # fmt: skip
def test_a_question_like_an_earlier_one_about_the_same_images_is_a_duplicate(changes, twin):
    second = ask(**{"text": RED.text, "answer": "7", "uid": "second", **changes})
    done = list(without_duplicates([RED, second], FilterSettings()))
    assert kept(done) == (["first"] if twin else ["first", "second"])
    if twin:
        assert "first is the same" in done[1].history[-1].facts["why"] and done[1].history[-1].by == "filter:duplicate"


def test_no_answer_stands_far_above_its_even_share():
    rng = random.Random(0)
    answers = [rng.choice(["1"] * 30 + ["2", "3", "4"]) for _ in range(200)]
    questions = [ask("?", answer, uid=str(i), kind="count") for i, answer in enumerate(answers)]
    questions += [ask("?", "1", uid=f"few{i}", kind="sum") for i in range(19)]
    done = list(balanced(questions, FilterSettings(balance=2.0)))
    left = Counter(question.answer for question in done if question.kind == "count" and (not question.history))
    assert left["1"] == 100 and all(left[a] == answers.count(a) for a in "234")  # 2 times 200 / 4
    assert sum(not q.history for q in done if q.kind == "sum") == 19 and [q.uid for q in done] == [q.uid for q in questions]
    assert kept(done)[:3] == [q.uid for q in questions[:3]]  # the first ones stay


# ---- one question ---------------------------------------------------------------------------------------------------------


class Said:
    """Agents that say what a test wants."""

    def __init__(self, **said):
        self.said, self.asked = {"text": ("?", False), "image": ("?", False), "answers": ["7"] * 3, "crop": "7", **said}, []

    def from_text(self, question):
        self.asked.append("text")
        return self.said["text"]

    def from_image(self, question, number):
        self.asked.append(f"image {number}")
        return self.said["image"]

    def read(self, question, place):
        self.asked.append("crop")
        return self.said["crop"]

    def answer(self, question, name, looks):
        self.asked.append(f"{name}, {looks} looks")
        return self.said["answers"][int(name[-1]) - 1], 0

    def attack(self, question):
        self.asked.append("attack")
        return {"other": "", "vague": False, "why": "because", **self.said.get("attack", {})}


def found_by(question=RED, benchmarks=NONE, settings=None, **said):
    agents = Said(**said)
    checks = Checks(agents, AgentSettings(), settings or FilterSettings(), benchmarks)
    question, found = checks.find(question)
    return [name for name, _ in found], agents.asked, question


def test_a_sound_question_is_asked_in_every_way_and_nothing_is_found():
    names, asked, question = found_by()
    assert names == [] and asked == [
        "text", "crop", "image 1", "image 2", "answerer 1, 3 looks", "answerer 2, 3 looks", "answerer 3, 0 looks", "attack",
    ]  # fmt: skip
    assert [event.what for event in question.history] == [
        "attacked",
        "read",
        "attacked",
        "attacked",
        *["answered"] * 3,
        "attacked",
    ]
    assert "image 1" not in found_by(ask(RED.text, "7", several=False))[1]


@pytest.mark.parametrize(("said", "name"), [
    ({"text": ("7", True)}, "needs_images"), ({"image": ("7", True)}, "needs_several"), ({"crop": "8"}, "box"),
    ({"answers": ["7", "8", "8"]}, "agreement"), ({"attack": {"other": "8"}}, "other_answer"),
    ({"attack": {"vague": True}}, "vague"),
])  # fmt: skip
def test_what_agents_find_names_its_filter(said, name):
    names, _, question = found_by(**said)
    assert names == [name] and question.history[-1].by == f"filter:{name}" and question.history[-1].what == "found"


@pytest.mark.parametrize("said", [
    {"text": ("7", False)}, {"text": ("8", True)}, {"image": ("7", False)}, {"answers": ["7", "7", "8"]},
    {"attack": {"other": "7.0"}},
])  # fmt: skip
def test_a_guess_a_wrong_answer_or_a_minority_finds_nothing(said):
    assert found_by(**said)[0] == []


def test_nobody_is_asked_about_a_question_that_is_found_faulty_unless_the_settings_say_so():
    faulty = ask("It is 7. What is it?", "7", evidence=(Evidence(1, (0, 0, 900, 900), "What?", "7"),))
    names, asked, _ = found_by(faulty)
    assert names == ["answer_in_question", "box"] and asked == []
    names, asked, _ = found_by(faulty, settings=FilterSettings(stop_early=False), text=("7", True))
    assert names == ["answer_in_question", "box", "needs_images"] and len(asked) == 8


# ---- benchmarks -----------------------------------------------------------------------------------------------------------


def test_images_and_wordings_of_benchmarks_are_found(tmp_path):
    tiny_pictures(tmp_path)
    cfg = tiny_settings(tmp_path)
    [theirs, *_] = sorted((tmp_path / "pictures_test").glob("*.jpg"))
    (tmp_path / "pictures" / "copy.jpg").write_bytes(theirs.read_bytes())
    text = "In the harbour of the old town, which of the two ships carries more masts?"
    (tmp_path / "bench.jsonl").write_text(f'{{"question": "{text}", "answer": "1"}}\n{{"odd": 1}}\n')
    pool = build_pool(cfg.pool, 0, tmp_path / "run")
    copy = next(name for name, picture in pool.pictures.items() if picture.origin == "copy.jpg")
    clean = [name for name in pool.pictures if name != copy][:2]
    both = FilterSettings(benchmarks=(str(tmp_path / "pictures_test"), str(tmp_path / "bench.jsonl")), ngram=6)
    benchmarks = Benchmarks(both, pool)
    assert "Image 2 is" in benchmarks.has(ask("Which?", "1", images=(clean[0], copy)))
    assert benchmarks.has(ask("Which?", "1", images=tuple(clean))) == ""
    part = "Say which of the two ships carries more masts today."
    assert "the wording is that of" in benchmarks.has(ask(part, "1", images=tuple(clean)))
    assert benchmarks.has(ask("Which of the ships carries more?", "1", images=tuple(clean))) == ""
    assert found_by(ask(part, "7", images=tuple(clean)), benchmarks)[0] == ["benchmark"]


def test_every_split_of_a_benchmark_counts_and_its_wordings_beside_pictures(tmp_path):
    pool = build_pool(tiny_settings(tiny_pictures(tmp_path)).pool, 0, tmp_path / "run")
    one, two, *others = pool.pictures
    bench = tmp_path / "bench"
    (bench / "images").mkdir(parents=True)
    (bench / "images" / "1.jpg").write_bytes(pool.data(one))
    texts = {split: f"In the {split} of the old harbour, which ship carries more masts?" for split in ("train", "test")}
    for split, text in texts.items():
        (bench / f"{split}.jsonl").write_text(f'{{"question": "{text}", "answer": "1", "images": ["images/1.jpg"]}}\n')
    benchmarks = Benchmarks(FilterSettings(benchmarks=(str(bench),)), pool)
    assert "Image 2 is" in benchmarks.has(ask("Which?", "1", images=(two, one)))
    assert all(text in benchmarks.has(ask(text, "1", images=tuple(others[:2]))) for text in texts.values())
    rows = tmp_path / "rows"
    rows.mkdir()
    (rows / "test.jsonl").write_text(f'{{"question": "Which?", "answer": "1", "images": ["{bench / "images" / "1.jpg"}"]}}\n')
    assert "Image 1 is" in Benchmarks(FilterSettings(benchmarks=(str(rows),)), pool).has(ask("?", "1", images=(one, two)))
    (bench / "images" / "torn.png").write_bytes(b"no")
    with pytest.raises(ValueError, match=r"images/torn\.png of the benchmark .* cannot be compared: it does not decode"):
        Benchmarks(FilterSettings(benchmarks=(str(bench),)), pool)


# ---- proposals ------------------------------------------------------------------------------------------------------------

GOOD = {
    "question": "What is it?", "answer": "7", "answer_type": "number", "kind": "read", "several": False,
    "evidence": [{"image": 1, "box": [0, 0, 10, 10], "asks": "What?", "shows": "7"}],
}  # fmt: skip


def place(**changes):
    return {"evidence": [GOOD["evidence"][0] | changes]}


@pytest.mark.parametrize(("changes", "why"), [
    ({"question": " "}, "is empty"), ({"answer": ""}, "is empty"), ({"evidence": []}, "rests on no place"),
    (place(box=[5, 5, 5, 9]), "is empty or not within"), (place(box=[0, 0, 10, 1001]), "not within"),
    (place(image=3), "names image 3"),
    (place(image=0), "of image 0"), (place(asks=" "), "says not what it shows"), (place(shows=""), "says not what it shows"),
    ({"kind": "guess"}, "does not exist"), ({"answer_type": "set"}, "does not exist"), ({"answer": "seven"}, "seven"),
    ({"answer_type": "choice", "answer": "the first"}, "first"), (place(box=[1, 2]), "lacks a part|unpack"),
    ({"evidence": None}, "lacks"),
])  # fmt: skip
def test_a_proposal_that_is_no_question_says_why(changes, why):
    assert is_kept(question_of(GOOD, "u", ("a", "b"), "g").after(SimpleNamespace(what="kept")))
    with pytest.raises(BadProposal, match=why):
        question_of(GOOD | changes, "u", ("a", "b"), "g")
