"""Scoring of answers, as a table of cases."""

import pytest

from imagent_jax.scoring import SCORERS, exact_match, score
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
    ("number", "7", "77", 0), ("number", "7", "٧", 0), ("number", "0.5", ".5", 1), ("number", "100", "1e2", 0),
    ("number", "0.5", "0.5000004", 1), ("number", "0.5", "0.500001", 0), ("number", "1,234.5", "+1234.5", 1),
    ("number", "-0.5", "-.5", 1), ("number", "0.0000000000001", "0.0000000000002", 1), ("number", "7", "7.5", 0),
    ("number", "7", "7..", 0), ("f1", "red red", "red", 2 / 3), ("f1", "an apple", "Apple!", 1),
    ("f1", "a b c d", "b c x", 4 / 6), ("f1", "the red bus", "Red bus", 1), ("f1", "red bus", "red car", 0.5),
    ("f1", "red bus", "a bus", 2 / 3),
    ("f1", "red bus", "green car", 0), ("f1", "red", "red red", 2 / 3), ("f1", "A", "the", 0), ("f1", "A", "a", 1),
]  # fmt: skip


@pytest.mark.parametrize("answer_type, answer, prediction, expected", TABLE)
def test_score(answer_type, answer, prediction, expected):
    assert score(prediction, answer, answer_type) == pytest.approx(expected, abs=1e-12)
    assert score(answer, answer, answer_type) == 1.0


@pytest.mark.parametrize("answer_type", ANSWER_TYPES)
@pytest.mark.parametrize("prediction", [None, "", "  \n"])
def test_unanswered_is_wrong(answer_type, prediction):
    assert score(prediction, "7", answer_type) == 0.0 and score(prediction, "", "exact") == 0.0


def test_every_answer_type_of_a_task_has_a_scorer_and_no_other_is_accepted():
    assert tuple(SCORERS) == ANSWER_TYPES
    with pytest.raises(ValueError, match="no answer type 'judge'; use one of exact, choice, number, f1"):
        score("", "7", "judge")


def test_a_reference_that_is_not_of_its_type_is_refused():
    with pytest.raises(ValueError, match="'seven' is not a number; write one like '7'"):
        score("7", "seven", "number")
    with pytest.raises(ValueError, match="'the left one' names no option; write 'Image 2'"):
        score("Image 1", "the left one", "choice")


def test_published_exact_match_ignores_articles_and_punctuation():
    assert exact_match("The red bus!", "red bus") == 1.0 and exact_match("red car", "red bus") == 0.0
    assert exact_match("a.", "A") == 1.0 and exact_match("the", "A") == 0.0  # nothing of this reference is left
