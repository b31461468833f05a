"""Scores of boxes and points, against areas counted on a grid of cells and against every assignment."""

import itertools

import numpy as np
import pytest

from imagent_jax.scoring import BadReference, score
from imagent_jax.scoring.boxes import coordinates

FORMS = [
    ("[1, 2, 3.5, -4]", [1, 2, 3.5, -4]), ("1, 2, 3, 4", [1, 2, 3, 4]),
    ("[[1, 2, 3, 4], [5, 6, 7, 8]]", [1, 2, 3, 4, 5, 6, 7, 8]),
    ("(1,2),(3,4)", [1, 2, 3, 4]), ("(1, 2)", [1, 2]), (' {"bbox_2d": [1, 2, 3, 4], "label": "a (b"}\n', [1, 2, 3, 4]),
    ('```json\n[{"point_2d": [1, 2], "label": "x"}, {"bbox_2d": [3, 4, 5, 6]}]\n```', [1, 2, 3, 4, 5, 6]), ("[]", []), ("", []),
    ("[1, 2", []), ("the box [1, 2, 3, 4]", []), ("[1, true, 3, 4]", []), ("[1, NaN, 3, 4]", []), ("[1, 1e999, 3, 4]", []),
    ('["1", 2, 3, 4]', []), ('{"label": "x"}', []), ("[1, 2, 3, 1000001]", []), ("[" * 5000, []), ("9" * 5000, []), ("null", []),
]  # fmt: skip


@pytest.mark.parametrize(("text", "found"), FORMS)
def test_the_forms_of_coordinates(text, found):
    assert coordinates(text) == found


def cells(box) -> set:
    """The unit cells of a box with whole coordinates."""
    left, top, right, bottom = box
    return {(x, y) for x in range(left, right) for y in range(top, bottom)}


def iou(a, b) -> float:
    return len(cells(a) & cells(b)) / len(cells(a) | cells(b))


def drawn(rng):
    """A box with an area."""
    (left, right), (top, bottom) = (sorted(rng.choice(9, 2, replace=False).tolist()) for _ in range(2))
    return [left, top, right, bottom]


def test_iou_is_that_of_counted_cells():
    rng = np.random.default_rng(0)
    for _ in range(300):
        a, b = drawn(rng), drawn(rng)
        assert score(str(a), str(b), "box") == pytest.approx(iou(a, b), abs=1e-12)
        assert score(str(b), str(b), "box") == 1.0


def test_several_boxes_have_the_best_of_all_assignments():
    rng = np.random.default_rng(1)
    for _ in range(60):
        found, expected = ([drawn(rng) for _ in range(rng.integers(1, 5))] for _ in range(2))
        few, many = sorted([found, expected], key=len)
        best = max(sum(map(iou, few, order)) for order in itertools.permutations(many, len(few)))
        assert score(str(found), str(expected), "box") == pytest.approx(best / len(many), abs=1e-12)


@pytest.mark.parametrize(
    "text", ["[4, 0, 0, 4]", "[0, 4, 4, 0]", "[4, 4, 0, 0]", "[2, 0, 2, 4]", "[1, 2, 3]", "[-1e6, 5, 1e6, 5]", "no"]
)
def test_what_is_no_box_has_no_overlap(text):
    assert score(text, "[0, 0, 4, 4]", "box") == 0.0


def test_a_point_is_right_inside_the_box_and_on_its_edge():
    for x, y in itertools.product(range(-1, 8), repeat=2):
        assert score(f"[{x}, {y}]", "[1, 2, 5, 6]", "point") == float(1 <= x <= 5 and 2 <= y <= 6)
    assert score('{"point_2d": [4, 4]}', "[1, 2, 5, 6]", "point") == 1.0
    assert score("[0, 0, 4, 4]", "[1, 2, 5, 6]", "point") == 1.0 and score("[0, 0, 1, 4]", "[1, 2, 5, 6]", "point") == 0.0
    assert score("[9, 9]", "[[0, 0, 1, 1], [8, 8, 10, 10]]", "point") == 1.0
    assert score("[[2, 3], [4, 5], [2, 3]]", "[1, 2, 5, 6]", "point") == 0.0


@pytest.mark.parametrize("answer_type", ["box", "point"])
@pytest.mark.parametrize(
    "answer", ["7", "[1, 2]", "[3, 0, 3, 4]", "[4, 0, 3, 4]", "[0, 0, 1, 1, 2]", "[[0, 0, 1, 1], [2, 2, 2, 3]]"]
)
def test_a_reference_that_is_no_box_is_refused(answer_type, answer):
    with pytest.raises(BadReference, match=r"is no box; write the text '\[x1, y1, x2, y2\]' with x1 < x2"):
        score("[0, 0, 1, 1]", answer, answer_type)
