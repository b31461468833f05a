"""How an answer is marked in a turn: `<answer>…</answer>`, the same for every model family."""

import re

ANSWER_OPEN, ANSWER_CLOSE = "<answer>", "</answer>"
_STOP_TOKEN = re.compile(r"(?:<\|\w+\|>)?")


def answer_markup(answer: object) -> str:
    """Return an answer as a policy writes it."""
    return f"{ANSWER_OPEN}{answer}{ANSWER_CLOSE}"


def extract_answer(text: str) -> str | None:
    """Return the content of the last `<answer>…</answer>` of a turn, or None where there is none."""
    opened = text.rfind(ANSWER_OPEN, 0, max(text.rfind(ANSWER_CLOSE), 0))
    return None if opened < 0 else text[opened + len(ANSWER_OPEN) :].partition(ANSWER_CLOSE)[0].strip()


def well_formed_answer(text: str) -> bool:
    """Return whether a text has exactly one answer, not blank, with nothing but a stop token after it."""
    once = text.count(ANSWER_OPEN) == text.count(ANSWER_CLOSE) == 1
    answer, closed, rest = text.partition(ANSWER_OPEN)[2].partition(ANSWER_CLOSE)
    return once and bool(closed and answer.strip() and _STOP_TOKEN.fullmatch(rest.strip()))
