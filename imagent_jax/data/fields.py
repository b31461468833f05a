"""Fields of a row, once a format has taken them out: answers and their type, options, weights, marks with numbers."""

from __future__ import annotations

import ast
import contextlib
import hashlib
import math
import re
import string
from collections.abc import Iterable, Sequence
from decimal import Decimal
from typing import Any

from imagent_jax.chat import extract_answer
from imagent_jax.data.check import RowError
from imagent_jax.scoring import number
from imagent_jax.types import quote

MARK = "<image>"
"""Stands in a question where an image stands."""
NUMBERED = re.compile(r"<image[ _]?(\d{1,4})>")
"""Names an image by its number."""
_LABELLED = re.compile(r"\s*\(?([A-Z])[.:)]+\s+(.*\S)\s*", re.DOTALL)
"""An option under its letter, such as "A. a dog" or "(A) a dog"."""
_LETTER = re.compile(r"\(?([A-Za-z])\)?\.?")


def answers_of(value: Any, count: int) -> tuple[str, ...]:
    """Return the references of a row with `count` images. One that is a numbered mark becomes "Image 2"."""
    given = value if isinstance(value, list) else [value]
    answers = texts_of(given)
    if not given or len(answers) < len(given):
        raise RowError("no answer", 'the row has no answer; add "answer" as text or number, or as a list of them')
    return tuple(name_images(answer, count) if NUMBERED.fullmatch(answer.strip()) else answer for answer in answers)


def without_markup(answer: Any) -> Any:
    """Return what stands between answer markers, or all of an answer without them."""
    if isinstance(answer, list) and all(isinstance(part, dict) for part in answer):  # content parts of a message
        answer = "".join(str(part.get("text") or "") for part in answer)
    return extract_answer(answer) or answer if isinstance(answer, str) else answer


def listed(answer: Any) -> Any:
    """Return the references of a list of texts that is written as text, as VLMEvalKit does; any other answer as it is."""
    if isinstance(answer, str) and answer.strip()[:1] == "[":
        with contextlib.suppress(ValueError, SyntaxError, RecursionError, MemoryError):
            values = ast.literal_eval(answer.strip())
            if all(plain(value) is not None for value in values) and any(isinstance(value, str) for value in values):
                return values
    return answer


def guess_type(answers: Iterable[str]) -> str:
    """Return the answer type of references of other formats, which name none."""
    if all(re.fullmatch(r"[A-Z]|\([A-Z]\)", answer.strip()) for answer in answers):
        return "choice"
    with contextlib.suppress(ValueError):
        if all(number(answer, answer) for answer in answers):
            return "number"
    return "exact"


def lettered(row: dict[str, Any]) -> list[str | None]:
    """Take the options of columns A, B, ... out of a row. A blank one is absent.

    Raises:
        RowError: a column before the last is absent.
    """
    letters = [letter for letter in string.ascii_uppercase if row.get(letter) is not None and str(row[letter]).strip()]
    if letters != [*string.ascii_uppercase[: len(letters)]]:
        reason = f"the row has options {', '.join(letters)} and none for the letters between; write the options from A on"
        raise RowError("bad options", reason)
    return [plain(row.pop(letter)) for letter in letters]


def options_of(value: Any, answers: Sequence[str], lettered: bool = False) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the options, without letters of their own, and the letters of the right ones. `lettered`: see `formats.Format`."""
    options = texts_of(value) if isinstance(value, list) else ()
    if not 2 <= len(options) <= 26 or len(options) < len(value):
        raise RowError("bad options", '"options" is no list of 2 to 26 texts; write the text of each option')
    letters, found, given = string.ascii_uppercase[: len(options)], [], options
    labelled = [match for option in options if (match := _LABELLED.fullmatch(option))]
    if sorted(labels := [match[1] for match in labelled]) == [*letters]:
        if labels != [*letters]:
            raise RowError(
                "bad options", f"the options begin with the letters {', '.join(labels)}; write them from A on, or none"
            )
        options = tuple(match[2] for match in labelled)
    for answer in map(str.strip, answers):
        meant = {letter for letter, *texts in zip(letters, options, given, strict=True) if answer in map(str.strip, texts)}
        if (match := _LETTER.fullmatch(answer)) and match[1].upper() in letters:
            meant = {match[1].upper()} if lettered else meant | {match[1].upper()}
        if len(meant) != 1:
            raise RowError(
                "answer and options",
                f"the answer {quote(answer)} means {' and '.join(sorted(meant)) or 'none'} of the options; "
                f"write one letter of {letters[0]} to {letters[-1]}, or the text of one option",
            )
        found += meant
    return options, tuple(found)


def shuffled(options: Sequence[str], answers: Sequence[str], key: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return options in an order that depends on `key` alone, and the new letters of the answers."""
    order = sorted(range(len(options)), key=lambda i: hashlib.sha256(f"{key}\n{i}".encode()).digest())
    letters = string.ascii_uppercase
    return tuple(options[i] for i in order), tuple(letters[order.index(letters.index(answer))] for answer in answers)


# ---- other fields -----------------------------------------------------------------------------------------------------


def plain(value: Any) -> str | None:
    """Return text, or a number as decimal digits without an exponent; None for anything else."""
    if isinstance(value, float):
        return format(Decimal(repr(value)), "f") if math.isfinite(value) else None
    return str(value) if isinstance(value, (str, int)) and not isinstance(value, bool) else None


def texts_of(values: Sequence[Any]) -> tuple[str, ...]:
    """Return those of the values that are text or numbers, as text, without blank ones."""
    return tuple(text for value in values if (text := plain(value)) and text.strip())


def text_of(name: str, value: Any, default: str) -> str:
    """Return an optional field; null is the same as absent."""
    if value is None:
        return default
    if (text := plain(value)) is None:
        raise RowError(f"bad {name}", f'"{name}" is {quote(value)}; write text, or leave it out')
    return text


def tools_of(value: Any) -> tuple[str, ...] | None:
    """Return names of tools; None: all."""
    if value is None or (isinstance(value, list) and all(isinstance(name, str) for name in value)):
        return value if value is None else tuple(value)
    raise RowError("bad tools", f'"tools" is {quote(value)}; write a list of names of tools, or leave it out')


def weights_of(value: Any) -> dict[str, float]:
    """Return weights by name of a reward. A weight of null is absent."""
    if value is None:
        return {}
    given = {name: weight for name, weight in value.items() if weight is not None} if isinstance(value, dict) else {"": ""}
    with contextlib.suppress(OverflowError):  # an integer beyond all floats
        if all(isinstance(w, (int, float)) and not isinstance(w, bool) and math.isfinite(w) for w in given.values()):
            return {name: float(weight) for name, weight in given.items()}
    raise RowError("bad reward", f'"reward" is {quote(value)}; write weights by name, such as {{"format": 0}}, or leave it out')


# ---- marks with numbers -----------------------------------------------------------------------------------------------


def name_images(text: str, count: int, place: bool = False) -> str:
    """Return a text whose numbered marks are "Image 2", or, where `place`, the first of each image a mark without number."""
    seen: set[int] = set()

    def name(mark: re.Match) -> str:
        if not 1 <= (number := int(mark[1])) <= count:
            reason = f'"{mark[0]}" names an image that the row, with {count} images, does not have; they are counted from 1'
            raise RowError("marks and images", reason)
        first = number not in seen
        seen.add(number)
        return MARK if place and first else f"Image {number}"

    return NUMBERED.sub(name, text)
