"""Prints: small framed photographs that bear large tags, the faults that spoil them, and the programs that repair them.

A print shows its tags large enough to be read at once. A spoilt print does not, however closely one looks: the tag is turned,
cut in two, or has lost its contrast or its detail. One short program of Pillow repairs it. Faults have the names of the MAT
benchmark (arXiv 2505.14246). The mount around a photograph is white, with a broad black foot, which shows how a print is turned.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageChops, ImageFilter

from imagent_jax.tiny import world
from imagent_jax.tiny.world import COLOURS, Scene, Tag

SIDE = 168  # pixels of a print's side
MOUNT, FOOT = 6, 24  # width of the mount at three edges, and at the lower one
SCALE = 3  # a tag's side, in tags of the tiny world
TILE = SCALE * (world.TAG_SIDE + 2 * world.TAG_BORDER)
HALF = SIDE // 2

TURNS = ("rotation90", "rotation180", "rotation270")
LOSSES = ("dark", "overexposure", "blur", "noise", "crop")
PROBLEMS: tuple[tuple[str, ...], ...] = (
    (),
    *((name,) for name in (*TURNS, *LOSSES)),
    *((turn, loss) for turn in TURNS for loss in LOSSES),
)
"""What can be wrong with a print: nothing, one fault, or a turn and another fault, as in MAT."""
STRENGTHS: dict[str, dict[str, tuple[float, ...]]] = {
    "train": {"dark": (0.055, 0.07, 0.085), "overexposure": (0.055, 0.07, 0.085), "blur": (4.2, 4.5, 4.8),
              "noise": (0.78, 0.8, 0.82)},
    "test": {"dark": (0.0625, 0.0775), "overexposure": (0.0625, 0.0775), "blur": (4.35, 4.65), "noise": (0.79, 0.81)},
}  # fmt: skip
"""Strengths of faults: the factor of contrast that is left, sigma of the blur in pixels, share of the pixels lost."""
GAIN = 14
"""What contrast is multiplied by to repair an exposure."""


@dataclass(frozen=True)
class Operation:
    """A step of a program.

    Attributes:
        command: words that tell to do it, with {} for its argument.
        code: an expression of an image {0} and of the argument {1}.
        apply: what the expression computes.
        arguments: values that the argument may have; ("",): it has none.
        imports: the line that the program begins with, or "".
        array: whether the expression is an array, which does not know of which image it was made.
    """

    command: str
    code: str
    apply: Callable[[Image.Image, Any], Image.Image]
    arguments: tuple[int | str, ...]
    imports: str = ""
    array: bool = False


def _denoised(image: Image.Image) -> Image.Image:
    import cv2  # of the extra `sandbox`

    a = np.array(image)
    return Image.fromarray(cv2.inpaint(a, (a.sum(2) % 765 < 1).astype(np.uint8), 1, 0))


OPERATIONS = {
    "turn": Operation("turned by {}", "{0}.rotate({1})", Image.Image.rotate, (90, 180, 270)),
    "brighten": Operation(
        "brightened by {}", "{0}.point(lambda v: {1} * v)", lambda image, n: image.point(lambda v: n * v), (4, GAIN)
    ),
    "darken": Operation(
        "darkened by {}",
        "{0}.point(lambda v: 255 - {1} * (255 - v))",
        lambda image, n: image.point(lambda v: 255 - n * (255 - v)),
        (4, GAIN),
    ),
    "sharpen": Operation(
        "sharpened",
        "{0}.filter(F.UnsharpMask(3, 400, 0)).filter(F.UnsharpMask(3, 400, 0))",
        lambda image, _: image.filter(ImageFilter.UnsharpMask(3, 400, 0)).filter(ImageFilter.UnsharpMask(3, 400, 0)),
        ("",),
        "from PIL import ImageFilter as F",
    ),
    "denoise": Operation(
        "denoised",
        "cv2.inpaint(a := numpy.array({0}), numpy.uint8(a.sum(2) % 765 < 1), 1, 0)",
        lambda image, _: _denoised(image),
        ("",),
        "import cv2, numpy",
        array=True,
    ),
    "shift": Operation(
        "shifted by {}",
        "C.offset({0}, {1}, 0)",
        lambda image, n: ImageChops.offset(image, n, 0),
        (HALF // 2, HALF),
        "from PIL import ImageChops as C",
    ),
}
REPAIRS = {
    "rotation90": ("turn", 270), "rotation180": ("turn", 180), "rotation270": ("turn", 90), "dark": ("brighten", GAIN),
    "overexposure": ("darken", GAIN), "blur": ("sharpen", ""), "noise": ("denoise", ""), "crop": ("shift", HALF),
}  # fmt: skip
"""The step that repairs each fault."""
Steps = Sequence[tuple[str, int | str]]
"""Steps of a program: names of `OPERATIONS`, each with its argument."""


def program(image: int, steps: Steps) -> str:
    """Return the program that takes the steps on an image, in order, and shows the result. A step that makes an array is last."""
    expression = f"images[{image}]"
    for name, argument in steps:
        expression = OPERATIONS[name].code.format(expression, argument)
    imports = dict.fromkeys(OPERATIONS[name].imports for name, _ in steps if OPERATIONS[name].imports)
    made_of = f", {image}" if any(OPERATIONS[name].array for name, _ in steps) else ""
    return "".join(f"{line}\n" for line in imports) + f"show({expression}{made_of})"


@functools.cache
def _programs(image: int) -> dict[str, Steps]:
    """Return all programs of a turn and another step, either of them or neither, and their steps."""
    turns = [(), *((("turn", argument),) for argument in OPERATIONS["turn"].arguments)]
    others = [(), *(((name, argument),) for name in OPERATIONS if name != "turn" for argument in OPERATIONS[name].arguments)]
    return {program(image, turn + other): turn + other for turn in turns for other in others}


def steps_of(code: str) -> tuple[int, Steps]:
    """Return the image and the steps of a program that `program` wrote."""
    image = int(code.partition("images[")[2].partition("]")[0])
    return image, _programs(image)[code]


def applied(image: Image.Image, steps: Steps) -> Image.Image:
    """Return what the steps make of an image."""
    for name, argument in steps:
        image = OPERATIONS[name].apply(image, argument)
    return image


def repair(problems: Sequence[str]) -> Steps:
    """Return the steps that repair a print with these problems: a turn first, since it came last."""
    return [REPAIRS[name] for name in problems]


def in_words(steps: Steps) -> str:
    """Return the words that tell to take the steps: "turned by 90 and sharpened"; "as it is" for none."""
    return " and ".join(OPERATIONS[name].command.format(argument) for name, argument in steps) or "as it is"


def problem_words(problems: Sequence[str]) -> str:
    """Return problems as they are said: "rotation90 dark"; "none" for none."""
    return " ".join(problems) or "none"


def make_print(
    rng: np.random.Generator,
    split: str,
    colours: Sequence[str] | None = None,
    digits: Sequence[int] | None = None,
    varied: bool = False,
) -> Scene:
    """Draw a print with one tag around its middle, or with two side by side.

    Args:
        split: "train" or "test"; the photograph and the digits are from that split only.
        colours: of the tags, from left to right, one or two different ones; by default one at random.
        digits: on the tags, by default random.
        varied: see `world.make_scene`.

    Raises:
        ValueError: unknown split, or colours and digits that do not go together.
    """
    colours = [str(rng.choice(COLOURS))] if colours is None else list(colours)
    digits = rng.integers(0, 10, len(colours)).tolist() if digits is None else list(digits)
    if len(digits) != len(colours) or not 1 <= len(set(colours)) == len(colours) <= 2 or not set(colours) <= set(COLOURS):
        raise ValueError(f"A print takes one or two different colours of {', '.join(COLOURS)}, a digit each; got {colours}.")
    inner = (SIDE - MOUNT - FOOT, SIDE - 2 * MOUNT)
    photo, name = world.background(rng, split, *inner)
    pixels = np.full((SIDE, SIDE, 3), 255, np.uint8)
    pixels[SIDE - FOOT :] = 0
    pixels[MOUNT : SIDE - FOOT, MOUNT : SIDE - MOUNT] = world.vary(rng, split, photo) if varied else photo
    tags, rows = [], []
    for place, (colour, digit) in enumerate(zip(colours, digits, strict=True)):
        tile, row = world.tag_pixels(rng, split, colour, digit, varied)
        tile = np.asarray(Image.fromarray(tile).resize((TILE, TILE), Image.Resampling.BICUBIC))
        middle = HALF + (0 if len(colours) == 1 else (2 * place - 1) * (TILE // 2 + 3))
        jitter = 12 if len(colours) == 1 else 2
        x = middle + int(rng.integers(-jitter, jitter + 1))
        y = (SIDE - FOOT + MOUNT) // 2 + int(rng.integers(-24, 25))
        pixels[y - TILE // 2 : y + TILE // 2, x - TILE // 2 : x + TILE // 2] = tile
        tags.append(Tag(colour, int(digit), x / SIDE, y / SIDE))
        rows.append(row)
    return Scene(pixels, tuple(tags), name, tuple(rows))


def spoil(rng: np.random.Generator, pixels: np.ndarray, problems: Sequence[str], split: str) -> np.ndarray:
    """Return a print with these problems, uint8 [H, W, 3], each of a strength of the split. Turns come last."""
    image = Image.fromarray(pixels)
    for name in sorted(problems, key=lambda name: name in TURNS):
        image = _spoilt(rng, image, name, STRENGTHS[split])
    return np.asarray(image)


def _spoilt(rng: np.random.Generator, image: Image.Image, name: str, strengths: dict[str, tuple[float, ...]]) -> Image.Image:
    if name in TURNS:
        return image.rotate(int(name.removeprefix("rotation")))
    if name == "crop":  # cut in two, the right half put before the left
        return ImageChops.offset(image, HALF, 0)
    strength = float(rng.choice(strengths[name]))
    if name == "blur":
        return image.filter(ImageFilter.GaussianBlur(strength))
    pixels = np.asarray(image).astype(np.float32)
    if name == "dark":
        pixels = pixels * strength
    elif name == "overexposure":
        pixels = 255 - (255 - pixels) * strength
    else:  # noise: pixels that are black or white
        lost = rng.random(pixels.shape[:2]) < strength
        pixels[lost] = 255.0 * rng.integers(0, 2, (int(lost.sum()), 1))
    return Image.fromarray(np.round(pixels).astype(np.uint8))
