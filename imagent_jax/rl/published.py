"""The rewards of Visual-ARFT (arXiv 2505.14246) as its released trainer computes them, to be compared with ours.

They read the text of the first turn alone, and nothing that was executed. A row says in `task.meta["step"]` what its gold is:
"problem", "code", "query" or "answer". A turn's steps are the tags of the paper, or our own call of `python` or `search`, which
stands for `<code>` and `<search>`; text without any step is a problem. Every reward abstains for rows of other steps.
"""

import re
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

from imagent_jax.chat import QWEN
from imagent_jax.scoring import score
from imagent_jax.types import ToolError, Trajectory

CODE_REWARD = 0.9
"""What code is paid, whatever it says."""
LEAST_SIMILARITY = 0.5
"""Below it a query is paid nothing."""
TURNS = ("rotation90", "rotation180")
"""Problems that earn half a point alone where the gold has one more."""
_TAGS = {"problem": "problem", "code": "code", "search": "query", "answer": "answer"}
_CALLS = {"python": ("code", "code"), "search": ("query", "query")}


class Step(NamedTuple):
    """A step of a turn: what sort of step, and its text."""

    sort: str
    text: str


def steps_of(text: str) -> list[Step]:
    """Return the steps in a turn's text, those in the tags of the paper first, then a call."""
    text = QWEN.without_end(text)
    found = [Step(sort, body.strip()) for tag, sort in _TAGS.items() for body in re.findall(f"<{tag}>(.*?)</{tag}>", text, re.S)]
    if QWEN.makes_call(text):
        try:
            call = QWEN.parse_call(text)
        except ToolError:
            return found
        sort, argument = _CALLS.get(call.name, ("", ""))
        return [*found, *([Step(sort, str(call.arguments.get(argument, "")))] if sort else [])]
    return found or [Step("problem", text.strip())]


def _of(t: Trajectory) -> tuple[str | None, list[Step]]:
    return t.task.meta.get("step"), steps_of(t.turns[0].text if t.turns else "")


def published_code(t: Trajectory) -> float | None:
    """Return 0.9 on code rows, whatever the turn says: 0 only where it answers or names a problem in tags."""
    sort, steps = _of(t)
    if sort != "code":
        return None
    text = t.turns[0].text if t.turns else ""
    return 0.0 if any(step.sort == "answer" for step in steps) or "<problem>" in text else CODE_REWARD


def problem_set(t: Trajectory) -> float | None:
    """Return 1 for the gold's set of problems, 0.5 for its turn of 90 or 180 degrees alone where it has one more, else 0."""
    sort, steps = _of(t)
    if sort != "problem":
        return None
    found = [_names(step.text) for step in steps if step.sort == "problem"]
    gold, said = _names(t.task.answer), found[0] if found else []
    if said == gold:
        return 1.0
    return 0.5 if len(gold) == 2 and any(said == [turn] and turn in gold for turn in TURNS) else 0.0


def _names(text: str) -> list[str]:
    """Return the names of problems in a text such as "{'rotation90', 'dark'}" or "rotation90 dark", sorted."""
    return sorted(re.findall(r"[a-z]+\d*", text.lower()))


def published_answer(t: Trajectory) -> float | None:
    """Return the set-F1 of the answer on answer rows; 0 where the turn writes code, searches or names a problem in tags."""
    sort, steps = _of(t)
    if sort != "answer":
        return None
    answers = [step.text for step in steps if step.sort == "answer"]
    if any(step.sort in ("code", "query") for step in steps) or "<problem>" in t.turns[0].text:
        return 0.0
    text = answers[0] if answers else QWEN.without_end(t.turns[0].text)
    return max(score(text, gold, "set_f1") for gold in t.task.answers)


def published_query(t: Trajectory) -> float | None:
    """Return the similarity of the query to the gold on query rows, 0 below `LEAST_SIMILARITY` or where the turn answers.

    The paper compares embeddings of all-MiniLM-L6-v2. The default here is `similarity`, which needs no model.
    """
    sort, steps = _of(t)
    if sort != "query":
        return None
    queries = [step.text for step in steps if step.sort == "query"]
    if not queries or any(step.sort == "answer" for step in steps):
        return 0.0
    value = similarity(queries[0], t.task.answer)
    return value if value >= LEAST_SIMILARITY else 0.0


def similarity(a: str, b: str) -> float:
    """Return the cosine of two texts' counts of words and of groups of three characters in words."""

    def counts(text: str) -> Counter:
        words = re.findall(r"\w+", text.lower())
        return Counter(words) + Counter(f" {word} "[i : i + 3] for word in words for i in range(len(word)))

    x, y = counts(a), counts(b)
    norm = (sum(v * v for v in x.values()) * sum(v * v for v in y.values())) ** 0.5
    return sum(x[key] * y[key] for key in x.keys() & y.keys()) / norm if norm else 0.0


def published_format(t: Trajectory) -> float | None:
    """Return 1 where the first turn is one step of the row's sort and nothing beside it but a thought, else 0."""
    sort, steps = _of(t)
    if sort is None:
        return None
    text = t.turns[0].text if t.turns else ""
    alone = re.sub(r"<think>.*?</think>|<tool_call>.*?</tool_call>", "", QWEN.without_end(text), flags=re.S)
    for tag in _TAGS:
        alone = re.sub(f"<{tag}>.*?</{tag}>", "", alone, flags=re.S)
    plain = sort == "problem" and "<" not in QWEN.without_end(text)
    return float([step.sort for step in steps] == [sort] and (plain or not alone.strip()))


PUBLISHED: dict[str, Callable[[Trajectory], float | None]] = {
    "published_code": published_code, "problem_set": problem_set, "published_answer": published_answer,
    "published_query": published_query, "published_format": published_format,
}  # fmt: skip
