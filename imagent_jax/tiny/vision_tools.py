"""Stage 1 of the base of the tool worlds: views of prints and pages beside those of scenes, labelled with what is wrong."""

import numpy as np

from imagent_jax.model.processor import Processor
from imagent_jax.tiny import total_world
from imagent_jax.tiny.code_world import draw_problems
from imagent_jax.tiny.corpus_code import Shown
from imagent_jax.tiny.corpus_style import GIVEN, SETTINGS
from imagent_jax.tiny.prints import LOSSES, TURNS
from imagent_jax.tiny.vision import HEADS, Labelled, View, pack_views, scene_views
from imagent_jax.tiny.world import Scene, make_scene

TOOL_HEADS = HEADS | {"turn": len(TURNS) + 1, "loss": len(LOSSES) + 1}
"""Besides `HEADS`: how a print is turned, and its other fault; the last class is none."""
BLOCKS = 60
SCENES, SPOILT, REPAIRED, MARKS, PAGES = 24, 32, 28, 24, 14
"""Scenes, prints (as drawn by `draw_problems`, repaired, with marks) and pages of a pack."""


def tool_pack(rng: np.random.Generator, processor: Processor, block: int, crowded: int = 0) -> Labelled:
    """Return views of the train split with labels; `crowded` as in `vision.labelled_pack`."""
    views = scene_views(rng, [make_scene(rng, "train", varied=True) for _ in range(SCENES)], crowded, GIVEN)
    views += [print_view(Shown(rng, "train", draw_problems(rng))) for _ in range(SPOILT)]
    views += [print_view(Shown(rng, "train", draw_problems(rng), repaired=True)) for _ in range(REPAIRED)]
    views += [print_view(Shown(rng, "train", (), marks=2)) for _ in range(MARKS)]
    pages = [total_world.make_page(rng, "train", varied=True) for _ in range(PAGES)]
    views += [View(page.pixels, GIVEN, _tags(page), digits=False, corners=True) for page in pages]
    views += [View(page.pixels, (GIVEN[0], SETTINGS.high_pixels), _tags(page), digits=True) for page in pages]  # a block each
    return pack_views(views, processor, block, BLOCKS, TOOL_HEADS)


def print_view(shown: Shown) -> View:
    """Return a print as it is given. Of a spoilt one, only what is wrong is labelled."""
    turn = next((TURNS.index(name) for name in shown.problems if name in TURNS), len(TURNS))
    loss = next((LOSSES.index(name) for name in shown.problems if name in LOSSES), len(LOSSES))
    wrong = {"turn": turn, "loss": loss} | ({"colour": -1} if shown.problems else {})
    return View(shown.pixels, GIVEN, [] if shown.problems else _tags(shown.scene), digits=True, more=wrong)


def _tags(scene: Scene) -> list:
    return [(tag.x, tag.y, tag) for tag in scene.tags]
