"""MME-RealWorld-Lite (arXiv 2408.13257): 1,919 questions on real scenes, five options of which E is "cannot be answered"."""

from imagent_jax.data.formats import Fields, Row
from imagent_jax.evals.benchmark import QUESTION, Benchmark, images_of, option_lines
from imagent_jax.evals.extraction import bare_option, chooses, first_capital
from imagent_jax.types import Task


def read(row: Row) -> Fields:
    images = images_of(row, "bytes", "image")
    options = [bare_option(option.replace("（", "(").replace("）", ")")) for option in row.pop("multi-choice options")]
    return Fields(row.pop("question"), images, row.pop("answer"), options, row.pop("index"), row.pop("category"))


def template(task: Task) -> str:
    return (
        f"{QUESTION} The choices are listed below:\n{option_lines(task, '({letter}) {option}')}\nSelect the best answer to the "
        "above multiple-choice question based on the image. Respond with only the letter (A, B, C, D, or E) of the correct "
        "option.\nThe best answer is: "
    )


def groups(task: Task) -> dict[str, str]:
    """Return the task (Perception, Reasoning), the subtask, and the category, in which all that end in "attribute" are one."""
    category = str(task.meta.get("l2-category", "")).lower()
    category = f"{category.split('/')[0]}/attribute" if "attribute" in category else category
    kind = "Perception" if "perception" in task.kind.lower() else "Reasoning"
    subtask = task.kind.split("/")[-1]
    return {"task": kind, "subtask": f"{kind}/{subtask}", "category": f"{kind}/{subtask}/{category}"}


BENCHMARK = Benchmark(
    name="mme-realworld-lite",
    title="MME-RealWorld-Lite (1,919)",
    hub="yifanzhang114/MME-RealWorld-lite-lmms-eval",
    split="train",
    needs=("question", "multi-choice options", "answer", "bytes|image"),
    read=read,
    metrics=chooses(first_capital),
    template=template,
    groups=groups,
)
