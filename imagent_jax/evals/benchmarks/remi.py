"""ReMI (arXiv 2406.09175): thirteen reasoning tasks, images in the text of the question."""

import re

from imagent_jax.data.formats import Fields, Row
from imagent_jax.evals.benchmark import QUESTION, Benchmark, images_of
from imagent_jax.evals.rules import Metric, open_answer


def read(row: Row) -> Fields:
    """Take the fields out of a row. Images stand where the question names them, as published."""
    images = images_of(row, *(f"image_{i}" for i in range(1, 7)))
    numbers = [int(n) for n in re.findall(r"<image(\d)>", row["question"])]
    question = re.sub(r"<image\d>", "<image>", row.pop("question"))
    shown = [images[n - 1] for n in numbers] if numbers and max(numbers) <= len(images) else images
    return Fields(question, shown, row.pop("label"), None, row.pop("id", None), row.pop("task"))


BENCHMARK = Benchmark(
    name="remi",
    title="ReMI",
    hub="mehrankazemi/ReMI",
    needs=("question", "label", "image_1"),
    read=read,
    metrics={"": Metric(None, open_answer)},
    template=lambda task: QUESTION,
)
