"""Multiple choice in VLMEvalKit's TSV: MMBench, right only if right in every order of the options, SEED-Bench, any other."""

import re

from imagent_jax.data.formats import FORMATS
from imagent_jax.evals.benchmark import QUESTION, Benchmark, option_lines
from imagent_jax.evals.extraction import chooses, vlmevalkit
from imagent_jax.types import Task

CYCLE = 1_000_000
"""Rows whose indices are equal modulo this are one question, with its options in another order."""
[_FORMAT] = [form for form in FORMATS if form.name == "VLMEvalKit"]


def template(task: Task) -> str:
    if not task.options:
        return QUESTION
    options = f"Options:\n{option_lines(task)}\n"
    return f"Question: {QUESTION}\n{options}Please select the correct answer from the options above. \n"


def question(task: Task) -> str:
    return str(int(task.uid) % CYCLE) if task.uid.isdigit() else re.sub(r"\+\d+$", "", task.uid)


def groups(task: Task) -> dict[str, str]:
    found = {"category": task.kind, "l2-category": str(task.meta.get("l2-category", ""))}
    return {name: group for name, group in found.items() if group}


def benchmark(name: str, title: str, circular: bool = False) -> Benchmark:
    return Benchmark(
        name=name,
        title=title,
        needs=_FORMAT.needs,
        read=_FORMAT.read,
        metrics=chooses(vlmevalkit),
        template=template,
        question=question,
        groups=groups,
        circular=circular,
    )


MMBENCH = benchmark("mmbench", "MMBench (circular)", circular=True)
SEED = benchmark("seedbench", "SEED-Bench, images")
TSV = benchmark("tsv", "multiple choice in VLMEvalKit's TSV")
