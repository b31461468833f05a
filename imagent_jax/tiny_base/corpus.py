"""What the tiny base is pre-trained on. It learns skills; which tool call a question needs is left to RL.

Skills: LOCATE a tag in a thumbnail, READ a crop, ANSWER a question from crops that are given, LOOK (questions that
thumbnails answer), CALL a tool with arbitrary arguments and say what it showed, GUESS.

The rule: questions that need a digit are asked of thumbnails only in a form that nothing in the images can answer (the
tag they name does not exist). Such a question is followed by a guess, or by calls on images and tags drawn uniformly,
independently of its words. So no question is ever paired with a call that solves it; `tests/test_tiny_corpus.py` checks.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from imagent_jax.data.tiny_world import COLOURS, Scene, Tag, make_scene
from imagent_jax.model.images import smart_resize
from imagent_jax.tools import ImageRegistry, ToolSettings, format_call, tools_by_name

THUMBNAIL = (3136, 4704)
"""Pixel budget of the images a question is asked of (least, most); the default run's own."""
SYSTEM = "Answer with <answer>...</answer>."
BOX = 200
"""Side of a box around a tag, thousandths of the image's side."""
STEP = 25
"""Boxes are written in multiples of this many thousandths."""
TURN = "<|im_end|>\n<|im_start|>"
SETTINGS = ToolSettings()
TOOLS = tools_by_name(("visual_reflection", "visual_confirmation"))


@dataclass(frozen=True)
class ShownImage:
    """An image with the pixel budget it is shown at."""

    pixels: Image.Image
    min_pixels: int
    max_pixels: int


@dataclass(frozen=True)
class Segment:
    """A piece of a response; `<image>` stands for the next of `images`. Only `trained` pieces count in the loss."""

    text: str
    trained: bool
    images: tuple[ShownImage, ...] = ()


@dataclass(frozen=True)
class PretrainGroup:
    """Images shared by several continuations; `notes` says, per response, what was asked and called (for tests)."""

    images: list[ShownImage]
    prompt: str
    responses: list[list[Segment]]
    notes: list[dict] = field(default_factory=list)


def prompt_text(count: int) -> str:
    """System turn and the images of a user turn, exactly as a rollout renders them."""
    lines = "".join(f"Image {n}: <image>\n" for n in range(1, count + 1))
    system = TOOLS.system_prompt(SYSTEM, SETTINGS)
    return f"<|im_start|>system\n{system}{TURN}user\n{lines}"


def ask(question: str) -> Segment:
    return Segment(f"{question}{TURN}assistant\n", False)


def say(text: str) -> Segment:
    return Segment(f"{text}<|im_end|>", True)


def box_of(tag: Tag) -> list[int]:
    """The box around a tag: [x1, y1, x2, y2] in thousandths, multiples of `STEP`, inside the image."""
    corner = [min(max(round((c * 1000 - BOX / 2) / STEP) * STEP, 0), 1000 - BOX) for c in (tag.x, tag.y)]
    return [*corner, corner[0] + BOX, corner[1] + BOX]


def _pick(rng: np.random.Generator, values):
    return values[int(rng.integers(len(values)))]


# ---- thumbnails: LOCATE, LOOK, GUESS ------------------------------------------------------------------------------


def locate(rng, scenes: list[Scene]) -> tuple[str, str, dict]:
    number = int(rng.integers(len(scenes)))
    scene = scenes[number]
    form = rng.random()
    if form < 0.75:
        tag = _pick(rng, scene.tags)
        return f"Where is the {tag.colour} tag in Image {number + 1}?", str(box_of(tag)), {}
    ordered = sorted(scene.tags, key=lambda t: t.x)
    return f"Name the tags in Image {number + 1}.", " ".join(t.colour for t in ordered), {}


def look(rng, scenes: list[Scene]) -> tuple[str, str, dict]:
    having = {c: [n for n, s in enumerate(scenes, 1) if s.tag(c)] for c in COLOURS}
    once = [c for c, numbers in having.items() if len(numbers) == 1]
    if once and rng.random() < 0.5:
        colour = _pick(rng, once)
        return f"Which image has {_a(colour)} tag?", f"<answer>Image {having[colour][0]}</answer>", {"kind": "colour"}
    colour = _pick(rng, [c for c, numbers in having.items() if numbers])
    return f"How many images have {_a(colour)} tag?", f"<answer>{len(having[colour])}</answer>", {"kind": "count"}


def _a(colour: str) -> str:
    return f"{'an' if colour[0] in 'aeiou' else 'a'} {colour}"


def unanswerable(rng, scenes: list[Scene]) -> tuple[str, Callable[[list[int], list[int]], str], dict]:
    """A question in the world's words about tags that are not there; and how an answer follows from (numbers of
    images read, digits read), by chance where nothing follows."""
    n = len(scenes)

    def absent() -> tuple[int, str]:
        number = int(rng.integers(1, n + 1))
        colours = [c for c in COLOURS if not scenes[number - 1].tag(c)]
        return number, _pick(rng, colours)

    kind = _pick(rng, ("read", "read", "sum", "compare", "find"))
    (a, colour), (b, other) = absent(), absent()
    for _ in range(20):
        if a != b:
            break
        b, other = absent()
    if kind == "read":
        question = _pick(rng, (f"What digit is on the {colour} tag in Image {a}?", f"Read the {colour} tag in Image {a}."))

        def answer(images, digits):
            return str(digits[-1] if digits else rng.integers(10))
    elif kind == "sum":
        x, y = f"the {colour} tag in Image {a}", f"the {other} tag in Image {b}"
        question = _pick(rng, (f"What is the sum of the digits on {x} and {y}?", f"Add {x} to {y}."))

        def answer(images, digits):
            return str(sum(digits[-2:]) if len(digits) > 1 else rng.integers(19))
    elif kind == "compare":
        question = f"Which image has the larger digit on its {colour} tag, Image {a} or Image {b}?"

        def answer(images, digits):
            if len(digits) > 1 and {images[-1], images[-2]} == {a, b} and digits[-1] != digits[-2]:
                return f"Image {images[-1] if digits[-1] > digits[-2] else images[-2]}"
            return f"Image {_pick(rng, (a, b))}"
    else:
        colours = [c for c in COLOURS if not any(s.tag(c) for s in scenes)] or [colour]
        colour, digit = _pick(rng, colours), int(rng.integers(10))
        question = f"In which image does the {colour} tag show {digit}?"

        def answer(images, digits):
            found = [i for i, d in zip(images, digits, strict=True) if d == digit]
            return f"Image {found[-1] if found else rng.integers(1, n + 1)}"
    return question, answer, {"kind": kind, "asked": [(a, colour), (b, other)]}


def guess(rng, scenes: list[Scene]) -> tuple[str, str, dict]:
    question, answer, note = unanswerable(rng, scenes)
    return question, f"<answer>{answer([], [])}</answer>", note


# ---- calls --------------------------------------------------------------------------------------------------------


def call(rng, scenes: list[Scene], registry: ImageRegistry) -> tuple[list[Segment], dict]:
    """One to four calls with arbitrary arguments, each followed by what it shows; then an answer or the turn's end."""
    form = rng.random()
    if form < 0.70:
        question, answer, note = unanswerable(rng, scenes)
    elif form < 0.85:
        question, text, note = look(rng, scenes)
        answer = lambda images, digits: text.removeprefix("<answer>").removesuffix("</answer>")  # noqa: E731
    else:
        question, answer, note = _pick(rng, ("Use a tool.", "Look closely.", "Look again.")), None, {}
    segments, said, images, digits, calls = [ask(question)], "", [], [], []
    for turn in range(4):
        if rng.random() < 0.12:
            arguments = {"images": [int(rng.integers(1, len(scenes) + 1))]}
            name, reading = "visual_reflection", ""
        else:
            number = int(rng.integers(len(scenes)))
            tag = _pick(rng, scenes[number].tags)
            name, arguments = "visual_confirmation", {"image": number + 1, "label": tag.colour, "bbox_2d": box_of(tag)}
            reading = f"Image {number + 1} {tag.colour} {tag.digit}.\n"
            images, digits = [*images, number + 1], [*digits, tag.digit]
            calls.append((number + 1, tag.colour))
        text = format_call(name, arguments)
        result = TOOLS.execute(text, registry, SETTINGS)
        segments += [Segment(said + text, True), observation(result.parts, registry)]
        said = reading
        if rng.random() < (0.55, 0.5, 0.7, 1.0)[turn]:
            break
    closing = f"<answer>{answer(images, digits)}</answer>" if answer else "Done."
    return [*segments, say(said + closing)], note | {"calls": calls}


def observation(parts: list[str | int], registry: ImageRegistry) -> Segment:
    """A tool's observation as a rollout renders it."""
    lines = "".join(f"{part}\n" if isinstance(part, str) else "<image>\n" for part in parts)
    entries = [registry[part] for part in parts if not isinstance(part, str)]
    shown = tuple(ShownImage(e.image, e.min_pixels, e.max_pixels) for e in entries)
    text = f"{TURN}user\n<tool_response>\n{lines}</tool_response>{TURN}assistant\n"
    return Segment(text, False, shown)


# ---- crops: READ, ANSWER ------------------------------------------------------------------------------------------


def crop_near(rng, scene: Scene, tag: Tag) -> Image.Image:
    """A crop of about the size a call makes, with the tag wholly inside, off its centre by chance."""
    height, width = scene.pixels.shape[:2]
    side = [BOX / 1000 * s * rng.uniform(0.85, 1.15) for s in (width, height)]
    centre = [c * s for c, s in zip((tag.x, tag.y), (width, height), strict=True)]
    slack = [max(0.0, s / 2 - 13) for s in side]
    middle = [c + float(np.clip(rng.normal(0, 0.45), -1, 1)) * k for c, k in zip(centre, slack, strict=True)]
    left, top = (round(min(max(m - s / 2, 0), full - s)) for m, s, full in zip(middle, side, (width, height), strict=True))
    box = (left, top, min(width, left + round(side[0])), min(height, top + round(side[1])))
    return Image.fromarray(scene.pixels[box[1] : box[3], box[0] : box[2]])


def read(rng, shown: list[Tag]) -> tuple[str, str, dict]:
    number = int(rng.integers(len(shown)))
    tag = shown[number]
    return f"What does Image {number + 1} show?", _reading(number + 1, tag), {}


def _reading(number: int, tag: Tag) -> str:
    return f"Image {number} {tag.colour} {tag.digit}.\n"


def answer_given(rng, shown: list[Tag]) -> tuple[str, str, dict]:
    """A question in the world's words about crops that are given, one tag each: what they show, then the answer."""
    numbers = [int(i) + 1 for i in rng.permutation(len(shown))]
    a, b = numbers[0], numbers[1]
    first, second = shown[a - 1], shown[b - 1]
    kind = _pick(rng, ("read", "sum", "sum", "compare", "find"))
    if kind == "compare" and (first.colour != second.colour or first.digit == second.digit):
        kind = "sum"
    if kind == "find" and len({t.digit for t in shown}) < len(shown):
        kind = "sum"
    if kind == "read":
        question = _pick(rng, (f"What digit is on the {first.colour} tag in Image {a}?", f"Read the {first.colour} tag in Image {a}."))
        return question, f"{_reading(a, first)}<answer>{first.digit}</answer>", {"kind": kind}
    if kind == "sum":
        x, y = f"the {first.colour} tag in Image {a}", f"the {second.colour} tag in Image {b}"
        question = _pick(rng, (f"What is the sum of the digits on {x} and {y}?", f"Add {x} to {y}."))
        evidence = _reading(a, first) + _reading(b, second)
        return question, f"{evidence}<answer>{first.digit + second.digit}</answer>", {"kind": kind}
    if kind == "compare":
        larger = a if first.digit > second.digit else b
        question = f"Which image has the larger digit on its {first.colour} tag, Image {a} or Image {b}?"
        return question, f"{_reading(a, first)}{_reading(b, second)}<answer>Image {larger}</answer>", {"kind": kind}
    tried = numbers[: int(rng.integers(1, len(numbers) + 1))]
    evidence = "".join(_reading(n, shown[n - 1]) for n in tried)
    question = f"In which image does the {first.colour} tag show {shown[tried[-1] - 1].digit}?"
    return question, f"{evidence}<answer>Image {tried[-1]}</answer>", {"kind": kind}


# ---- groups -------------------------------------------------------------------------------------------------------


def make_group(rng: np.random.Generator, size: int, form: str | None = None) -> PretrainGroup:
    """Images and `size` continuations of one form: "crops" (READ, ANSWER), "thumbnails" (LOCATE, LOOK, GUESS) or "calls"."""
    form = form or ("crops" if (u := rng.random()) < 0.35 else "thumbnails" if u < 0.7 else "calls")
    count = int(rng.integers(2, 5))
    responses, notes = [], []
    if form == "crops":
        same = rng.random() < 0.6
        colour = _pick(rng, COLOURS)
        images, shown = [], []
        for _ in range(count):
            others = [c for c in rng.permutation(COLOURS).tolist() if c != colour]
            scene = make_scene(rng, "train", colours=[colour, *others[: int(rng.integers(1, 3))]])
            tag = scene.tags[0] if same else _pick(rng, scene.tags)
            images.append(ShownImage(crop_near(rng, scene, tag), SETTINGS.confirm_min_pixels, SETTINGS.confirm_max_pixels))
            shown.append(tag)
        for i in range(size):
            question, text, note = (read if i % 2 else answer_given)(rng, shown)
            responses.append([ask(question), say(text)])
            notes.append(note)
        return PretrainGroup(images, prompt_text(count), responses, notes)
    shared = [c for c in COLOURS if rng.random() < 0.25][:1]
    scenes = []
    for _ in range(count):
        others = [c for c in rng.permutation(COLOURS).tolist() if c not in shared]
        chosen = [*shared, *others][: int(rng.integers(2, 4))]
        scenes.append(make_scene(rng, "train", colours=rng.permutation(chosen).tolist()))
    images = [ShownImage(Image.fromarray(s.pixels), *THUMBNAIL) for s in scenes]
    registry = ImageRegistry()
    for image in images:
        shown = smart_resize(image.pixels.height, image.pixels.width, SETTINGS.patch_factor, *THUMBNAIL)
        registry.add(image.pixels, shown=shown, min_pixels=THUMBNAIL[0], max_pixels=THUMBNAIL[1])
    for i in range(size):
        if form == "calls":
            segments, note = call(rng, scenes, registry.fork())
        else:
            skill = (locate, look, locate, guess)[i % 4]
            question, text, note = skill(rng, scenes)
            segments = [ask(question), say(text)]
        responses.append(segments)
        notes.append(note)
    return PretrainGroup(images, prompt_text(count), responses, notes)


def corpus_texts(count: int, seed: int) -> list[str]:
    """`count` conversations as text, `<image>` for images: what the tokenizer is trained on."""
    rng = np.random.default_rng(seed)
    texts: list[str] = []
    while len(texts) < count:
        group = make_group(rng, 8)
        texts.append(group.prompt)
        texts += ["".join(segment.text for segment in response) for response in group.responses]
    return texts[:count]
