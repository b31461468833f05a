"""MIRB (arXiv 2406.12742): reasoning over several images, in four groups of tasks."""

import re

from imagent_jax.data.formats import Fields, Row
from imagent_jax.evals.benchmark import QUESTION, Benchmark, images_of
from imagent_jax.evals.extraction import letter_and_stop
from imagent_jax.evals.rules import Metric, open_answer
from imagent_jax.types import Task

WORD, SYMBOL = "Answer with a single word.", "Answer with the option symbol."
INSTRUCTIONS = dict.fromkeys(("analogy", "attribute", "plot_code", "visual_chain", "sightseeing"), WORD) | {
    "codeu": SYMBOL, "food": SYMBOL, "image_jigsaw": SYMBOL, "arxiv": "Answer with the paper title.",
    "count": "Answer with a single number.",
    "3d_scene": "The following images are different views of the same 3D scene. Answer with a single number.",
}  # fmt: skip
GROUPS = {
    "food": "Knowledge", "sightseeing": "Knowledge", "codeu": "Reasoning", "plot_code": "Reasoning", "analogy": "Reasoning",
    "3d_scene": "Reasoning", "image_jigsaw": "Perception", "count": "Perception", "attribute": "Perception",
    "visual_chain": "Multi-Hop", "arxiv": "Multi-Hop",
}  # fmt: skip
_CUES = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_NUMBERS = tuple(map(re.compile, (
    r"-?\b\d{1,3}(?:,\d{3})+\b", r"-?\d+(?:\.\d+)?[eE][+-]?\d+",
    r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])",
)))  # fmt: skip


def read(row: Row) -> Fields:
    images, subset = images_of(row, "image_list", "images"), row.pop("subset")
    return Fields(row.pop("questions"), images, row.pop("answers"), None, f"{subset}/{row.pop('question_id')}", subset)


def template(task: Task) -> str:
    return f"{INSTRUCTIONS.get(task.kind, '')}{QUESTION}"  # without a space between them, as published


def values_of(text: str) -> set[str | float]:
    """Return a text as MMMU's rule compares it: a number to two places, else lower case, one letter with a space beside."""
    text = text.strip()
    try:
        return {round(float(text.replace(",", "")), 2)}
    except ValueError:
        text = text.lower()
        return {f" {text}", f"{text} "} if len(text) == 1 else {text}


def said(reply: str) -> set[str | float]:
    """Return what a reply says: what follows the last cue word of each line (of the reply without any), and the numbers there."""
    lines, keys = reply.strip().strip(".").lower().split("\n"), []
    for number, line in enumerate(lines, 1):
        cues = (*_CUES, "=") if number == len(lines) else _CUES
        tail = ""
        for found in (line.split(cue)[-1].strip() for cue in cues if cue in line):
            tail = found if not tail or len(found) < len(tail) else tail
        if tail not in ("", *":,.!?;'"):
            keys.append(tail)
    keys = keys or ["\n".join(lines)]
    numbers = [number for key in keys for pattern in _NUMBERS for number in pattern.findall(key)]
    return set().union(*map(values_of, (*keys, *numbers)))


def published(task: Task, reply: str) -> float:
    """Return 1 for an option's letter with a full stop, or an open answer that holds the reference: lmms-eval, by MMMU's rule.

    Known faults: "(B)", "b" and "B " are wrong; a reference that is a part of another word is right ("car" in "scarf"), and so is
    one that is a part of a number ("234" in "1,234").
    """
    if task.answer in ("A", "B", "C", "D", "E"):
        return float(letter_and_stop(task, reply) == task.answer)
    wanted, found = values_of(task.answer), said(reply)
    texts = [value for value in wanted if isinstance(value, str)]
    return float(bool(wanted & found) or any(text in value for value in found if isinstance(value, str) for text in texts))


BENCHMARK = Benchmark(
    name="mirb",
    title="MIRB",
    hub="VLLMs/MIRB-hf",
    needs=("questions", "answers", "subset", "image_list|images"),
    read=read,
    metrics={"": Metric(published, open_answer)},
    template=template,
    groups=lambda task: {"group": GROUPS.get(task.kind, "other"), "subset": task.kind},
    within={"group": "subset"},
)
