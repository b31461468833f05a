"""Skills of the tiny base on the held-out split: greedy outputs compared with the truth."""

import dataclasses
import io
import json
from collections import defaultdict
from pathlib import Path

import numpy as np

from imagent_jax.chat import ANSWER_OPEN, QWEN
from imagent_jax.config import TINY, load_config
from imagent_jax.model import checkpoint
from imagent_jax.model.processor import Processor
from imagent_jax.rollout.collect import Collector
from imagent_jax.tiny.corpus import SETTINGS, STEP, THUMBNAIL, TOOLS, make_group
from imagent_jax.types import Task

FORMS = ("crop", "crops", "thumbnail", "thumbnails")


def skill_task(rng: np.random.Generator, form: str, uid: str) -> Task:
    """Return a question of the pre-training corpus about images of the test split; its `kind` is the skill."""
    while True:
        group = make_group(rng, 1, form, "test")
        asked, said = (segment.text for segment in group.responses[0])
        question, expected = asked.split(QWEN.turn_close)[0], QWEN.without_end(said)
        skill = {"What": "read", "Where": "locate", "Name": "name"}.get(question.split()[0], "answer")
        skill = "answer" if ANSWER_OPEN in expected else skill
        if skill != "answer" or form == "crops" or " an " in question or " a " in question:  # guesses are not counted as skills
            break
    images = []
    for shown in group.images:
        buffer = io.BytesIO()
        shown.pixels.save(buffer, "PNG")
        images.append(buffer.getvalue())
    return Task(uid, question, tuple(images), expected, kind=f"{skill} ({form})")


def right(expected: str, text: str) -> bool:
    """Return whether the text of a turn matches the expected text; each side of a box may be off by one `STEP`."""
    text = QWEN.without_end(text).strip()
    if ANSWER_OPEN in expected:
        return expected.partition(ANSWER_OPEN)[2] == text.partition(ANSWER_OPEN)[2]
    if not expected.startswith("["):
        return text == expected.strip()
    try:
        box = json.loads(text)
    except ValueError:
        return False
    return len(box) == 4 and all(abs(a - b) <= STEP for a, b in zip(box, json.loads(expected), strict=True))


def measure(folder: Path, count: int = 256, seed: int = 0) -> dict[str, float]:
    """Return the share of right greedy answers by skill and form, from `count` questions (a multiple of 64) per form."""
    base, rng, results = load_config(TINY), np.random.default_rng(seed), defaultdict(list)
    for form in FORMS:
        low, high = THUMBNAIL if form.startswith("thumb") else (SETTINGS.confirm_min_pixels, SETTINGS.confirm_max_pixels)
        cfg = dataclasses.replace(
            base,
            images=dataclasses.replace(base.images, min_pixels=low, max_pixels=high),
            rollout=dataclasses.replace(base.rollout, prompt_tokens=160, response_tokens=64),
        )
        model, params = checkpoint.load(folder, vision_block=cfg.images.vision_block)
        collector = Collector(model, Processor.from_pretrained(folder), TOOLS, cfg)
        tasks = [skill_task(rng, form, f"{form}-{i}") for i in range(count)]
        for begin in range(0, count, 64):
            rollout = collector.collect(params, tasks[begin : begin + 64], group_size=1, seed=seed, temperature=0.0)
            for (trajectory,) in rollout.trajectories:
                results[trajectory.task.kind].append(right(trajectory.task.answer, trajectory.turns[0].text))
    return {skill: round(float(np.mean(oks)), 3) for skill, oks in sorted(results.items())}
