"""The tiny world: questions about two to four photographs, each with small coloured tags that bear handwritten digits.

In the spirit of multi-image fine-grained question answering: at the size a policy is first shown an image (about a
fifth of its side) the colour and place of a tag are clear and its digit is not; a crop of a fifth to a quarter of the
side, enlarged, shows the digit. Everything is a pure function of a random generator and of the files in `assets/`.
Digits and photographs of the test split occur in no training image.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.resources
import io
import math
import re
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageOps

from imagent_jax.types import Task

COLOURS = ("red", "green", "blue", "yellow", "purple", "orange")
RGB = {
    "red": (236, 28, 36),
    "green": (30, 190, 60),
    "blue": (50, 110, 255),
    "yellow": (255, 232, 0),
    "purple": (176, 60, 240),
    "orange": (255, 132, 0),
}
SPLITS = ("train", "test")
SIZES = ((280, 280), (224, 336), (336, 224))  # (H, W); every side a multiple of 28, about 78,400 pixels

KIND_MIX = {"read": 7, "sum": 5, "compare": 3, "find": 2, "count": 1, "colour": 2}  # tasks of each kind in every 20
KINDS = tuple(KIND_MIX)

TAG_SIDE = 22  # pixels of the coloured square
TAG_BORDER = 1  # white rim around it, pixels
DIGIT_SIDE = 12.5  # pixels that the 8 x 8 digit covers
TAG_VALUE = 0.65  # brightness of the square, fraction of its full colour
INK = 1.1  # contrast of the digit, in the same unit
HALO_SIGMA = 1.8  # width of the halo around the ink, pixels
UNEVEN_LIGHT = 0.14  # greatest deviation of the light on a tag, in the unit of TAG_VALUE
TAG_MARGIN = 0.12  # least distance of a tag's centre from the border, fraction of the side
TAG_GAP = 50  # least distance between two centres along at least one axis, pixels
CELL = 120  # about the side of a cell, pixels; at most one tag has its centre in a cell
MAX_TAGS = 4
JPEG_QUALITY = 92


@dataclasses.dataclass(frozen=True)
class Tag:
    """A tag in a scene: its colour, the digit it bears and its centre as fractions of the width and the height."""

    colour: str
    digit: int
    x: float
    y: float


@dataclasses.dataclass(frozen=True)
class Scene:
    """One image: `pixels` uint8[H, W, 3], its tags, the photograph's name, and the rows of its digits in the assets."""

    pixels: np.ndarray
    tags: tuple[Tag, ...]
    photo: str = ""
    digit_rows: tuple[int, ...] = ()

    def tag(self, colour: str) -> Tag | None:
        """The tag of that colour, or None."""
        return next((tag for tag in self.tags if tag.colour == colour), None)


# --- assets ----------------------------------------------------------------------------------------------------------


@functools.cache
def handwritten_digits(split: str) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
    """Handwritten digits of a split: padded images uint8[n, 14, 14] (0..255) and, per label, the rows that show it."""
    _check_split(split)
    path = importlib.resources.files("imagent_jax.tiny") / "assets/world/digits.npz"
    with path.open("rb") as file, np.load(file) as data:
        images = np.minimum(data[f"{split}_images"].astype(np.int32) * 17, 255).astype(np.uint8)
        labels = data[f"{split}_labels"]
    images = np.pad(images, ((0, 0), (3, 3), (3, 3)))  # so that the bicubic transform fades to nothing at the edge
    return images, tuple(np.flatnonzero(labels == digit) for digit in range(10))


@functools.cache
def photographs(split: str) -> tuple[tuple[str, tuple[np.ndarray, ...]], ...]:
    """Photographs of a split by name, in black and white, each at several scales: uint8[h, w, 3] with both sides at least
    336. Without colours of their own they hide no tag; fine detail is what is left to look for."""
    _check_split(split)
    folder = importlib.resources.files("imagent_jax.tiny").joinpath("assets/world/photos")
    files = sorted((f for f in folder.iterdir() if f.name.startswith(f"{split}_")), key=lambda f: f.name)
    return tuple((f.name.removeprefix(f"{split}_").removesuffix(".jpg"), _scales(f.read_bytes())) for f in files)


def _scales(encoded: bytes) -> tuple[np.ndarray, ...]:
    photo = Image.open(io.BytesIO(encoded)).convert("L").convert("RGB")
    least = max(max(size) for size in SIZES)
    scales = []
    for short in (least, 440):
        factor = short / min(photo.size)
        width, height = (max(least, round(side * factor)) for side in photo.size)
        resized = photo.resize((width, height), Image.Resampling.BICUBIC)
        for image in (resized, ImageOps.mirror(resized)):
            pixels = np.asarray(image)
            pixels.setflags(write=False)
            scales.append(pixels)
    return tuple(scales)


def _check_split(split: str) -> None:
    if split not in SPLITS:
        raise ValueError(f"The tiny world has no split {split!r}; use one of {', '.join(SPLITS)}.")


# --- images ----------------------------------------------------------------------------------------------------------


def make_scene(
    rng: np.random.Generator,
    split: str,
    *,
    colours: Sequence[str] | None = None,
    digits: Sequence[int] | None = None,
    varied: bool = False,
    size: tuple[int, int] | None = None,
) -> Scene:
    """Draws one image: a piece of a photograph with tags of different colours.

    Args:
        rng: source of every choice.
        split: "train" or "test"; photographs and digits come from that split only.
        colours: the colours of the tags, all different; by default two or three at random.
        digits: the digit on each tag, in the order of `colours`; by default random.
        varied: for pre-training: photographs turned and blended, digits of more shapes than there are.
        size: (height, width) in pixels; by default one of `SIZES`.

    Returns:
        A scene. Tags do not touch: their centres are `TAG_GAP` pixels apart along one axis at least,
        `TAG_MARGIN` of the side from the border, and in different cells of a grid of 2 x 2, 2 x 3 or 3 x 2, so that a
        thumbnail of the default size shows at most one tag in a merged feature of Qwen2-VL.

    Raises:
        ValueError: for an unknown split, unknown or repeated colours, or more tags than fit.
    """
    _check_split(split)
    if colours is None:
        count = int(rng.integers(2, 4)) if digits is None else len(digits)
        colours = _pick(rng, COLOURS, count)
    if digits is None:
        digits = rng.integers(0, 10, len(colours)).tolist()
    if len(set(colours)) != len(colours) or not set(colours) <= set(COLOURS) or len(colours) > MAX_TAGS:
        raise ValueError(f"A scene takes up to {MAX_TAGS} different colours of {', '.join(COLOURS)}; got {colours}.")
    if len(digits) != len(colours) or not all(0 <= digit <= 9 for digit in digits):
        raise ValueError(f"A scene takes one digit from 0 to 9 for each of its colours {colours}; got {digits}.")
    height, width = size or SIZES[rng.integers(len(SIZES))]
    pixels, photo = background(rng, split, height, width)
    if varied:
        pixels = vary(rng, split, pixels)
    tags, rows = [], []
    for colour, digit, (top, left) in zip(colours, digits, _places(rng, height, width, len(colours)), strict=True):
        tile, row = tag_pixels(rng, split, colour, int(digit), varied)
        side = len(tile)
        pixels[top : top + side, left : left + side] = tile
        tags.append(Tag(colour, int(digit), (left + side / 2) / width, (top + side / 2) / height))
        rows.append(row)
    return Scene(pixels, tuple(tags), photo, tuple(rows))


def make_crowded_scene(
    rng: np.random.Generator, split: str, height: int, width: int, cell: int = TAG_SIDE + 2 * TAG_BORDER
) -> Scene:
    """A piece of a photograph of (height, width) pixels full of tags, at most one in each of the cells of at least `cell` pixels'
    side, nine in ten of which are taken: many digits to learn from in one small image, `varied` as for `make_scene`. Questions
    never show one."""
    pixels, photo = background(rng, split, height, width)
    pixels = vary(rng, split, pixels)
    side, rows, columns = TAG_SIDE + 2 * TAG_BORDER, height // cell, width // cell
    tags, digit_rows = [], []
    for place in range(rows * columns):
        if rng.random() < 0.1:
            continue
        colour, digit = COLOURS[rng.integers(len(COLOURS))], int(rng.integers(10))
        tile, row = tag_pixels(rng, split, colour, digit, True)
        top, left = (
            int(rng.integers(at * full // count, (at + 1) * full // count - side + 1))
            for at, count, full in ((place // columns, rows, height), (place % columns, columns, width))
        )
        pixels[top : top + side, left : left + side] = tile
        tags.append(Tag(colour, digit, (left + side / 2) / width, (top + side / 2) / height))
        digit_rows.append(row)
    return Scene(pixels, tuple(tags), photo, tuple(digit_rows))


def encode_image(pixels: np.ndarray) -> bytes:
    """JPEG of uint8[H, W, 3], quality `JPEG_QUALITY`, colour at full resolution."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return buffer.getvalue()


def background(rng: np.random.Generator, split: str, height: int, width: int) -> tuple[np.ndarray, str]:
    photos = photographs(split)
    name, scales = photos[rng.integers(len(photos))]
    photo = scales[rng.integers(len(scales))]
    top = int(rng.integers(0, photo.shape[0] - height + 1))
    left = int(rng.integers(0, photo.shape[1] - width + 1))
    return photo[top : top + height, left : left + width].copy(), name


def vary(rng: np.random.Generator, split: str, pixels: np.ndarray) -> np.ndarray:
    """A background turned by a right angle where it is square, or upside down, half of the time blended with another."""
    height, width = pixels.shape[:2]
    if rng.random() < 0.5:
        other, weight = background(rng, split, height, width)[0], rng.random()
        pixels = np.round(weight * pixels + (1 - weight) * other).astype(np.uint8)
    return np.rot90(pixels, int(rng.integers(4)) if height == width else 2 * int(rng.integers(2))).copy()


def _places(rng: np.random.Generator, height: int, width: int, count: int) -> list[tuple[int, int]]:
    """(top, left) of `count` tag tiles, each in a cell of its own, far enough from the border and from each other."""
    side = TAG_SIDE + 2 * TAG_BORDER
    rows, columns = (round(n / CELL) for n in (height, width))

    def draw(at: int, cells: int, full: int) -> int:  # a tile whose centre lies in cell `at`
        low = max(at * full / cells, TAG_MARGIN * full) - side / 2
        high = min((at + 1) * full / cells, (1 - TAG_MARGIN) * full) - side / 2
        return int(rng.integers(math.ceil(low), math.ceil(high)))

    while True:
        cells = rng.permutation(rows * columns)[:count]
        places = [(draw(int(cell) // columns, rows, height), draw(int(cell) % columns, columns, width)) for cell in cells]
        near = [max(abs(a[0] - b[0]), abs(a[1] - b[1])) < TAG_GAP for i, a in enumerate(places) for b in places[:i]]
        if not any(near):
            return places


def tag_pixels(rng: np.random.Generator, split: str, colour: str, digit: int, varied: bool = False) -> tuple[np.ndarray, int]:
    """A tag as uint8[side, side, 3] and the row of its digit in the assets.

    A coloured square with a white rim. The digit is dark ink with a light halo that evens out its mean brightness,
    under faint uneven light: what is left of it at thumbnail size is little, while an enlarged crop shows it crisply.
    """
    images, by_label = handwritten_digits(split)
    row = int(rng.choice(by_label[digit]))
    image = images[row]
    if varied:  # between two handwritings of the digit
        weight = rng.uniform(0.5, 1.0)
        image = np.round(weight * image + (1 - weight) * images[int(rng.choice(by_label[digit]))]).astype(np.uint8)
    ink = _place_digit(image, rng, varied)
    blur = _gaussian(TAG_SIDE, HALO_SIGMA)
    light = rng.uniform(-UNEVEN_LIGHT, UNEVEN_LIGHT, (5, 5)).astype(np.float32)
    light = np.asarray(Image.fromarray(light).resize((TAG_SIDE, TAG_SIDE), Image.Resampling.BICUBIC))
    value = np.clip(TAG_VALUE + light - INK * (ink - blur @ ink @ blur.T), 0.05, 1.0)
    tile = np.full((TAG_SIDE + 2 * TAG_BORDER,) * 2 + (3,), 255, np.uint8)
    inner = slice(TAG_BORDER, TAG_BORDER + TAG_SIDE)
    tile[inner, inner] = np.round(value[..., None] * np.asarray(RGB[colour], np.float32))
    return tile, row


def _place_digit(image: np.ndarray, rng: np.random.Generator, varied: bool) -> np.ndarray:
    """The padded digit, enlarged to `DIGIT_SIDE`, a little turned, scaled and shifted: float32[TAG_SIDE, TAG_SIDE].
    A `varied` one is turned more, sheared and stretched."""
    angle = math.radians(rng.uniform(-8, 8))
    step = 8 / DIGIT_SIDE / rng.uniform(0.94, 1.06)  # digit pixels per tag pixel
    cos, sin = math.cos(angle) * step, math.sin(angle) * step
    turn = np.array([[cos, sin], [-sin, cos]])
    if varied:
        turn = turn @ (np.eye(2) + rng.uniform(-0.16, 0.16, (2, 2)))
    x, y = TAG_SIDE / 2 + rng.uniform(-1, 1, 2)
    middle = image.shape[0] / 2
    (a, b), (c, d) = turn
    inverse = (a, b, middle - a * x - b * y, c, d, middle - c * x - d * y)
    size = (TAG_SIDE, TAG_SIDE)
    turned = Image.fromarray(image).transform(size, Image.Transform.AFFINE, inverse, Image.Resampling.BICUBIC)
    return np.asarray(turned, np.float32) / 255


@functools.cache
def _gaussian(size: int, sigma: float) -> np.ndarray:
    """Blur along one axis as a matrix, float32[size, size]; zeros outside."""
    distance = np.arange(size)[:, None] - np.arange(size)
    weights = np.exp(-0.5 * (np.arange(-4 * size, 4 * size + 1) / sigma) ** 2)
    return (np.exp(-0.5 * (distance / sigma) ** 2) / weights.sum()).astype(np.float32)


# --- questions -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class _Plan:
    """A question before its images are drawn: per image, the tags that it must or must not have."""

    question: str
    answer: str
    answer_type: str
    required: list[dict[str, int | None]]  # per image: colour -> digit (None: any)
    forbidden: list[set[str]]  # per image: colours that must not occur
    targets: list[tuple[int, str]]  # (image number, colour) of the tags that the answer depends on


def make_task(rng: np.random.Generator, split: str, kind: str | None = None) -> tuple[Task, list[Scene]]:
    """Draws a question and its images.

    Args:
        rng: source of every choice.
        split: "train" or "test".
        kind: one of `KINDS`; by default drawn with the frequencies of `KIND_MIX`.

    Returns:
        The task, and its scenes in the order of its images. `task.meta` holds the split, the tags of every image and
        the targets, (image number, colour) pairs that the answer depends on.

    Raises:
        ValueError: for an unknown split or kind.
    """
    _check_split(split)
    if kind is None:
        kind = str(rng.choice(KINDS, p=np.array(list(KIND_MIX.values())) / sum(KIND_MIX.values())))
    if kind not in _PLANS:
        raise ValueError(f"The tiny world has no question kind {kind!r}; use one of {', '.join(KINDS)}.")
    count = int(rng.integers(2, 4 if kind == "find" else 5))
    plan = _PLANS[kind](rng, count)
    scenes = [
        _scene_for(rng, split, required, forbidden) for required, forbidden in zip(plan.required, plan.forbidden, strict=True)
    ]
    images = tuple(encode_image(scene.pixels) for scene in scenes)
    name = hashlib.sha1(plan.question.encode() + b"".join(images)).hexdigest()[:16]
    meta = {
        "split": split,
        "targets": [list(target) for target in plan.targets],
        "tags": [[dataclasses.asdict(tag) for tag in scene.tags] for scene in scenes],
    }
    return Task(f"tiny_world/{name}", plan.question, images, plan.answer, plan.answer_type, kind, meta), scenes


def task_at(seed: int, split: str, index: int) -> Task:
    """The task number `index` of the endless series that `seed` and `split` name.

    Always the same task for the same arguments. Every 20 consecutive tasks from a multiple of 20 on hold exactly the
    numbers of `KIND_MIX`, in a random order.
    """
    _check_split(split)
    code = SPLITS.index(split)
    cycle = [kind for kind, times in KIND_MIX.items() for _ in range(times)]
    block, place = divmod(index, len(cycle))
    kind = cycle[np.random.default_rng((seed, code, 0, block)).permutation(len(cycle))[place]]
    task, _ = make_task(np.random.default_rng((seed, code, 1, index)), split, kind)
    return dataclasses.replace(task, uid=f"tiny_world/{split}/{seed}/{index}")


def in_fixed_order(task: Task) -> Task:
    """The task with its images renumbered: first the one that is the answer, then others the answer depends on, then the
    rest. A policy that is trained on nothing else may learn places in place of looking."""
    answer = [int(task.answer.removeprefix("Image "))] if task.answer_type == "choice" else []
    order = list(dict.fromkeys([*answer, *(n for n, _ in task.meta["targets"]), *range(1, len(task.images) + 1)]))

    def renumbered(text: str) -> str:
        return re.sub(r"Image (\d+)", lambda match: f"Image {order.index(int(match[1])) + 1}", text)

    meta = task.meta | {
        "tags": [task.meta["tags"][n - 1] for n in order],
        "targets": [[order.index(n) + 1, colour] for n, colour in task.meta["targets"]],
    }
    images = tuple(task.images[n - 1] for n in order)
    return dataclasses.replace(task, question=renumbered(task.question), answer=renumbered(task.answer), images=images, meta=meta)


def _scene_for(rng: np.random.Generator, split: str, required: dict[str, int | None], forbidden: set[str]) -> Scene:
    """A scene with the required tags and none of the forbidden colours, filled up at random to two or three tags."""
    count = int(rng.integers(max(2, len(required)), 4))
    free = [colour for colour in COLOURS if colour not in required and colour not in forbidden]
    colours = [*required, *_pick(rng, free, count - len(required))]
    colours = _pick(rng, colours, count)
    chosen = [required.get(colour) for colour in colours]
    return make_scene(rng, split, colours=colours, digits=[int(rng.integers(10)) if digit is None else digit for digit in chosen])


def _pick(rng: np.random.Generator, values: Sequence, count: int) -> list:
    """`count` different values in a random order."""
    return [values[i] for i in rng.permutation(len(values))[:count]]


def _empty(count: int) -> tuple[list[dict[str, int | None]], list[set[str]]]:
    return [{} for _ in range(count)], [set() for _ in range(count)]


def _phrase(rng: np.random.Generator, *phrasings: str) -> str:
    return phrasings[rng.integers(len(phrasings))]


def _read(rng: np.random.Generator, count: int) -> _Plan:
    required, forbidden = _empty(count)
    image, colour, digit = int(rng.integers(count)), str(rng.choice(COLOURS)), int(rng.integers(10))
    required[image][colour] = digit
    question = _phrase(
        rng, f"What digit is on the {colour} tag in Image {image + 1}?", f"Read the {colour} tag in Image {image + 1}."
    )
    return _Plan(question, str(digit), "number", required, forbidden, [(image + 1, colour)])


def _sum(rng: np.random.Generator, count: int) -> _Plan:
    required, forbidden = _empty(count)
    targets, total = [], 0
    for image in _pick(rng, range(count), 2):
        colour, digit = str(rng.choice(COLOURS)), int(rng.integers(10))
        required[image][colour] = digit
        targets.append((image + 1, colour))
        total += digit
    (a, colour_a), (b, colour_b) = targets
    first, second = f"the {colour_a} tag in Image {a}", f"the {colour_b} tag in Image {b}"
    question = _phrase(rng, f"What is the sum of the digits on {first} and {second}?", f"Add {first} to {second}.")
    return _Plan(question, str(total), "number", required, forbidden, targets)


def _compare(rng: np.random.Generator, count: int) -> _Plan:
    required, forbidden = _empty(count)
    images, shown, colour = _pick(rng, range(count), 2), _pick(rng, range(10), 2), str(rng.choice(COLOURS))
    for image, digit in zip(images, shown, strict=True):
        required[image][colour] = digit
    a, b = (image + 1 for image in images)
    question = f"Which image has the larger digit on its {colour} tag, Image {a} or Image {b}?"
    larger = a if shown[0] > shown[1] else b
    return _Plan(question, f"Image {larger}", "choice", required, forbidden, [(a, colour), (b, colour)])


def _find(rng: np.random.Generator, count: int) -> _Plan:
    required, forbidden = _empty(count)
    image, colour = int(rng.integers(count)), str(rng.choice(COLOURS))
    for other in range(count):
        required[other][colour] = int(rng.integers(5, 10) if other == image else rng.integers(0, 5))
    targets = [(n + 1, colour) for n in range(count)]
    question = f"In which image does the {colour} tag show a digit larger than 4?"
    return _Plan(question, f"Image {image + 1}", "choice", required, forbidden, targets)


def _count(rng: np.random.Generator, count: int) -> _Plan:
    required, forbidden = _empty(count)
    colour, number = str(rng.choice(COLOURS)), int(rng.integers(1, count + 1))
    having = set(_pick(rng, range(count), number))
    for image in range(count):
        if image in having:
            required[image][colour] = None
        else:
            forbidden[image].add(colour)
    targets = [(image + 1, colour) for image in sorted(having)]
    return _Plan(f"How many images have {_a(colour)} tag?", str(number), "number", required, forbidden, targets)


def _colour(rng: np.random.Generator, count: int) -> _Plan:
    required, forbidden = _empty(count)
    image, colour = int(rng.integers(count)), str(rng.choice(COLOURS))
    required[image][colour] = None
    for other in set(range(count)) - {image}:
        forbidden[other].add(colour)
    question = f"Which image has {_a(colour)} tag?"
    return _Plan(question, f"Image {image + 1}", "choice", required, forbidden, [(image + 1, colour)])


def _a(colour: str) -> str:
    return f"{'an' if colour[0] in 'aeiou' else 'a'} {colour}"


_PLANS = {"read": _read, "sum": _sum, "compare": _compare, "find": _find, "count": _count, "colour": _colour}
