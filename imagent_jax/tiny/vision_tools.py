"""The tower of the base of the tool worlds: views of prints and pages beside those of scenes, labelled with what is wrong.

What a digit is is learnt first, from small packs of images that bear many.
"""

from collections.abc import Mapping

import numpy as np
from PIL import Image

from imagent_jax.model.processor import Processor
from imagent_jax.tiny import total_world
from imagent_jax.tiny.code_world import draw_problems
from imagent_jax.tiny.corpus_code import Shown, run
from imagent_jax.tiny.corpus_style import GIVEN, SETTINGS
from imagent_jax.tiny.prints import LOSSES, SIDE, TURNS, repair, spoil
from imagent_jax.tiny.total_world import PAGE
from imagent_jax.tiny.vision import HEADS, Labelled, View, pack_views, scene_views
from imagent_jax.tiny.world import Scene, make_crowded_scene, make_scene

TOOL_HEADS = HEADS | {"turn": len(TURNS) + 1, "loss": len(LOSSES) + 1}
"""Besides `HEADS`: how a print is turned, and its other fault; the last class is none."""

DIGITS = {"blocks": 18, "scenes": 12, "crowded": 24, "repaired": 8, "marks": 8}
"""What a pack of digits shows: scenes (their crops), prints full of tags, prints as they are repaired, and with marks."""
VIEWS = {
    "blocks": 42, "scenes": 16, "crowded": 20, "repaired": 12, "marks": 12,
    "spoilt": 14, "pages": 6, "large": 3, "aligned": 4, "loose": 3,
}  # fmt: skip
"""The same of a pack of everything: also prints as they are drawn, pages as they are given, and large views: of pages, and full
of tags."""
ALIGNED, LOOSE = PAGE[0] // 6, PAGE[0] // 5
"""Cells of a page full of tags: those of the large view's features, so that one feature holds a digit; and wider ones."""
CROWDED = (2 * 28, 28)
"""Side of a print full of tags and of its cells, before it is enlarged."""


def digits_pack(rng: np.random.Generator, processor: Processor, block: int, crowded: int = 0) -> Labelled:
    """Return views of the train split that bear many digits, with labels; `crowded` as in `vision.labelled_pack`."""
    scenes = [make_scene(rng, "train", varied=True) for _ in range(DIGITS["scenes"])]
    crops = [view for view in scene_views(rng, scenes, crowded, GIVEN) if view.digits]
    return pack_views(crops + _prints(rng, DIGITS), processor, block, DIGITS["blocks"], TOOL_HEADS)


def tool_pack(rng: np.random.Generator, processor: Processor, block: int, crowded: int = 0) -> Labelled:
    """Return views of everything of the train split, with labels; `crowded` as in `vision.labelled_pack`."""
    views = scene_views(rng, [make_scene(rng, "train", varied=True) for _ in range(VIEWS["scenes"])], crowded, GIVEN)
    views += _prints(rng, VIEWS)
    views += [print_view(Shown(rng, "train", draw_problems(rng))) for _ in range(VIEWS["spoilt"])]
    pages = [total_world.make_page(rng, "train", varied=True) for _ in range(VIEWS["pages"])]
    views += [View(page.pixels, GIVEN, _tags(page), digits=False, corners=True) for page in pages]
    large = pages[: VIEWS["large"]]
    large += [make_crowded_scene(rng, "train", *PAGE, ALIGNED) for _ in range(VIEWS["aligned"])]
    large += [make_crowded_scene(rng, "train", *PAGE, LOOSE) for _ in range(VIEWS["loose"])]
    views += [View(page.pixels, (GIVEN[0], SETTINGS.high_pixels), _tags(page), digits=True) for page in large]  # a block each
    return pack_views(views, processor, block, VIEWS["blocks"], TOOL_HEADS)


def _prints(rng: np.random.Generator, counts: Mapping[str, int]) -> list[View]:
    """Return prints whose digits can be read: full of tags, repaired, with marks."""
    views = [crowded_print(rng) for _ in range(counts["crowded"])]
    views += [print_view(Shown(rng, "train", draw_problems(rng), repaired=True)) for _ in range(counts["repaired"])]
    return views + [print_view(Shown(rng, "train", (), marks=2)) for _ in range(counts["marks"])]


def crowded_print(rng: np.random.Generator) -> View:
    """Return an image full of tags of a print's size, half of the time spoilt and repaired as a print is."""
    side, cell = CROWDED
    scene = make_crowded_scene(rng, "train", side, side, cell)
    pixels = np.asarray(Image.fromarray(scene.pixels).resize((SIDE, SIDE), Image.Resampling.BICUBIC))
    if rng.random() < 0.5:
        problems = draw_problems(rng)
        pixels = run(spoil(rng, pixels, problems, "train"), repair(problems))
    return View(pixels, GIVEN, _tags(scene), digits=True)


def print_view(shown: Shown) -> View:
    """Return a print as it is given. Of a spoilt one, only what is wrong is labelled."""
    turn = next((TURNS.index(name) for name in shown.problems if name in TURNS), len(TURNS))
    loss = next((LOSSES.index(name) for name in shown.problems if name in LOSSES), len(LOSSES))
    wrong = {"turn": turn, "loss": loss} | ({"colour": -1} if shown.problems else {})
    return View(shown.pixels, GIVEN, [] if shown.problems else _tags(shown.scene), digits=True, more=wrong)


def _tags(scene: Scene) -> list:
    return [(tag.x, tag.y, tag) for tag in scene.tags]
