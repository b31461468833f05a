"""Scoring of answers, used for rewards and for benchmarks alike: a scorer for each answer type."""

from imagent_jax.scoring.boxes import box, point
from imagent_jax.scoring.expressions import math
from imagent_jax.scoring.text import BadReference, choice, exact, exact_match, f1, fold, items, normalise, number, set_f1

__all__ = ["SCORERS", "BadReference", "exact_match", "fold", "is_right", "normalise", "number", "score"]

SCORERS = {
    "exact": exact, "choice": choice, "number": number, "f1": f1, "set_f1": set_f1, "set": items, "box": box, "point": point,
    "math": math,
}  # fmt: skip
"""By answer type: a function from an answer and a reference to a score in 0..1."""
_RIGHT_FROM = {"box": 0.5}


def score(prediction: str | None, answer: str, answer_type: str) -> float:
    """Return the score of an answer in 0..1. A missing or blank answer scores 0; a valid reference scores 1 against itself.

    Raises:
        BadReference: the reference is not of this type.
        ValueError: unknown answer type, or it needs a package that is not installed.
    """
    if answer_type not in SCORERS:
        raise ValueError(f"There is no answer type {answer_type!r}; use one of {', '.join(SCORERS)}.")
    value = SCORERS[answer_type](prediction or "", answer)
    return value if prediction and fold(prediction).strip() else 0.0


def is_right(score: float, answer_type: str) -> bool:
    """Return whether an answer with this score is right: a box from an IoU of 0.5 (PASCAL VOC, RefCOCO), all else from 1."""
    return score >= _RIGHT_FROM.get(answer_type, 1.0)
