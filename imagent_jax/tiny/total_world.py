"""The total world: the sum of all digits of one picture of two or three tags.

At the size at which pictures are given no digit can be read. One reflection at `high` shows all of them; crops show one each.
"""

import dataclasses

import numpy as np

from imagent_jax.tiny import world
from imagent_jax.tiny.generated import cycle_of, encode_png
from imagent_jax.tiny.world import COLOURS, Scene
from imagent_jax.types import Task

KIND_MIX = {"total": 1}
PAGE = (192, 192)
"""Height and width of a picture, pixels."""


def make_page(rng: np.random.Generator, split: str, varied: bool = False) -> Scene:
    """Draw a picture of two or three tags, smaller than a scene of the tiny world, with tags of the same size."""
    colours = rng.permutation(COLOURS)[: int(rng.integers(2, 4))].tolist()
    return world.make_scene(rng, split, colours=colours, varied=varied, size=PAGE)


def ask(image: int) -> str:
    """Return the question for the sum of all digits of an image."""
    return f"Add all digits in Image {image}."


def make_task(rng: np.random.Generator, split: str) -> tuple[Task, list[Scene]]:
    """Draw a question and its pictures. `task.meta` holds the split, the tags of every image and the targets, (image number,
    colour) of the tags that are added."""
    scenes = [make_page(rng, split) for _ in range(int(rng.integers(1, 4)))]
    at = int(rng.integers(len(scenes)))
    meta = {
        "split": split,
        "targets": [[at + 1, tag.colour] for tag in scenes[at].tags],
        "tags": [[dataclasses.asdict(tag) for tag in scene.tags] for scene in scenes],
    }
    images = tuple(encode_png(scene.pixels) for scene in scenes)
    answer = str(sum(tag.digit for tag in scenes[at].tags))
    return Task("", ask(at + 1), images, answer, "number", "total", meta), scenes


def task_at(seed: int, split: str, index: int) -> Task:
    """Return task number `index` of the series that `seed` and `split` name."""
    _, rng = cycle_of(KIND_MIX, world.SPLITS.index(split), seed, index)
    return dataclasses.replace(make_task(rng, split)[0], uid=f"tiny_total/{split}/{seed}/{index}")
