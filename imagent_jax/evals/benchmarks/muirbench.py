"""MuirBench (arXiv 2406.09411): multiple choice over several images, some of which are the options."""

from imagent_jax.data.formats import Fields, Row
from imagent_jax.evals.benchmark import Benchmark, images_of, options_with_images, with_letter
from imagent_jax.evals.extraction import chooses, letter_and_stop
from imagent_jax.types import Task


def read(row: Row) -> Fields:
    question, options = options_with_images(row.pop("question"), row.pop("options"))
    return Fields(question, images_of(row, "image_list"), row.pop("answer"), options, row.pop("idx", None), row.pop("task"))


def groups(task: Task) -> dict[str, str]:
    return {"task": task.kind, "relation": str(task.meta.get("image_relation", ""))}


BENCHMARK = Benchmark(
    name="muirbench", title="MuirBench (2,600)", hub="MUIRBENCH/MUIRBENCH", needs=("question", "options", "answer", "image_list"),
    read=read, metrics=chooses(letter_and_stop), groups=groups,
    template=with_letter("Answer with the option's letter from the given choices directly."),
)  # fmt: skip
