"""Scores of answers that are boxes and points. Reference and answer are in the same coordinate space, whichever that is."""

import json

import numpy as np
from scipy.optimize import linear_sum_assignment

from imagent_jax.scoring.text import BadReference

_LIMIT = 1e6
"""Greatest absolute value of a coordinate; areas then stay finite."""
_BRACKETS = str.maketrans("()", "[]")
_KEYS = ("bbox_2d", "point_2d")


def coordinates(text: str) -> list[float]:
    """Return the coordinates that a text consists of, in order; [] where the text holds anything else.

    Accepted: JSON lists, nested or not; objects with "bbox_2d" or "point_2d" (Qwen2.5-VL, Qwen3-VL), their other fields unread;
    "(x1,y1),(x2,y2)" (Qwen2-VL); each also as a code block.
    """
    text = text.strip()
    if text.startswith("```"):
        text = text.strip("`").removeprefix("json")
    try:
        pending, found = [json.loads(f"[{text.translate(_BRACKETS)}]")], []
    except (ValueError, RecursionError):
        return []
    while pending:
        item = pending.pop()
        if isinstance(item, dict):
            item = next((item[key] for key in _KEYS if key in item), None)
        if isinstance(item, list):
            pending.extend(reversed(item))
        elif isinstance(item, (int, float)) and not isinstance(item, bool) and abs(item) <= _LIMIT:  # not NaN and infinity
            found.append(float(item))
        else:
            return []
    return found


def box(prediction: str, answer: str) -> float:
    """Return the IoU of a box with the reference: the area of the intersection by that of the union.

    For several boxes, the sum of IoUs under the best one-to-one assignment (Hungarian algorithm) by the larger number of boxes:
    a missing box and a surplus one each cost as much as a wrong one. A box is x1, y1, x2, y2 with x1 < x2 and y1 < y2; one
    that is not has no area.

    Raises:
        BadReference: the reference is no box with an area.
    """
    expected, found = _reference(answer), coordinates(prediction)
    if not found or len(found) % 4:
        return 0.0
    overlaps = iou(np.reshape(found, (-1, 4)), expected)
    return float(overlaps[linear_sum_assignment(overlaps, maximize=True)].sum() / max(overlaps.shape))


def point(prediction: str, answer: str) -> float:
    """Return 1 if a point is in the reference box or on its edge, else 0, as ScreenSpot does (SeeClick, arXiv 2401.10935).

    A box in the place of the point stands for its centre. With several reference boxes, one of them must hold the point.

    Raises:
        BadReference: the reference is no box with an area.
    """
    expected, found = _reference(answer), coordinates(prediction)
    if len(found) not in (2, 4):
        return 0.0
    at = np.reshape(found, (-1, 2)).mean(0)
    return float(np.any(np.all((expected[:, :2] <= at) & (at <= expected[:, 2:]), axis=1)))


def _reference(answer: str) -> np.ndarray:
    """Return boxes [n, 4] of a reference."""
    found = coordinates(answer)
    boxes = np.reshape(found, (-1, 4)) if found and len(found) % 4 == 0 else np.zeros((1, 4))
    if not np.all(boxes[:, :2] < boxes[:, 2:]):
        raise BadReference(
            f"Answer {answer!r} is no box; write the text '[x1, y1, x2, y2]' with x1 < x2 and y1 < y2, in the space in which the "
            "policy answers."
        )
    return boxes


def iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the IoU of every two boxes of a [n, 4] and b [m, 4]: [n, m]."""
    low, high = np.maximum(a[:, None, :2], b[:, :2]), np.minimum(a[:, None, 2:], b[:, 2:])
    area_a, area_b, both = (np.maximum(side, 0).prod(-1) for side in (a[:, 2:] - a[:, :2], b[:, 2:] - b[:, :2], high - low))
    return both / (area_a[:, None] + area_b - both)
