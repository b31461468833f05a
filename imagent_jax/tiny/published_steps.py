"""The rows that Visual-ARFT trains on, made from the tool worlds: one step each, and nothing is executed.

Of a question of the code world that reads a spoilt print: what is wrong with the print (`pre_problem`), the program
(`pre_code`), and the answer, for which the print is shown repaired (`pre_answer`). Of the search world: the query, and the answer
with its passages in the question. The held-out split is that of the world itself, where everything is executed.
"""

import dataclasses

import numpy as np

from imagent_jax.chat import Action, Call
from imagent_jax.rollout.environment import ToolEnvironment
from imagent_jax.tiny import code_world, search_world, world
from imagent_jax.tiny.encyclopaedia import articles
from imagent_jax.tiny.generated import cycle_of, encode_png
from imagent_jax.tiny.prints import SIDE, make_print, problem_words, program, repair, spoil
from imagent_jax.types import CallResult, CallStatus, Task

CODE_MIX = {"pre_problem": 1, "pre_code": 1, "pre_answer": 1}
SEARCH_MIX = {"pre_query": 1, "pre_answer": 1}
ONE_TURN = f"{__name__}:OneTurn"


class OneTurn(ToolEnvironment):
    """An environment that executes nothing: the first call ends the trajectory."""

    def step(self, call: Action) -> CallResult:
        name, arguments = (call.name, call.arguments) if isinstance(call, Call) else (None, None)
        return CallResult(CallStatus.EXECUTED, name, arguments, [], ends=True)


def code_at(seed: int, split: str, index: int) -> Task:
    """Return row `index` of the training split; of the test split, that task of the code world."""
    if split == "test":
        return code_world.task_at(seed, split, index)
    kind, rng = cycle_of(CODE_MIX, world.SPLITS.index(split), seed, index)
    scene = make_print(rng, split)
    (tag,), problems = scene.tags, ()
    while not problems:
        problems = code_world.draw_problems(rng)
    pixels = scene.pixels if kind == "pre_answer" else spoil(rng, scene.pixels, problems, split)
    question, answer = {
        "pre_problem": ("What is wrong with Image 1?", problem_words(problems)),
        "pre_code": (
            f"Read the {tag.colour} tag in Image 1. It is wrong: {problem_words(problems)}.",
            program(1, repair(problems)),
        ),
        "pre_answer": (f"Read the {tag.colour} tag in Image 1.", str(tag.digit)),
    }[kind]
    meta = {"split": split, "step": kind.removeprefix("pre_"), "problems": list(problems), "side": SIDE}
    return Task(
        f"tiny_code_steps/{split}/{seed}/{index}",
        question,
        (encode_png(np.asarray(pixels)),),
        answer,
        "exact",
        kind,
        meta,
        environment=ONE_TURN,
    )


def search_at(seed: int, split: str, index: int) -> Task:
    """Return row `index` of the training split; of the test split, that task of the search world."""
    if split == "test":
        return search_world.task_at(seed, split, index)
    kind, rng = cycle_of(SEARCH_MIX, world.SPLITS.index(split), seed, index)
    task = search_world.make_task(rng, split, str(rng.choice(["name_once", "mark_once"])))
    (title,) = task.meta["needs"]
    article = articles()[tuple(title.split())]
    query = title if not task.images else f"{article.kind} {' '.join(f'{c}{d}' for c, d in article.mark)}"
    question = task.question if kind == "pre_query" else f"{article.text}\n{task.question}"
    return dataclasses.replace(
        task,
        uid=f"tiny_search_steps/{split}/{seed}/{index}",
        question=question,
        kind=kind,
        environment=ONE_TURN,
        answer=query if kind == "pre_query" else task.answer,
        meta=task.meta | {"step": kind.removeprefix("pre_")},
    )
