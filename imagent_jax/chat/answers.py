"""How an answer is marked in a turn: `<answer>…</answer>`, the same for every model family."""

import re

ANSWER_OPEN, ANSWER_CLOSE = "<answer>", "</answer>"
_ANSWERS = re.compile(rf"{ANSWER_OPEN}((?:(?!{ANSWER_OPEN}).)*?){ANSWER_CLOSE}", re.DOTALL)
_ANSWER_LAST = re.compile(rf"{ANSWER_OPEN}\s*\S.*{ANSWER_CLOSE}\s*(<\|\w+\|>)?\s*\Z", re.DOTALL)


def answer_markup(answer: object) -> str:
    """Return an answer as a policy writes it."""
    return f"{ANSWER_OPEN}{answer}{ANSWER_CLOSE}"


def extract_answer(text: str) -> str | None:
    """Return the content of the last `<answer>…</answer>` of a turn, or None where there is none."""
    answers = _ANSWERS.findall(text)
    return answers[-1].strip() if answers else None


def well_formed_answer(text: str) -> bool:
    """Return whether a text has exactly one answer, not blank, with nothing but a stop token after it."""
    once = text.count(ANSWER_OPEN) == text.count(ANSWER_CLOSE) == 1
    return once and bool(_ANSWER_LAST.search(text))
