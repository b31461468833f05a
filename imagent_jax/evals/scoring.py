"""Scoring of answers: strict, and the same for rewards and for benchmarks."""

import re
import string
from collections import Counter

_LETTER = re.compile(r"\(?([A-Za-z])\)?\.?")
_NUMBER = re.compile(r"[-+]?(\d+(,\d{3})*|\d*)(\.\d+)?")


def normalise(text: str) -> str:
    """Lower case, no punctuation, no articles, single spaces (SQuAD v1.1's evaluation, arXiv 1606.05250)."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def exact(prediction: str, answer: str) -> float:
    """1 where both are the same after `normalise`."""
    return float(normalise(prediction) == normalise(answer))


def choice(prediction: str, answer: str) -> float:
    """1 where the same option is named: 'Image 2' or '2' for an image, 'B', '(b)' or 'B.' for a letter. Nothing else."""

    def option(text: str) -> str:
        text = text.strip()
        if match := _LETTER.fullmatch(text):
            return match.group(1).upper()
        return re.sub(r"^image\s+", "", text.rstrip(".").strip().lower())

    return float(option(prediction) == option(answer))


def number(prediction: str, answer: str) -> float:
    """1 where both are the same number to a relative 1e-6; text around a number is wrong."""

    def value(text: str) -> float | None:
        text = text.strip().rstrip(".")
        return float(text.replace(",", "")) if text and _NUMBER.fullmatch(text) and any(c.isdigit() for c in text) else None

    a, b = value(prediction), value(answer)
    return float(a is not None and b is not None and abs(a - b) <= 1e-6 * max(1.0, abs(b)))


def f1(prediction: str, answer: str) -> float:
    """Token F1 after `normalise` (SQuAD; the measure of the MAT benchmark, arXiv 2505.14246)."""
    a, b = normalise(prediction).split(), normalise(answer).split()
    if not a or not b:
        return float(a == b)
    common = sum((Counter(a) & Counter(b)).values())
    return 2 * common / (len(a) + len(b))


SCORERS = {"exact": exact, "choice": choice, "number": number, "f1": f1}


def score(prediction: str | None, answer: str, answer_type: str) -> float:
    """Score in 0..1; no answer is wrong.

    Raises:
        ValueError: an unknown answer type.
    """
    if answer_type not in SCORERS:
        raise ValueError(f"There is no answer type {answer_type!r}; use one of {', '.join(SCORERS)}.")
    return 0.0 if prediction is None else SCORERS[answer_type](prediction, answer)
