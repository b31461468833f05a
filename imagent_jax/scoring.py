"""Scoring of answers, used for rewards and for benchmarks alike."""

import math
import re
import string
from collections import Counter

_OPTION = re.compile(r"(?:image\s+)?([1-9][0-9]*)|\(([a-z])\)|([a-z])\)?", re.IGNORECASE | re.ASCII)
_NUMBER = re.compile(r"[-+]?(?:(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)")


def normalise(text: str) -> str:
    """Return text in lower case without punctuation and articles, with single spaces (SQuAD v1.1, arXiv 1606.05250)."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def _plain(text: str) -> str:
    """Return text case-folded, with single spaces, without one final full stop."""
    return " ".join(text.split()).removesuffix(".").rstrip().casefold()


def exact(prediction: str, answer: str) -> float:
    """Return 1 if both texts are equal up to case, white space and one final full stop, else 0.

    Stricter than SQuAD's `exact_match`, which accepts "3.5" for "35", "-5" for "5" and "the" for "A".
    """
    return float(_plain(prediction) == _plain(answer))


def exact_match(prediction: str, answer: str) -> float:
    """Return 1 if both texts are equal after `normalise`, else 0: SQuAD's exact match, reported beside `f1`."""
    a, b = _or_plain(prediction, answer)
    return float(a == b)


def _or_plain(prediction: str, answer: str) -> tuple[str, str]:
    """Normalise both texts, or only `_plain` them if nothing of the reference would remain (as for the option "A")."""
    rule = normalise if normalise(answer) else _plain
    return rule(prediction), rule(answer)


def choice(prediction: str, answer: str) -> float:
    """Return 1 if both texts name the same option, else 0.

    Accepted forms: 'Image 2' or '2' for an image; 'B', '(b)', 'B)' or 'B.' for a letter. Text around an option is wrong.

    Raises:
        ValueError: the reference names no option.
    """
    expected = _option(answer)
    if expected is None:
        raise ValueError(f"Answer {answer!r} names no option; write 'Image 2', '2' or 'B', or use answer type 'exact'.")
    return float(_option(prediction) == expected)


def _option(text: str) -> str | None:
    match = _OPTION.fullmatch(text.strip().removesuffix(".").rstrip())
    return None if match is None else next(group for group in match.groups() if group).upper()


def number(prediction: str, answer: str) -> float:
    """Return 1 if both texts are the same number ('7' and '7.0'), else 0.

    Integers must be equal, other numbers within a relative 1e-6. Thousands may have commas. Units, fractions, exponents and
    text around a number are wrong.

    Raises:
        ValueError: the reference is not a number.
    """
    expected = _value(answer)
    if expected is None:
        raise ValueError(f"Answer {answer!r} is not a number; write one like '7' or '0.5', or use answer type 'exact'.")
    value = _value(prediction)
    if value is None:
        return 0.0
    if value.is_integer() and expected.is_integer():
        return float(value == expected)
    return float(math.isclose(value, expected, rel_tol=1e-6, abs_tol=1e-12))


def _value(text: str) -> float | None:
    text = text.strip().removesuffix(".")
    if not _NUMBER.fullmatch(text):
        return None
    value = float(text.replace(",", ""))
    return value if math.isfinite(value) else None


def f1(prediction: str, answer: str) -> float:
    """Return token F1 after `normalise` (SQuAD; the measure of the MAT benchmark, arXiv 2505.14246)."""
    a, b = (text.split() for text in _or_plain(prediction, answer))
    return 2 * sum((Counter(a) & Counter(b)).values()) / max(len(a) + len(b), 1)


SCORERS = {"exact": exact, "choice": choice, "number": number, "f1": f1}


def score(prediction: str | None, answer: str, answer_type: str) -> float:
    """Return the score of an answer in 0..1. A missing or blank answer scores 0; a valid reference scores 1 against itself.

    Raises:
        ValueError: unknown answer type, or the reference is not of this type.
    """
    if answer_type not in SCORERS:
        raise ValueError(f"There is no answer type {answer_type!r}; use one of {', '.join(SCORERS)}.")
    return SCORERS[answer_type](prediction or "", answer) if (prediction or "").strip() else 0.0
