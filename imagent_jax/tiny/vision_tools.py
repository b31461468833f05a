"""The tower of the base of the tool worlds: views of prints and pages beside those of scenes, labelled with what is wrong.

What a digit is is learnt first, from small packs of images that bear many of one size, then digits of all sizes and places, then
all that the worlds show.
"""

import math
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from PIL import Image

from imagent_jax.model.processor import Processor
from imagent_jax.tiny import total_world
from imagent_jax.tiny.code_world import draw_problems
from imagent_jax.tiny.corpus_code import Shown, run
from imagent_jax.tiny.corpus_style import GIVEN, SETTINGS
from imagent_jax.tiny.prints import LOSSES, SIDE, TURNS, repair, spoil
from imagent_jax.tiny.vision import HEADS, Labelled, View, pack_views, scene_views
from imagent_jax.tiny.world import Scene, make_crowded_scene, make_scene

TOOL_HEADS = HEADS | {"turn": len(TURNS) + 1, "loss": len(LOSSES) + 1}
"""Besides `HEADS`: how a print is turned, and its other fault; the last class is none."""

SHOWN = {
    "digits": {"blocks": 18, "scenes": 2, "crowded": 40, "repaired": 8, "marks": 8},
    "sizes": {"blocks": 22, "scenes": 8, "sheets": 10, "repaired": 8, "marks": 8, "large": 2},
    "vision": {"blocks": 40, "scenes": 16, "sheets": 8, "repaired": 12, "marks": 10, "large": 5, "given": 16, "spoilt": 14},
}
"""What the packs of a stage show: crops of so many scenes; prints full of tags, sheets of tags, prints as they are repaired and
with marks, pages in their large view. In the last stage also what is given first: scenes, prints as they are drawn, pages."""
PLACE = 28
"""Side of a place for a tag on a print full of tags, which has four, before it is enlarged."""
SHEETS, PLACES = (112, 192), (28, 38)
"""Least and greatest side of a sheet of tags and of its places, before it is shown in the large view: a tag is as large as on a
print, as in a crop, as on a page, or between."""


def digits_pack(rng: np.random.Generator, processor: Processor, block: int) -> Labelled:
    """Return views of many digits of one size, each in one of few places: there the tower finds out what a digit is."""
    return pack_views(_digits(rng, SHOWN["digits"]), processor, block, SHOWN["digits"]["blocks"], TOOL_HEADS)


def sizes_pack(rng: np.random.Generator, processor: Processor, block: int) -> Labelled:
    """Return views of digits of all sizes and places."""
    return pack_views(_digits(rng, SHOWN["sizes"]), processor, block, SHOWN["sizes"]["blocks"], TOOL_HEADS)


def tool_pack(rng: np.random.Generator, processor: Processor, block: int) -> Labelled:
    """Return views of everything."""
    counts = SHOWN["vision"]
    views = scene_views(rng, [make_scene(rng, "train", varied=True) for _ in range(counts["given"])], 0, GIVEN)
    views = [view for view in views if not view.digits] + _digits(rng, counts)
    views += [print_view(Shown(rng, "train", draw_problems(rng))) for _ in range(counts["spoilt"])]
    pages = [total_world.make_page(rng, "train", varied=True) for _ in range(counts["large"])]
    views += [View(page.pixels, GIVEN, _tags(page), digits=False, corners=True) for page in pages]
    return pack_views(views, processor, block, counts["blocks"], TOOL_HEADS)


def _digits(rng: np.random.Generator, counts: Mapping[str, int]) -> list[View]:
    """Return views whose digits can be read."""
    scenes = [make_scene(rng, "train", varied=True) for _ in range(counts["scenes"])]
    views = [view for view in scene_views(rng, scenes, 0, GIVEN) if view.digits]
    views += [crowded_print(rng) for _ in range(counts.get("crowded", 0))]
    views += [print_view(Shown(rng, "train", draw_problems(rng), repaired=True)) for _ in range(counts["repaired"])]
    views += [print_view(Shown(rng, "train", (), marks=2)) for _ in range(counts["marks"])]
    large = [sheet(rng) for _ in range(counts.get("sheets", 0))]
    large += [total_world.make_page(rng, "train", varied=True) for _ in range(counts.get("large", 0))]
    return views + [large_view(one) for one in large]


def large_view(scene: Scene) -> View:
    """Return what a look at `high` shows of a scene: a block."""
    return View(scene.pixels, (GIVEN[0], SETTINGS.high_pixels), _tags(scene), digits=True)


def sheet(rng: np.random.Generator) -> Scene:
    """Return a piece of a photograph full of tags of one size, as large as the large view."""
    side, place = (int(rng.integers(low, high + 1)) for low, high in (SHEETS, PLACES))
    scene = make_crowded_scene(rng, "train", side, side, place)
    return replace(scene, pixels=_resized(scene.pixels, math.isqrt(SETTINGS.high_pixels)))


def crowded_print(rng: np.random.Generator) -> View:
    """Return an image full of tags of a print's size, half of the time spoilt and repaired as a print is."""
    scene = make_crowded_scene(rng, "train", 2 * PLACE, 2 * PLACE, PLACE)
    pixels = _resized(scene.pixels, SIDE)
    if rng.random() < 0.5:
        problems = draw_problems(rng)
        pixels = run(spoil(rng, pixels, problems, "train"), repair(problems))
    return View(pixels, GIVEN, _tags(scene), digits=True)


def _resized(pixels: np.ndarray, side: int) -> np.ndarray:
    return np.asarray(Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC))


def print_view(shown: Shown) -> View:
    """Return a print as it is given. Of a spoilt one, only what is wrong is labelled."""
    turn = next((TURNS.index(name) for name in shown.problems if name in TURNS), len(TURNS))
    loss = next((LOSSES.index(name) for name in shown.problems if name in LOSSES), len(LOSSES))
    wrong = {"turn": turn, "loss": loss} | ({"colour": -1} if shown.problems else {})
    return View(shown.pixels, GIVEN, [] if shown.problems else _tags(shown.scene), digits=True, more=wrong)


def _tags(scene: Scene) -> list:
    return [(tag.x, tag.y, tag) for tag in scene.tags]
