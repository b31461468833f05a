"""MMIU (arXiv 2408.02718): 52 tasks over several images, each of which counts equally."""

import re

from imagent_jax.data.formats import Fields, Row
from imagent_jax.evals.benchmark import QUESTION, Benchmark, images_of
from imagent_jax.evals.extraction import plain
from imagent_jax.evals.rules import Metric, strict_choice
from imagent_jax.types import Task

_OPTION = re.compile(r"^\s*\(?([A-Z])\)?\s*[:.]\s*(.+?)\s*$", re.MULTILINE)


def read(row: Row) -> Fields:
    options = [text for _, text in _OPTION.findall(row["options"])]
    question = "\n".join(text for text in (row.pop("context", None), row.pop("question")) if text)
    images = images_of(row, "input_image_path", "images")
    return Fields(question, images, row.pop("output").strip(), options, row.pop("id", None), row.pop("task"))


def template(task: Task) -> str:
    return f"{QUESTION}\n{task.meta['options']}\nPlease answer the question directly with the letter of the option."


def published(task: Task, reply: str) -> float:
    """Return 1 where the option that the judge read out of the reply stands in the reference. Here the reply is what it read.

    Known faults: nothing at all stands in every reference; a row for which the judge failed is left out of the divisor.
    """
    return float(plain(reply).strip("().") in plain(task.answer))


BENCHMARK = Benchmark(
    name="mmiu",
    title="MMIU",
    hub="FanqingM/MMIU-Benchmark",
    needs=("task", "options", "question", "output"),
    read=read,
    metrics={"": Metric(published, strict_choice)},
    template=template,
    fixed=True,
    headline="task",
    judged=True,
)
