"""Scoring of answers, as a table of cases."""

import re
import string
from collections import Counter

import numpy as np
import pytest

from imagent_jax.scoring import SCORERS, BadReference, exact_match, fold, is_right, normalise, score
from imagent_jax.types import ANSWER_TYPES

TABLE = [
    ("exact", "Red bus", "red  bus.", 1), ("exact", "red", "the red", 0), ("exact", "35", "3.5", 0),
    ("exact", "red", "red .", 1), ("exact", "red", "red..", 0), ("exact", "Straße", " STRASSE", 1), ("exact", "red", ".red", 0),
    ("exact", "5", "-5", 0), ("exact", "A", "the", 0), ("exact", "A", "a", 1), ("exact", "10", "1", 0),
    ("choice", "Image 2", "Image 2", 1), ("choice", "Image 2", "2", 1), ("choice", "2", "image 2.", 1),
    ("choice", "Image 2", "Image 3", 0), ("choice", "Image 2", "Image 12", 0), ("choice", "Image 2", "Image 2 or 3", 0),
    ("choice", "Image 2", "It is Image 2", 0), ("choice", "Image 2", "B", 0), ("choice", "Image 2", "Image", 0),
    ("choice", "B", "b", 1), ("choice", "B", "(B)", 1), ("choice", "B", "B.", 1), ("choice", "B", "B)", 1),
    ("choice", "(B)", "B", 1), ("choice", "B", "(B", 0), ("choice", "B", "A", 0), ("choice", "B", "AB", 0),
    ("choice", "B", "2", 0), ("choice", "B", "Image B", 0), ("choice", "Image 2", " IMAGE  2 . ", 1),
    ("choice", "2", "02", 0), ("choice", "Image 20", "Image 20", 1), ("choice", "Image 2", "Image2", 0),
    ("choice", "B", "(b). ", 1), ("choice", "B", "B,", 0),
    ("number", "7", "7", 1), ("number", "7", "7.0", 1), ("number", "7.0", "+7.", 1), ("number", "7", "-7", 0),
    ("number", "7", "17", 0), ("number", "7", "seven", 0), ("number", "7", "7 tags", 0), ("number", "7", "7 or 8", 0),
    ("number", "1234", "1,234", 1), ("number", "1234", "12,34", 0), ("number", "1234567", "1234,567", 0),
    ("number", "10000000", "10000001", 0), ("number", "0.333333", "0.3333333", 1), ("number", "0.3333", "0.333", 0),
    ("number", "0", "0.0000001", 0), ("number", "7", "nan", 0), ("number", "7", "9" * 400, 0),
    ("number", "7", "77", 0), ("number", "7", "٧", 1), ("number", "0.5", ".5", 1), ("number", "100", "1e2", 0),
    ("number", "0.5", "0.5000004", 1), ("number", "0.5", "0.500001", 0), ("number", "1,234.5", "+1234.5", 1),
    ("number", "9007199254740993", "9007199254740992", 0), ("number", "9007199254740993", "9,007,199,254,740,993.0", 1),
    ("number", "1" * 60, "1" * 59 + "2", 0), ("number", "1" * 60, "1" * 60, 1), ("number", "0.5" + "0" * 60, "0.5", 1),
    ("number", "-0.5", "-.5", 1), ("number", "0.0000000000001", "0.0000000000002", 1), ("number", "7", "7.5", 0),
    ("number", "7", "7..", 0), ("f1", "red red", "red", 2 / 3), ("f1", "an apple", "Apple!", 1),
    ("f1", "a b c d", "b c x", 4 / 6), ("f1", "the red bus", "Red bus", 1), ("f1", "red bus", "red car", 0.5),
    ("f1", "red bus", "a bus", 2 / 3),
    ("f1", "red bus", "green car", 0), ("f1", "red", "red red", 2 / 3), ("f1", "A", "the", 0), ("f1", "A", "a", 1),
    # composed and decomposed, full-width, styled, invisible characters, case beyond ASCII
    ("exact", "Caf\u00e9", "Cafe\u0301", 1), ("exact", "Cafe", "Café", 0), ("f1", "Cafe\u0301", "caf\u00e9!", 1),
    ("exact", "Ϊ́", "\u0390", 1), ("exact", "ΣΟΦΟΣ", "σοφος", 1), ("exact", "İzmir", "izmir", 1), ("exact", "Åse", "A\u030aSE", 1),
    ("exact", "ﬁne", "FINE", 1),
    ("exact", "ABC 12", "ＡＢＣ　１２．", 1), ("exact", "バス", "ﾊﾞｽ｡", 1),
    ("exact", "한국", "\u1112\u1161\u11ab\u1100\u116e\u11a8", 1),
    ("exact", "x", "𝐱", 1), ("exact", "سلام", "ﺳﻼﻡ", 1), ("exact", "red\u00adbus", "\ufeffred\u200bbus", 1),
    ("exact", "❤", "❤\ufe0f", 1),
    ("exact", "10²", "102", 0), ("exact", "x₁", "x1", 0), ("exact", "½", "1/2", 0), ("exact", "red", "\u200b", 0),
    # full stops, quotes, hyphens, minus signs
    ("exact", "红色", "红色。", 1), ("exact", "红色", "红色。。", 0), ("exact", "लाल", "लाल।", 1),
    ("exact", "don't", "don’t", 1),
    ("exact", "-5", "\u22125", 1), ("exact", "5", "\u22125", 0), ("exact", "1990-95", "1990–95", 1),
    ("choice", "B", "（Ｂ）。", 1), ("choice", "2", "Image ２", 1), ("choice", "2", "Image ²", 0),
    ("number", "-5", "\u22125", 1), ("number", "-5", "–５。", 1), ("number", "5", "−5", 0), ("number", "7", "７．０", 1),
    ("number", "1234.5", "１，２３４．５", 1), ("number", "1234567", "1\u202f234\u202f567", 1),
    ("number", "1234", "1\u2009234", 1),
    ("number", "1234567", "1\u202f234,567", 0), ("number", "1234", "12\u00a034", 0), ("number", "1234", "1 234", 0),
    ("number", "-1234.5", "−١٬٢٣٤٫٥", 1), ("number", "102", "10²", 0), ("number", "7", "七", 0),
    ("number", "7", "7\u200e", 1),
    # words and characters
    ("f1", "红色", "红色。", 1), ("f1", "红色的汽车", "一辆红色的汽车", 10 / 12), ("f1", "红色", "蓝色", 0.5),
    ("f1", "赤いバス", "「赤い」バス！", 1),
    ("f1", "3只猫", "３ 只 猫", 1), ("f1", "iPhone手机", "iphone 手", 0.8), ("f1", "รถแดง", "แดง", 6 / 8),
    ("f1", "빨간 버스", "빨간 차", 0.5),
    ("f1", "A型", "型", 2 / 3), ("f1", "à la carte", "A\u0300 la «carte»…", 1), ("f1", "red bus", "“The red—bus”", 0),
    ("f1", "5 €", "5 €!", 1),
    # sets of words, and of items
    ("set_f1", "red bus", "the bus, red!", 1), ("set_f1", "red red bus", "red", 2 / 4), ("set_f1", "red bus", "red red", 2 / 4),
    ("set_f1", "red red bus", "red red bus", 1), ("set_f1", "red bus", "car", 0), ("set_f1", "A", "the", 0),
    ("set_f1", "红色", "红色。", 1), ("set", "cat, dog", "dog; Cat.", 1), ("set", "cat, dog", "cat", 2 / 3),
    ("set", "cat, dog", "cat, cat, cat", 2 / 3), ("set", "cat, dog", "cat, dog, cow, hen", 4 / 6), ("set", "cat", "cat dog", 0),
    ("set", "['rotation90', 'dark']", "{dark, rotation90}", 1), ("set", "[1, 3]", "1\n3", 1), ("set", "1, 3", "[]", 0),
    ("set", "f(x), g(x)", "g(x), f(x)", 1), ("set", "红色、蓝色", "蓝色，红色", 1), ("set", "a, the", "the, a", 1),
    ("set", "قطة، كلب", "كلب؛ قطة", 1),
]  # fmt: skip


@pytest.mark.parametrize("answer_type, answer, prediction, expected", TABLE)
def test_score(answer_type, answer, prediction, expected):
    assert score(prediction, answer, answer_type) == pytest.approx(expected, abs=1e-12)
    assert score(answer, answer, answer_type) == 1.0


@pytest.mark.parametrize("answer_type", ANSWER_TYPES)
@pytest.mark.parametrize("prediction", [None, "", "  \n"])
def test_unanswered_is_wrong(answer_type, prediction):
    reference = "[0, 0, 7, 7]" if answer_type in ("box", "point") else "7"
    assert score(prediction, reference, answer_type) == 0.0 and score(prediction, "", "exact") == 0.0


def test_every_answer_type_of_a_task_has_a_scorer_and_no_other_is_accepted():
    assert tuple(SCORERS) == ANSWER_TYPES
    with pytest.raises(ValueError, match="no answer type 'judge'; use one of exact, choice, number, f1, set_f1, set, box"):
        score("", "7", "judge")


def test_a_reference_that_is_not_of_its_type_is_refused():
    with pytest.raises(ValueError, match="'seven' is not a number; write one like '7'"):
        score("7", "seven", "number")
    with pytest.raises(ValueError, match="'the left one' names no option; write 'Image 2'"):
        score("Image 1", "the left one", "choice")
    with pytest.raises(BadReference, match="' , ' has no item; write items with commas"):
        score(None, " , ", "set")


def mat_f1(prediction, answer):
    """The score of Visual-ARFT's evaluation of the MAT benchmark, from its description: sets of words by lengths of lists."""
    a, b = (squad(text).split() for text in (prediction, answer))
    same = len(set(a) & set(b))
    if a == b:
        return 1.0
    return 2 * (same / len(a)) * (same / len(b)) / (same / len(a) + same / len(b)) if same else 0.0


def test_set_f1_is_that_of_the_mat_benchmark():
    rng = np.random.default_rng(2)
    words = ["red", "bus", "Red!", "the", "car", "a", "bus,"]
    for _ in range(500):
        prediction, answer = (" ".join(rng.choice(words, rng.integers(1, 7))) + " cat" for _ in range(2))
        assert score(prediction, answer, "set_f1") == pytest.approx(mat_f1(prediction, answer), abs=1e-12)


def test_a_box_is_right_from_half_its_area_and_all_else_from_one():
    assert is_right(0.5, "box") and not is_right(0.4999, "box")
    assert all(is_right(1.0, kind) and not is_right(0.999, kind) for kind in ANSWER_TYPES if kind != "box")


def test_published_exact_match_ignores_articles_and_punctuation():
    assert exact_match("The red bus!", "red bus") == 1.0 and exact_match("red car", "red bus") == 0.0
    assert exact_match("a.", "A") == 1.0 and exact_match("the", "A") == 0.0  # nothing of this reference is left


def squad(text):
    """`normalize_answer` of SQuAD's evaluate-v1.1.py."""
    text = "".join(c for c in text.lower() if c not in set(string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def test_ascii_texts_are_normalised_as_in_squad():
    rng = np.random.default_rng(0)
    pieces = [*string.printable, "a", "an", "the", "The", "A.", "-the-", "red", "3.5", " "]
    for _ in range(2000):
        text = "".join(rng.choice(pieces, rng.integers(0, 12)))
        assert normalise(text) == squad(text)
        assert fold(text) == text.lower()


def mlqa_zh(prediction, answer):
    """Token F1 of MLQA's mlqa_evaluation_v1.py for Chinese: Latin words, and single Chinese characters."""

    def tokens(text):
        words, word = [], ""
        for char in text.lower():
            if re.search(r"[\u4e00-\u9fa5]", char):
                words, word = [*words, *word.split(), char], ""
            elif char not in string.punctuation + "，。！？、：；「」《》（）":
                word += char
        return [*words, *word.split()]

    a, b = tokens(prediction), tokens(answer)
    same = sum((Counter(a) & Counter(b)).values())
    return 2 * same / (len(a) + len(b)) if same else 0.0


def test_chinese_is_scored_by_characters_as_in_mlqa():
    rng = np.random.default_rng(1)
    pieces = [*"红蓝色的汽车猫只一，。！（）", "iPhone ", " 12 ", "Bus", " "]
    for _ in range(500):
        prediction, answer = ("".join(rng.choice(pieces, rng.integers(1, 10))) + "猫" for _ in range(2))
        assert score(prediction, answer, "f1") == pytest.approx(mlqa_zh(prediction, answer), abs=1e-12), (prediction, answer)
