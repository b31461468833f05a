"""BLINK (arXiv 2404.12390): fourteen perception tasks on one to four images."""

import re

from imagent_jax.data.formats import multi_image
from imagent_jax.evals.benchmark import Benchmark
from imagent_jax.evals.extraction import chooses
from imagent_jax.types import Task

CONFIGS = (
    "Art_Style",
    "Counting",
    "Forensic_Detection",
    "Functional_Correspondence",
    "IQ_Test",
    "Jigsaw",
    "Multi-view_Reasoning",
    "Object_Localization",
    "Relative_Depth",
    "Relative_Reflectance",
    "Semantic_Correspondence",
    "Spatial_Relation",
    "Visual_Correspondence",
    "Visual_Similarity",
)


def template(task: Task) -> str:
    letters = ", ".join(task.letters)
    note = f"Note: You only need to respond with {letters} without providing any additional information."
    return f"{note}\n{task.meta.get('prompt') or task.text}"


def first_letter(task: Task, reply: str) -> str:
    """Return the first letter of a reply that begins with one: lmms-eval. Known fault: "The answer is B" is T, "Because" is B."""
    found = re.match(r"[(\s]*([A-Z])", reply.strip(), re.IGNORECASE)
    return found[1].upper() if found else ""


BENCHMARK = Benchmark(
    name="blink",
    title="BLINK (validation)",
    hub="BLINK-Benchmark/BLINK",
    split="val",
    configs=CONFIGS,
    needs=("question", "choices", "answer", "image_1"),
    read=multi_image,
    metrics=chooses(first_letter),
    template=template,
    fixed=True,
)
