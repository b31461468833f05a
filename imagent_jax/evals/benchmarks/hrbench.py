"""HR-Bench 4K and 8K (arXiv 2408.15556): 200 questions each, asked four times with their options in another order."""

from functools import partial

from imagent_jax.data.fields import lettered
from imagent_jax.data.formats import Fields, Row
from imagent_jax.evals.benchmark import QUESTION, Benchmark, images_of, option_lines
from imagent_jax.evals.extraction import chooses, one_word
from imagent_jax.types import Task


def read(row: Row) -> Fields:
    images = images_of(row, "image")
    return Fields(row.pop("question").strip(), images, row.pop("answer"), lettered(row), row.pop("index"), row.pop("category"))


def template(task: Task) -> str:
    return f"{QUESTION}\n{option_lines(task)}\nAnswer the option letter directly."


def question(task: Task) -> str:
    """Return what the four rows of a question share: its text, its options in any order and its category."""
    return "\n".join([task.kind, task.question, *sorted(task.options)])


hrbench = partial(
    Benchmark,
    hub="DreamMr/HR-Bench",
    configs=("hrbench_version_split",),
    needs=("question", "A", "answer", "image", "category"),
    read=read,
    metrics=chooses(one_word),
    template=template,
    question=question,
    headline="category",
    groups=lambda task: {"category": task.kind, "cycle": str(task.meta.get("cycle_category", ""))},
)
HR_4K = hrbench(name="hrbench-4k", title="HR-Bench 4K (800)", split="hrbench_4k")
HR_8K = hrbench(name="hrbench-8k", title="HR-Bench 8K (800)", split="hrbench_8k")
