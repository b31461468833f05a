"""Mantis-Eval (arXiv 2405.01483): multiple choice and short answers over several images."""

import re

from imagent_jax.data.fields import plain
from imagent_jax.data.formats import Fields, Row
from imagent_jax.evals.benchmark import QUESTION, Benchmark, images_of
from imagent_jax.evals.extraction import bare_option
from imagent_jax.evals.rules import Metric, by_type
from imagent_jax.types import Task

SHORT = (
    "Given the images, answer the following short answer vqa question:\nQ: "
    + QUESTION
    + "\nYou can first give your analysis, and "
    'then give your final answer as "Final Answer:"'
)


def read(row: Row) -> Fields:
    several, options = row.get("question_type") == "multi-choice", row.pop("options", None) or []
    row["options_text"] = str(list(map(str, options)))
    images, answer = images_of(row, "images"), plain(row.pop("answer")) or ""
    if several:
        return Fields(
            row.pop("question"), images, answer.strip("()\n ")[:1], list(map(bare_option, options)), row.pop("id"), "multi-choice"
        )
    return Fields(row.pop("question"), images, answer, None, row.pop("id"), "short-answer")


def template(task: Task) -> str:
    if not task.options:
        return SHORT
    return f"{QUESTION}\nAnswer with the option's letter from the given choices directly.{task.meta['options_text']}"


def final_answer(reply: str) -> str:
    """Return what follows "final answer:", else "the answer is", else "answer:", else the reply."""
    for phrase in ("final answer:", "the answer is", "answer:"):
        if phrase in reply.lower():
            return reply[reply.lower().index(phrase) + len(phrase) :].strip()
    return reply


def published(task: Task, reply: str) -> float:
    """Return 1 for the right option or the same text: lmms-eval.

    Known fault: the option is the first letter of what is said, so that "There are two" is T.
    """
    answer = final_answer(reply)
    if not task.options:
        return float(answer.lower() == task.answer.strip().lower())
    letter = next((char.upper() for char in answer if char.isalpha()), "")
    if letter and ord(letter) - ord("A") < len(task.options):
        return float(letter == task.answer)
    return float(reply.strip() == task.options[ord(task.answer) - ord("A")].strip())


def strict(task: Task, reply: str) -> float:
    """Return the score by answer type of the reply, or of what stands after "Final Answer:", which the prompt asks for."""
    stated = re.split(r"final answer:", reply, flags=re.IGNORECASE)[-1].strip()
    return by_type(task, reply if task.options else stated)


BENCHMARK = Benchmark(
    name="mantis",
    title="Mantis-Eval (217)",
    hub="TIGER-Lab/Mantis-Eval",
    needs=("question_type", "question", "answer", "images"),
    read=read,
    metrics={"": Metric(published, strict)},
    template=template,
    fixed=True,
)
