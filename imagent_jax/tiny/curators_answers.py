"""What the embedded agents of curation know: questions about tags, their answers from what is seen, and what words alone give."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from imagent_jax.tiny.world import COLOURS, Tag

Seen = dict[int, tuple[Tag, ...]]
"""Tags that are seen, by number of the image. One image alone: the others of the question are hidden."""
MIDDLE = range(1, 9)
"""Digits that settle no comparison alone: something may be larger, and something smaller."""
SIDE = 1000
"""Boxes count in thousandths of the image."""
HALF = 80
"""Half the side of a box around a tag, in thousandths of the image."""


# ---- answers ----------------------------------------------------------------------------------------------------------

_C = "(" + "|".join(COLOURS) + ")"
_TAG = rf"the {_C} tag in Image (\d+)"


def solve(question: str, seen: Seen) -> list[str]:
    """Return every answer that can be defended from what is seen; [] where nothing can be told."""
    for pattern, answers in _FORMS:
        if found := re.search(pattern, question):
            return list(dict.fromkeys(answers(seen, *found.groups())))
    return []


def _digits(seen: Seen, colour: str, number: str) -> list[int]:
    return [tag.digit for tag in seen.get(int(number), ()) if tag.colour == colour]


def _read(seen: Seen, colour: str, number: str) -> Iterator[str]:
    yield from map(str, _digits(seen, colour, number))


def _read_any(seen: Seen, number: str) -> Iterator[str]:
    yield from (str(tag.digit) for tag in seen.get(int(number), ()))


def _add(seen: Seen, colour: str, number: str, other: str, second: str) -> Iterator[str]:
    yield from (str(a + b) for a in _digits(seen, colour, number) for b in _digits(seen, other, second))


def _larger(seen: Seen, colour: str, a: str, b: str) -> Iterator[str]:
    mine, its = _digits(seen, colour, a), _digits(seen, colour, b)
    if mine and its:
        yield from [f"Image {n}" for n, one, two in ((a, mine, its), (b, its, mine)) if one[0] >= two[0]]
    elif mine or its:
        alone, other, [digit] = (a, b, mine) if mine else (b, a, its)
        yield from {9: [f"Image {alone}"], 0: [f"Image {other}"]}.get(digit, [])


def _order(seen: Seen, names: str, colour: str) -> Iterator[str]:
    numbers = re.findall(r"\d+", names)
    digits = {n: _digits(seen, colour, n) for n in numbers}
    if all(digits.values()):
        for order in itertools.permutations(numbers):
            if all(digits[a] <= digits[b] for a, b in itertools.pairwise(order)):
                yield ", ".join(f"Image {n}" for n in order)


def _count_images(seen: Seen, colour: str) -> Iterator[str]:
    if len(seen) > 1:
        yield str(sum(any(tag.colour == colour for tag in tags) for tags in seen.values()))


def _count_digits(seen: Seen, a: str, b: str, least: str) -> Iterator[str]:
    if int(a) in seen and int(b) in seen:
        yield str(sum(tag.digit > int(least) for n in (a, b) for tag in seen[int(n)]))


def _having(seen: Seen, colour: str) -> Iterator[str]:
    yield from (f"Image {n}" for n, tags in seen.items() if any(tag.colour == colour for tag in tags))


def _having_large(seen: Seen, colour: str, least: str) -> Iterator[str]:
    yield from (f"Image {n}" for n, tags in seen.items() if any(t.colour == colour and t.digit > int(least) for t in tags))


def _is_larger(seen: Seen, colour: str, number: str, other: str, second: str) -> Iterator[str]:
    mine, its = _digits(seen, colour, number), _digits(seen, other, second)
    if mine and its:
        yield "yes" if mine[0] > its[0] else "no"
    elif mine == [0] or its == [9]:
        yield "no"


def _only_in(seen: Seen, a: str, b: str) -> Iterator[str]:
    if int(a) in seen and int(b) in seen:
        others = {tag.colour for tag in seen[int(b)]}
        yield from (tag.colour for tag in seen[int(a)] if tag.colour not in others)


_FORMS: tuple[tuple[str, Callable[..., Iterator[str]]], ...] = (
    (rf"sum of the digits on {_TAG} and {_TAG}", _add),
    (rf"Add {_TAG} to {_TAG}", _add),
    (rf"larger digit on its {_C} tag, Image (\d+) or Image (\d+)", _larger),
    (rf"Order ((?:Image \d+(?:, | and )?)+) by the digit on their {_C} tag", _order),
    (rf"How many images have an? {_C} tag", _count_images),
    (r"How many tags in Image (\d+) and Image (\d+) together show a digit larger than (\d)", _count_digits),
    (rf"Which image has an? {_C} tag", _having),
    (rf"In which image does the {_C} tag show a digit larger than (\d)", _having_large),
    (rf"digit on {_TAG} larger than that on {_TAG}", _is_larger),
    (r"Which colour of tag is in Image (\d+) but not in Image (\d+)", _only_in),
    (rf"digit is on {_TAG}", _read),
    (rf"[Rr]ead {_TAG}", _read),
    (r"digit is on (?:a|the) tag in Image (\d+)", _read_any),
)


# ---- proposals --------------------------------------------------------------------------------------------------------


def proposals(seen: Seen) -> list[dict[str, Any]]:
    """Return all sound questions about images, as proposals."""
    return [*_all(seen)]


def _all(seen: Seen) -> Iterator[dict[str, Any]]:
    tags = [(n, tag) for n, own in seen.items() for tag in own]
    for n, tag in tags:
        yield _made("read", False, f"What digit is on {_the(n, tag)}?", str(tag.digit), "number", [(n, tag)])
    for (a, one), (b, two) in itertools.combinations(tags, 2):
        if a != b:
            words = f"What is the sum of the digits on {_the(a, one)} and {_the(b, two)}?"
            yield _made("sum", True, words, str(one.digit + two.digit), "number", [(a, one), (b, two)])
            if one.digit in MIDDLE and two.digit in MIDDLE and one.digit != two.digit:
                words = f"Is the digit on {_the(a, one)} larger than that on {_the(b, two)}?"
                yield _made("relate", True, words, "yes" if one.digit > two.digit else "no", "exact", [(a, one), (b, two)])
                if one.colour == two.colour:
                    words = f"Which image has the larger digit on its {one.colour} tag, Image {a} or Image {b}?"
                    larger = a if one.digit > two.digit else b
                    yield _made("compare", True, words, f"Image {larger}", "choice", [(a, one), (b, two)])
    for a, b in itertools.permutations(seen, 2):
        only = [tag for tag in seen[a] if tag.colour not in {other.colour for other in seen[b]}]
        if len(only) == 1:
            words = f"Which colour of tag is in Image {a} but not in Image {b}?"
            yield _made("difference", True, words, only[0].colour, "exact", [(a, only[0])], False)
        large = [(n, tag) for n in (a, b) for tag in seen[n] if tag.digit > 4]
        if a < b and large:
            words = f"How many tags in Image {a} and Image {b} together show a digit larger than 4?"
            yield _made("count", True, words, str(len(large)), "number", large)
    for colour in COLOURS:
        yield from _of_colour(colour, [(n, tag) for n, tag in tags if tag.colour == colour])


def _of_colour(colour: str, having: list[tuple[int, Tag]]) -> Iterator[dict[str, Any]]:
    """Questions about all tags of a colour."""
    article = "an" if colour[0] in "aeiou" else "a"
    if having:
        words = f"How many images have {article} {colour} tag?"
        yield _made("count", True, words, str(len(having)), "number", having, False)
    if len(having) == 1:
        yield _made("locate", False, f"Which image has {article} {colour} tag?", f"Image {having[0][0]}", "choice", having, False)
    if len(having) > 1 and len(large := [one for one in having if one[1].digit > 4]) == 1:
        words = f"In which image does the {colour} tag show a digit larger than 4?"
        yield _made("locate", False, words, f"Image {large[0][0]}", "choice", large)
    if len(having) > 2 and len({tag.digit for _, tag in having}) == len(having):
        *first, last = [f"Image {n}" for n, _ in having]
        words = f"Order {', '.join(first)} and {last} by the digit on their {colour} tag, smallest first."
        order = ", ".join(f"Image {n}" for n, _ in sorted(having, key=lambda one: one[1].digit))
        yield _made("order", True, words, order, "exact", having)


def _the(number: int, tag: Tag) -> str:
    return f"the {tag.colour} tag in Image {number}"


def _made(
    kind: str, several: bool, words: str, answer: str, answer_type: str, places: list[tuple[int, Tag]], digits: bool = True
) -> dict[str, Any]:
    """A proposal. `digits`: the places show digits, else colours."""
    evidence = [
        {
            "image": number,
            "box": around(tag),
            "asks": f"What digit is on the {tag.colour} tag?" if digits else "What colour is the tag?",
            "shows": str(tag.digit) if digits else tag.colour,
        }
        for number, tag in places
    ]
    return {
        "question": words,
        "answer": answer,
        "answer_type": answer_type,
        "kind": kind,
        "several": several,
        "evidence": evidence,
    }


def around(tag: Tag) -> list[int]:
    """Return the box around a tag, in thousandths of the image."""
    x, y = round(SIDE * tag.x), round(SIDE * tag.y)
    return [max(0, x - HALF), max(0, y - HALF), min(SIDE, x + HALF), min(SIDE, y + HALF)]


# ---- words alone ------------------------------------------------------------------------------------------------------

_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
_NUMBER = "(" + "|".join((*_NUMBERS, r"\d+")) + ")"
_FACTS: Mapping[str, int] = {
    "a week has days": 7, "a year has months": 12, "a spider has legs": 8, "an insect has legs": 6, "a triangle has sides": 3,
    "a square has corners": 4, "a hand has fingers": 5, "a hexagon has sides": 6, "a car has wheels": 4,
    "a bicycle has wheels": 2, "a season has months": 3,
}  # fmt: skip
_SUMS: tuple[tuple[str, Callable[[int, int], int]], ...] = (
    (rf"{_NUMBER} plus {_NUMBER}", lambda a, b: a + b),
    (rf"{_NUMBER} minus {_NUMBER}", lambda a, b: a - b),
    (rf"{_NUMBER} times {_NUMBER}", lambda a, b: a * b),
    (rf"(half) of {_NUMBER}", lambda _, b: b // 2),
    (rf"(twice) {_NUMBER}", lambda _, b: 2 * b),
    (rf"{_NUMBER} more than {_NUMBER}", lambda a, b: a + b),
    (rf"{_NUMBER} less than {_NUMBER}", lambda a, b: b - a),
)


def known_from_text(question: str) -> str | None:
    """Return the answer that the words of a question give: stated, computed from numbers in words, or general knowledge."""
    if stated := re.search(r"\b(?:it is|it shows|answer is) (?:an? )?(Image \d+|\w+)", question):
        return stated[1]
    for words, number in _FACTS.items():
        if words in question:
            return str(number)
    for pattern, value in _SUMS:
        if found := re.search(rf"\b{pattern}\b", question):
            return str(value(*(_number(word) for word in found.groups())))
    return None


def _number(word: str) -> int:
    return _NUMBERS.index(word) if word in _NUMBERS else int(word) if word.isdigit() else 0
