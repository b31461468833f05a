"""A reader of prints and pages that we did not write: scikit-learn's nearest template by squared difference."""

import numpy as np
from PIL import Image
from sklearn.neighbors import KNeighborsClassifier

from imagent_jax.tiny import world
from imagent_jax.tiny.prints import LOSSES, REPAIRS, TURNS, make_print, program, spoil
from imagent_jax.tiny.total_world import make_page

SHOWN = 84
"""Pixels of a print's side as it is given and as a program shows it."""
LIKELIEST = {"blur": "noise", "noise": "blur", "dark": "blur", "overexposure": "blur"}
"""The repair of another fault that helps most, where it is not that of overexposure (`benchmarks/results/tool_worlds.json`)."""


def shown_by(code: str, pixels: np.ndarray) -> np.ndarray:
    """Return what a program shows of Image 1."""
    made = []
    exec(code, {"images": {1: Image.fromarray(pixels)}, "show": lambda image, parent=None: made.append(image)})
    (image,) = made
    return np.asarray(image)


def template(pixels: np.ndarray, scene: world.Scene, view: int = SHOWN) -> np.ndarray:
    """Return the tag's place in a view of a print, as a template: brightest channel, 18 x 18 pixels."""
    image, (tag,) = Image.fromarray(pixels).resize((view, view), Image.Resampling.BICUBIC), scene.tags
    half = 0.21 * view
    box = (tag.x * view - half, tag.y * view - half, tag.x * view + half, tag.y * view + half)
    return np.asarray(image.resize((18, 18), Image.Resampling.BICUBIC, box=box), np.float32).max(-1).ravel()


def reader() -> KNeighborsClassifier:
    """Return a reader of 2,000 clean prints of the train split."""
    rng = np.random.default_rng(5)
    scenes = [make_print(rng, "train") for _ in range(2000)]
    return KNeighborsClassifier(1).fit([template(s.pixels, s) for s in scenes], [s.tags[0].digit for s in scenes])


def accuracy(reader: KNeighborsClassifier, problems, steps, count: int = 120, view: int = SHOWN) -> float:
    """Return the share of held-out prints with these problems that are read after these steps."""
    rng = np.random.default_rng(6)
    scenes = [make_print(rng, "test") for _ in range(count)]
    views = [shown_by(program(1, steps), spoil(rng, scene.pixels, problems, "test")) for scene in scenes]
    read = reader.predict([template(pixels, scene, view) for pixels, scene in zip(views, scenes, strict=True)])
    return float(np.mean(read == [scene.tags[0].digit for scene in scenes]))


def other_repairs(problem: str) -> dict[str, list]:
    """Return the repairs of the other problems, by problem."""
    return {name: [REPAIRS[name]] for name in (*TURNS, *LOSSES) if REPAIRS[name] != REPAIRS[problem]}


def likeliest_other(problem: str) -> list:
    """Return the repair of another problem that helps this one most."""
    return other_repairs(problem)[LIKELIEST.get(problem, "overexposure")]


def page_accuracy(view: int, trained: int, tested: int) -> float:
    """Return the share of a page's digits that nearest templates of the same view read."""
    parts = {}
    for split, count in (("train", trained), ("test", tested)):
        rng, templates, digits = np.random.default_rng(len(split)), [], []
        while len(digits) < count:
            page = make_page(rng, split)
            image = Image.fromarray(page.pixels).resize((view, view), Image.Resampling.BICUBIC)
            for tag in page.tags:
                half = 13 / 192
                box = [view * v for v in (tag.x - half, tag.y - half, tag.x + half, tag.y + half)]
                tile = image.resize((18, 18), Image.Resampling.BICUBIC, box=box)
                templates.append(np.asarray(tile, np.float32).max(-1).ravel())
                digits.append(tag.digit)
        parts[split] = templates, digits
    return float(KNeighborsClassifier(1).fit(*parts["train"]).score(*parts["test"]))
