"""Scoring rules of benchmarks: a published rule as it is, faults included, beside a strict one."""

import re
import string
from collections.abc import Callable, Sequence
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
        whole: the rules read all that the policy wrote, not the reply.
    """

    published: Rule | None
    strict: Rule
    whole: bool = False


# ---- texts ------------------------------------------------------------------------------------------------------------

_FIGURE = re.compile(r"(?:(?<![\w.,)])[-+])?(?:\d+(?:,\d{3})*(?:\.\d+)?|(?<!\w)\.\d+)")
_BETWEEN = re.compile(r"(?<=\d)\s*+([^\w\s])\s*+(?=\d)")
_JOINING = "-/:^*+=.'×÷~"
"""What makes one of two numbers; everything else between them separates."""
_AFTER = re.compile(r"(?<=\w)[+#]")


def _figure(match: re.Match) -> str:
    """Return a number in one form, its sign and decimal point as words: "1,000.50" is "1000point5"."""
    whole, _, part = match[0].replace(",", "").removeprefix("+").partition(".")
    part = part.rstrip("0")
    return f"{whole or '0'}{'point' if part else ''}{part}".replace("-", "minus")


def _figures_kept(text: str) -> str:
    """Return a text in which no normalisation deletes what makes numbers and names differ.

    Signs, decimal points, what joins two numbers (1/2, 10:30) and + or # after a word (C++) become letters of the word. Other
    marks between two numbers become a space.
    """
    text = _BETWEEN.sub(lambda m: f"mark{ord(m[1])}x" if m[1] in _JOINING else " ", _FIGURE.sub(_figure, fold(text)))
    return _AFTER.sub(lambda m: f"mark{ord(m[0])}", text)


def best(compare: Callable[[str, str], float]) -> Rule:
    """Return the rule that takes the best score over a task's references."""
    return lambda task, reply: max(compare(reply, answer) for answer in task.answers)


def strict_exact(reply: str, answer: str) -> float:
    """Return 1 if both texts have the same words and the same numbers, else 0.

    Case, punctuation and articles do not count, as in SQuAD. 3.5 is not 35, -5 is not 5, 1/2 is not 12, and "the" is not "A".
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

_BOXED = re.compile(r"\\boxed\{(?:\\(?:text|math)\w*\{)?([^{}]*)\}")
_MARKS = r"[\s*:：\"'(]*+"
_STATED = re.compile(
    rf"(?:\b(?:answer|option|choice)\b|答案|选项){_MARKS}(?:(?:is\b|是|为){_MARKS})?"
    rf"(?P<letter>[A-Za-z])(?![\w'’-])[*\"')]*(?=(?P<rest>.{{0,2000}}))",
    re.I,
)
_LED = re.compile(r"\(?([A-Z])[).:]\s+(.+)", re.DOTALL)
_ANOTHER = re.compile(r"\s*(?:or|and|,|/|&)\s*\(?(?!I\s+[a-z])([A-Z])\b")
_ARTICLE_LIKE = "AI"
"""Letters that are words too."""
_AFTER_LETTER = re.compile(r"\s*(?:is|was|because|since|as|for|due|given|which|would|should|seems|appears|rather|not)\b|\s*\W")
"""What follows such a letter where it is no word."""
_DENIED_BEFORE = re.compile(r"(?:\b(?:not|cannot|never|neither)|n[’']t)\b[^.,;:\n]*\Z", re.I)
_DENIED_AFTER = re.compile(
    r"\s*(?:is|was|are|can|could|may|must|should|seems|appears|cannot)\b[^.,;:]*?"
    r"\b(?:not|never|wrong|incorrect|false|excluded|eliminated|ruled\s+out)\b"
    r"|\s*(?:cannot|isn[’']t|can[’']t)\b",
    re.I,
)


def option_of(task: Task, reply: str) -> str | None:
    """Return the letter, or the image's number, of the one option that a reply names; None: it names none, or several.

    A reply names an option by the letter alone ("B", "(b)", "B."), by its text alone, by both ("B. red car"), or in a sentence
    such as "The answer is B". A letter that only stands in a sentence counts for nothing, nor does one that begins a word, one
    that is denied ("option B is wrong"), or one with the text of another option.
    """
    reply, letters = reply.strip().strip("*").strip(), task.letters or [*string.ascii_uppercase, *map(str, range(1, 100))]
    texts = dict(zip(task.letters, task.options, strict=True))
    named = _named_alone(reply, letters, texts)
    if not named:
        named = {letter for boxed in _BOXED.findall(reply) for letter in _named_alone(boxed, letters, texts)}
        for match in _STATED.finditer(reply):
            if (another := _ANOTHER.match(match["rest"])) and another[1] in letters:
                return None
            denied = _DENIED_BEFORE.search(reply, max(match.start() - 80, 0), match.start()) or _DENIED_AFTER.match(match["rest"])
            if not denied and _is_named(match["letter"], match["rest"], texts):
                named.add(match["letter"].upper())
        named &= {*letters}
    return named.pop() if len(named) == 1 else None


def _named_alone(text: str, letters: Sequence[str], texts: dict[str, str]) -> set[str]:
    """Return the options that a text names by nothing but a letter, an option's text or both. A letter goes before a text."""
    named = {letter for letter in letters if choice(text, letter)}
    named = named or {letter for letter, option in texts.items() if strict_exact(text, option)}
    if not named and (led := _LED.fullmatch(text.strip())) and strict_exact(led[2], texts.get(led[1], "")):
        named = {led[1]}
    return named


def _is_named(letter: str, rest: str, texts: dict[str, str]) -> bool:
    """Return whether a letter after "answer is" is an option: nothing follows it, the option's text, or a word after a letter
    that is no word itself."""
    rest, said = rest.strip(), rest.strip(" .:)*\"'")
    if said and len(said) < 2 * max(map(len, texts.values()), default=0) + 20:  # else it is no option's text
        if (same := {name for name, text in texts.items() if strict_exact(said, text)}) and letter.upper() not in same:
            return False
        if same:
            return True
    if not re.match(r"\w", rest) and (not rest or not re.match(r"[.:)]\s*\w", rest)):
        return True
    return letter.isupper() and (letter not in _ARTICLE_LIKE or bool(_AFTER_LETTER.match(rest)))


def strict_choice(task: Task, reply: str) -> float:
    """Return 1 if the reply names exactly one option and it is right, else 0."""
    named = option_of(task, reply)
    return float(named is not None and any(choice(named, answer) for answer in task.answers))


def unread(task: Task, reply: str) -> bool:
    """Return whether a reply to a multiple-choice task names no option, or several."""
    return task.answer_type == "choice" and option_of(task, reply) is None
