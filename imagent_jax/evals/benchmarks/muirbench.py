"""MuirBench (arXiv 2406.09411): multiple choice over several images, some of which are the options."""

from imagent_jax.data.formats import multi_image
from imagent_jax.evals.benchmark import Benchmark, with_letter
from imagent_jax.evals.extraction import chooses, letter_of_any_case
from imagent_jax.types import Task


def groups(task: Task) -> dict[str, str]:
    return {"task": task.kind, "relation": str(task.meta.get("image_relation", ""))}


BENCHMARK = Benchmark(
    name="muirbench",
    title="MuirBench (2,600)",
    hub="MUIRBENCH/MUIRBENCH",
    needs=("question", "options", "answer", "image_list"),
    read=multi_image,
    metrics=chooses(letter_of_any_case),
    groups=groups,
    template=with_letter("Answer with the option's letter from the given choices directly."),
)
