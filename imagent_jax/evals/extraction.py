"""How published scorers find the option that a reply names. Several benchmarks share each of these rules, faults included."""

import re
import string
from collections.abc import Callable

from imagent_jax.evals.rules import Metric, strict_choice
from imagent_jax.types import Task

Extraction = Callable[[Task, str], str]


def chooses(extract: Extraction) -> dict[str, Metric]:
    """Return the only metric of a multiple-choice benchmark: what `extract` finds is right, beside `strict_choice`."""
    return {"": Metric(lambda task, reply: float(extract(task, reply) in task.answers), strict_choice)}


def letter_and_stop(task: Task, reply: str) -> str:
    """Return a capital letter with a full stop at the beginning of the reply, else the reply: lmms-eval, MIRB.

    Known fault: "(B)" and "The answer is B" name nothing.
    """
    found = re.match(r"\s*([A-Z])\.", reply)
    return found[1] if found else reply


def letter_of_any_case(task: Task, reply: str) -> str:
    """Return what `letter_and_stop` does without case and white space around it: lmms-eval, MuirBench."""
    return letter_and_stop(task, reply).strip().upper()


def vlmevalkit(task: Task, reply: str) -> str:
    """Return the option by the rule of VLMEvalKit without its judge; "Z" (wrong) where it finds none.

    The rule: the one option letter that is a word, among the last four words; then "answer is" and A to D; then the one option
    whose text stands in a short reply. Known faults: the article "A" can be an option; with a judge that fails three times, an
    option is drawn at random.
    """
    letters, words = task.letters or "ABCD", _words(reply)
    named = [letter for letter in letters if letter in words]
    if len(named) == 1 and words.index(named[0]) > len(words) - 5:
        return named[0]
    found = re.search(r"answer\s+is\s+\**([ABCD])\**", reply, re.IGNORECASE)
    if found and found[1].upper() in letters:
        return found[1].upper()
    return by_text(task, reply, 2 * sum(map(len, task.options))) or "Z"


def one_word(task: Task, reply: str) -> str:
    """Return the one option letter that is a word of a reply, else the one option whose text stands in it: lmms-eval, HR-Bench.

    Known fault: where neither applies, a judge is asked, and without one the published code stops; here "Z" is wrong.
    """
    named = [letter for letter in task.letters if letter in _words(reply)]
    return named[0] if len(named) == 1 else by_text(task, reply) or "Z"


def _words(reply: str) -> list[str]:
    return re.sub(r"[.()\[\],:;!*#{}]", " ", reply).split()


_PREFIXES = (
    "The best answer is", "The correct answer is", "The answer is", "The answer", "The best option isThe correct option is",
    "Best answer:Best option:",
)  # fmt: skip


def first_capital(task: Task, reply: str) -> str:
    """Return the first of A to E anywhere in a reply, after four phrases are deleted: MME-RealWorld, TreeBench.

    Known faults: a capital that begins a word is an option ("Based on the image" is B); the published list of eight phrases lacks
    two commas, so that four are never found ("Best answer: C" is B).
    """
    reply = reply.strip()
    for prefix in _PREFIXES:
        reply = reply.replace(prefix, "")
    found = re.search("[ABCDE]", reply)
    return found[0] if found else next((letter for letter in "ABCDE" if reply.lower() in f"({letter})".lower()), "")


def by_text(task: Task, reply: str, longest: float = float("inf")) -> str | None:
    """Return the letter of the one option whose text stands in a reply of at most `longest` characters."""
    if len(reply) > longest:
        return None
    found = [a for a, text in zip(task.letters, task.options, strict=True) if text.lower() in reply.lower()]
    return found[0] if len(found) == 1 else None


def plain(text: str) -> str:
    """Return a text in lower case without white space around it."""
    return text.strip().lower()


def bare_option(text: str) -> str:
    """Return an option without the label before it: "(A) red", "A. red" and "A: red" are "red"."""
    return re.sub(rf"^\s*\(?[{string.ascii_uppercase}](?:\)|[.:])\s*", "", str(text))
