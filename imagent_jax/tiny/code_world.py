"""The code world: questions about one to three prints, most of which are spoilt until a program repairs them.

The words are those of the tiny world. A question reads the tag of one print, or adds or compares two, so more than one print
may need repair. Tasks are functions of a seed. Photographs, handwritings and strengths of faults of the test split occur in no
training task.
"""

import dataclasses

import numpy as np

from imagent_jax.tiny import world
from imagent_jax.tiny.generated import cycle_of, encode_png
from imagent_jax.tiny.prints import LOSSES, PROBLEMS, TURNS, make_print, spoil
from imagent_jax.tiny.world import COLOURS, Scene
from imagent_jax.types import Task

KIND_MIX = {"code_read": 5, "code_sum": 3, "code_compare": 2}
"""Tasks of each kind in every 10."""
SORTS = ((False, False), (True, False), (False, True), (True, True))
"""Sorts of spoilt prints: turned or not, with another fault or without."""
SHARES = (0.15, 0.2, 0.4, 0.25)
"""Share of each sort."""


def draw_problems(rng: np.random.Generator) -> tuple[str, ...]:
    """Draw what is wrong with a print; the sort of faults by `SHARES`."""
    sort = rng.choice(len(SHARES), p=SHARES)
    able = [p for p in PROBLEMS if (bool({*p} & {*TURNS}), bool({*p} & {*LOSSES})) == SORTS[sort]]
    return able[rng.integers(len(able))]


def make_task(rng: np.random.Generator, split: str, kind: str) -> tuple[Task, list[Scene]]:
    """Draw a question and its prints.

    Returns:
        The task, and its prints before they were spoilt. `task.meta` holds the split, the tags of every image, what is wrong
        with it (`problems`), and the targets, (image number, colour) of the tags that the answer depends on.
    """
    count = int(rng.integers(1 if kind == "code_read" else 2, 4))
    colours = [str(rng.choice(COLOURS)) for _ in range(count)]
    digits = rng.integers(0, 10, count).tolist()
    a, b = (int(i) for i in (*rng.permutation(count), 0)[:2])
    if kind == "code_compare":
        colours[b] = colours[a]
        while digits[a] == digits[b]:
            digits[b] = int(rng.integers(10))
    question, answer, answer_type, asked = _ask(rng, kind, colours, digits, a, b)
    problems = [draw_problems(rng) for _ in range(count)]
    scenes = [make_print(rng, split, [colour], [digit]) for colour, digit in zip(colours, digits, strict=True)]
    images = [spoil(rng, scene.pixels, wrong, split) for scene, wrong in zip(scenes, problems, strict=True)]
    meta = {
        "split": split,
        "targets": [[n + 1, colours[n]] for n in asked],
        "tags": [[dataclasses.asdict(tag) for tag in scene.tags] for scene in scenes],
        "problems": [list(wrong) for wrong in problems],
    }
    return Task("", question, tuple(map(encode_png, images)), answer, answer_type, kind, meta), scenes


def _ask(rng, kind: str, colours: list[str], digits: list[int], a: int, b: int) -> tuple[str, str, str, list[int]]:
    """Return question, answer, answer type and the images asked about (from 0)."""
    first, second = (f"the {colours[n]} tag in Image {n + 1}" for n in (a, b))
    if kind == "code_read":
        question = (f"What digit is on {first}?", f"Read {first}.")[rng.integers(2)]
        return question, str(digits[a]), "number", [a]
    if kind == "code_sum":
        question = (f"What is the sum of the digits on {first} and {second}?", f"Add {first} to {second}.")[rng.integers(2)]
        return question, str(digits[a] + digits[b]), "number", [a, b]
    question = f"Which image has the larger digit on its {colours[a]} tag, Image {a + 1} or Image {b + 1}?"
    return question, f"Image {1 + (a if digits[a] > digits[b] else b)}", "choice", [a, b]


def task_at(seed: int, split: str, index: int) -> Task:
    """Return task number `index` of the series that `seed` and `split` name. Every 10 tasks from a multiple of 10 on hold exactly
    the numbers of `KIND_MIX`."""
    kind, rng = cycle_of(KIND_MIX, world.SPLITS.index(split), seed, index)
    return dataclasses.replace(make_task(rng, split, kind)[0], uid=f"tiny_code/{split}/{seed}/{index}")
