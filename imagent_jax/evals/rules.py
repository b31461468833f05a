"""Scoring rules of benchmarks: a published rule as it is, faults included, beside a strict one."""

import re
import string
from collections.abc import Callable
from typing import NamedTuple

from imagent_jax.scoring import exact_match, fold, score
from imagent_jax.scoring.text import choice, f1
from imagent_jax.types import Task

Rule = Callable[[Task, str], float]
"""Scores a reply to a task in 0..1. The reply is what stands in the answer markup, or all text of a reply without it."""


class Metric(NamedTuple):
    """What a benchmark measures, by two rules.

    Attributes:
        published: the benchmark's own rule as it is, faults included; None: it is a language model.
        strict: the same without known faults.
    """

    published: Rule | None
    strict: Rule


# ---- texts ------------------------------------------------------------------------------------------------------------

_FIGURE = re.compile(r"(?:(?<![\w.,])[-+])?\d+(?:,\d{3})*(?:\.\d+)?")


def _figures_kept(text: str) -> str:
    """Return a text in which signs and decimal points of numbers are words, so that no normalisation deletes them."""
    return _FIGURE.sub(lambda m: m[0].replace(",", "").replace("+", "").replace("-", "minus").replace(".", "point"), fold(text))


def best(compare: Callable[[str, str], float]) -> Rule:
    """Return the rule that takes the best score over a task's references."""
    return lambda task, reply: max(compare(reply, answer) for answer in task.answers)


def strict_exact(reply: str, answer: str) -> float:
    """Return 1 if both texts have the same words and the same numbers, else 0.

    Case, punctuation and articles do not count, as in SQuAD. 3.5 is not 35, -5 is not 5, and "the" is not "A".
    """
    return exact_match(_figures_kept(reply), _figures_kept(answer)) if reply.strip() else 0.0


def strict_f1(reply: str, answer: str) -> float:
    """Return SQuAD's token F1, in which every repeated token counts, with numbers as in `strict_exact`."""
    return f1(_figures_kept(reply), _figures_kept(answer)) if reply.strip() else 0.0


def by_type(task: Task, reply: str) -> float:
    """Return the score of a reply by the task's answer type; options by `strict_choice`."""
    if task.answer_type == "choice":
        return strict_choice(task, reply)
    return max(score(reply, answer, task.answer_type) for answer in task.answers)


def open_answer(task: Task, reply: str) -> float:
    """Return the score of a reply by the task's answer type, where a text is compared by `strict_exact`."""
    return best(strict_exact)(task, reply) if task.answer_type == "exact" else by_type(task, reply)


# ---- options ----------------------------------------------------------------------------------------------------------

_BOXED = re.compile(r"\\boxed\{(?:\\text\{)?([^{}]*)\}")
_STATED = re.compile(
    r"\b(?:answer|option|choice)\b(?:\s+is)?\s*:?\s*[*\"'(]*(?P<letter>[A-Za-z])(?![\w'’-])[*\"')]*(?=(?P<rest>.*))", re.I
)
_LED = re.compile(r"\(?([A-Z])[).:]\s+(.+)", re.DOTALL)
_ANOTHER = re.compile(r"\s*(?:or|and|,|/|&)\s*\(?[A-Z]\b")
_ARTICLE_LIKE = "AI"
"""Letters that are words too."""


def option_of(task: Task, reply: str) -> str | None:
    """Return the letter, or the image's number, of the one option that a reply names; None: it names none, or several.

    A reply names an option by the letter alone ("B", "(b)", "B."), by its text alone, by both ("B. red car"), or in a sentence
    such as "The answer is B". A letter that only stands in a sentence counts for nothing, nor does one that begins a word.
    """
    reply, letters = reply.strip().strip("*").strip(), task.letters or [*string.ascii_uppercase, *map(str, range(1, 100))]
    texts = dict(zip(task.letters, task.options, strict=True))
    named = {letter for letter in letters if choice(reply, letter)}
    named |= {letter for letter, text in texts.items() if strict_exact(reply, text)}
    if not named and (led := _LED.fullmatch(reply)) and strict_exact(led[2], texts.get(led[1], "")):
        named = {led[1]}
    if not named:
        named = {text.strip(" ().").upper() for text in _BOXED.findall(reply)}
        for match in _STATED.finditer(reply):
            if _ANOTHER.match(match["rest"]):
                return None
            if _is_named(match["letter"], match["rest"], texts):
                named.add(match["letter"].upper())
        named &= {*letters}
    return named.pop() if len(named) == 1 else None


def _is_named(letter: str, rest: str, texts: dict[str, str]) -> bool:
    """Return whether a letter after "answer is" is an option: nothing follows it, the option's text, or a word after a letter
    that is no word itself."""
    rest = rest.strip()
    if not re.match(r"\w", rest) and (not rest or not re.match(r"[.:)]\s*\w", rest)):
        return True
    if strict_exact(rest.lstrip(" .:)"), texts.get(letter.upper(), "")):
        return True
    return letter.isupper() and (letter not in _ARTICLE_LIKE or not re.match(r"\w", rest))


def strict_choice(task: Task, reply: str) -> float:
    """Return 1 if the reply names exactly one option and it is right, else 0."""
    named = option_of(task, reply)
    return float(named is not None and any(choice(named, answer) for answer in task.answers))


def unread(task: Task, reply: str) -> bool:
    """Return whether a reply to a multiple-choice task names no option, or several."""
    return task.answer_type == "choice" and option_of(task, reply) is None
