"""What the tiny base is pre-trained on. It learns skills; which tool call a question needs is left to RL.

Skills: LOCATE a tag in a thumbnail, READ a crop, ANSWER a question from crops that are given, LOOK (questions that
thumbnails answer), CALL a tool with arbitrary arguments and say what it showed, GUESS.

The rule: a question that needs a digit is asked of thumbnails only in a form that nothing in the images can answer (the
tag it names does not exist). Such a question is followed by a guess, or by calls on other tags, some of them in an image or
of a colour that it names. Questions about what calls showed come after the calls, which a neutral request began, or a
command that names their arguments ("Look closely at the red tag in Image 2."). So no question is ever followed by a call
that helps to answer it: `solves` says which would, and `tests/test_tiny_corpus.py` checks it.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from imagent_jax.chat import QWEN, Call, answer_markup
from imagent_jax.chat.prompts import read_prompt
from imagent_jax.images.prepare import smart_resize
from imagent_jax.tiny.world import COLOURS, Scene, Tag, make_scene
from imagent_jax.tools import ImageRegistry, ToolSet, ToolSettings, tools_by_name

THUMBNAIL = (3136, 4704)
"""Pixel budget of the images a question is asked of (least, most); the default run's own."""
PROMPT = read_prompt("tiny")
BOX = 200
"""Side of a box around a tag, thousandths of the image's side."""
STEP = 25
"""Boxes are written in multiples of this many thousandths."""
FORMS = {"crop": 0.03, "thumbnail": 0.02, "crops": 0.25, "thumbnails": 0.15, "calls": 0.55}
"""Share of the groups of each form; all responses of a group have one form. "crop" and "thumbnail" are one image each."""
FIRST_FORMS = {"crop": 0.42, "thumbnail": 0.42, "crops": 0.06, "thumbnails": 0.06, "calls": 0.04}
"""The same at the beginning: seeing comes before choosing among images."""
THUMBNAIL_MIX = {"locate": 0.20, "look": 0.76, "guess": 0.04}
"""What is asked in a "thumbnails" group."""
CALL_MIX = {"question": 0.60, "guess": 0.05, "request": 0.05, "command": 0.30}
"""What the responses of a "calls" group answer: a question by calls, one by a guess, a request to use tools, a command that
says which calls to make."""
LEAN = (0.25, 0.20)
"""Chance that a call after a question shows a tag of an image, of a colour, that the question names."""
CALLS = (0.6, 0.24, 0.1, 0.06)
"""How often one to four calls follow a request; of the calls after a question, see `unanswerable`."""
NO_TAG = 0.06
"""Share of crops without a tag."""
SETTINGS = ToolSettings()
TOOLS = tools_by_name(("visual_reflection", "visual_confirmation"))


@dataclass(frozen=True)
class Style:
    """How the corpus shows images: those of a base and of the runs that begin with it.

    Attributes:
        given: pixel budget of the images a question is asked of (least, most).
        tools: those that a prompt offers.
    """

    given: tuple[int, int]
    settings: ToolSettings
    tools: ToolSet


STYLE = Style(THUMBNAIL, SETTINGS, TOOLS)
"""Of the base of the tiny world."""


@dataclass(frozen=True)
class ShownImage:
    """An image with the pixel budget it is shown at."""

    pixels: Image.Image
    min_pixels: int | None
    max_pixels: int | None


@dataclass(frozen=True)
class Segment:
    """A piece of a response; `<image>` stands for the next of `images`. Only `trained` pieces count in the loss."""

    text: str
    trained: bool
    images: tuple[ShownImage, ...] = ()


@dataclass(frozen=True)
class PretrainGroup:
    """Images shared by several continuations; `scenes` are the images' own, in order, for checks."""

    images: list[ShownImage]
    prompt: str
    responses: list[list[Segment]]
    scenes: list[Scene] = field(default_factory=list)


def prompt_text(count: int, style: Style = STYLE) -> str:
    """System turn and the images of a user turn, exactly as a rollout renders them."""
    system = QWEN.system(PROMPT.system, style.tools.schemas(style.settings, PROMPT))
    return _with_placeholders(QWEN.render_parts(system, range(1, count + 1), range(count)))


def _with_placeholders(parts: Sequence[Any]) -> str:
    return "".join("".join(part) if isinstance(part, tuple) else "<image>" for part in parts)


def ask(question: str) -> Segment:
    return Segment(question + QWEN.next_turn("assistant"), False)


def say(text: str) -> Segment:
    return Segment(text + QWEN.turn_close, True)


def box_of(tag: Tag) -> list[int]:
    """The box around a tag: [x1, y1, x2, y2] in thousandths, multiples of `STEP`, inside the image."""
    corner = [min(max(round((c * 1000 - BOX / 2) / STEP) * STEP, 0), 1000 - BOX) for c in (tag.x, tag.y)]
    return [*corner, corner[0] + BOX, corner[1] + BOX]


def _pick(rng: np.random.Generator, values):
    return values[int(rng.integers(len(values)))]


# ---- thumbnails: LOCATE, LOOK, GUESS ------------------------------------------------------------------------------


def locate(rng, scenes: list[Scene], number: int, tag: Tag) -> tuple[str, str]:
    if rng.random() < 0.8:
        return f"Where is the {tag.colour} tag in Image {number}?", str(box_of(tag))
    return f"Name the tags in Image {number}.", _names(scenes[number - 1])


def look(rng, scenes: list[Scene]) -> tuple[str, str]:
    """A question that thumbnails answer: whether the tag is there, image by image, then the answer."""
    having = {c: [n for n, s in enumerate(scenes, 1) if s.tag(c)] for c in COLOURS}
    once = [c for c, numbers in having.items() if len(numbers) == 1]
    which = bool(once) and rng.random() < 0.5
    colour = _pick(rng, once if which else [c for c, numbers in having.items() if numbers])
    seen = [f"Image {n} {colour if scene.tag(colour) else 'no tag'}.\n" for n, scene in enumerate(scenes, 1)]
    if which:
        number = having[colour][0]
        return f"Which image has {_a(colour)} tag?", f"{''.join(seen[:number])}{answer_markup(f'Image {number}')}"
    return f"How many images have {_a(colour)} tag?", f"{''.join(seen)}{answer_markup(len(having[colour]))}"


def _names(scene: Scene) -> str:
    """The colours of its tags from left to right."""
    return " ".join(tag.colour for tag in sorted(scene.tags, key=lambda tag: tag.x))


def _a(colour: str) -> str:
    return f"{'an' if colour[0] in 'aeiou' else 'a'} {colour}"


def solves(question: str, image: int, colour: str) -> bool:
    """Whether seeing the tag of `colour` in `image` closely helps to answer a question of the tiny world."""
    if pairs := re.findall(r"(\w+) tag in Image (\d+)", question):  # read, sum
        return (colour, str(image)) in pairs
    if match := re.search(r"its (\w+) tag, Image (\d+) or Image (\d+)", question):  # compare
        return colour == match[1] and str(image) in match.groups()[1:]
    match = re.search(rf"\b({'|'.join(COLOURS)}) tag\b", question)  # find, count, colour
    return match is not None and colour == match[1]


def read_question(rng, image: int, colour: str) -> str:
    tag = f"the {colour} tag in Image {image}"
    return _pick(rng, (f"What digit is on {tag}?", f"Read {tag}."))


def sum_question(rng, first: tuple[int, str], second: tuple[int, str]) -> str:
    x, y = (f"the {colour} tag in Image {image}" for image, colour in (first, second))
    return _pick(rng, (f"What is the sum of the digits on {x} and {y}?", f"Add {x} to {y}."))


def compare_question(colour: str, a: int, b: int) -> str:
    return f"Which image has the larger digit on its {colour} tag, Image {a} or Image {b}?"


def find_question(colour: str) -> str:
    return f"In which image does the {colour} tag show a digit larger than 4?"


@dataclass(frozen=True)
class Unanswerable:
    """A question in the world's words about tags that are not there.

    Attributes:
        calls: how many calls mostly follow.
        answer: how an answer follows from what was read, (image, digit) in order; by chance where nothing follows.
        settled: whether more readings would change nothing.
        targets: tags to look at, one in every image, in order; empty where any will do.
    """

    question: str
    calls: int
    answer: Callable[[list[tuple[int, int]]], str]
    settled: Callable[[list[tuple[int, int]]], bool] = lambda seen: False
    targets: tuple[Tag, ...] = ()


def unanswerable(rng, scenes: list[Scene]) -> Unanswerable:
    n = len(scenes)
    a, b = (int(i) + 1 for i in rng.permutation(n)[:2])
    absent = [{c for c in COLOURS if not scene.tag(c)} for scene in scenes]
    kind = _pick(rng, ("read", "sum", "compare", "find", "find", "find"))
    shared = sorted(absent[a - 1] & absent[b - 1] if kind == "compare" else set.intersection(*absent))
    if kind == "sum":
        pairs = [(image, _pick(rng, sorted(absent[image - 1]))) for image in (a, b)]
        return Unanswerable(
            sum_question(rng, *pairs), 2, lambda seen: str(seen[-1][1] + seen[-2][1] if len(seen) > 1 else rng.integers(19))
        )
    if kind == "compare" and shared:

        def larger(seen):  # of what was read last, wherever it was
            (i, x), (j, y) = seen[-2:] if len(seen) > 1 else ((a, 0), (b, 0))
            return f"Image {_pick(rng, (i, j)) if x == y else i if x > y else j}"

        return Unanswerable(compare_question(_pick(rng, shared), a, b), 2, larger)
    if kind == "find" and shared:
        tags = tuple(_pick(rng, scene.tags) for scene in scenes)  # of other colours than the question's
        for _ in range(20):
            if sum(tag.digit > 4 for tag in tags) != 1:  # as in the world; where no tags do, any
                tags = tuple(_pick(rng, scene.tags) for scene in scenes)

        def left(seen):  # the image that showed one, or those not read
            found = [image for image, shown in seen if shown > 4]
            return found[-1:] or [image for image in range(1, n + 1) if image not in dict(seen)]

        return Unanswerable(
            find_question(_pick(rng, shared)),
            n,
            lambda seen: f"Image {_pick(rng, left(seen) or range(1, n + 1))}",
            settled=lambda seen: len(left(seen)) == 1,
            targets=tags,
        )
    question = read_question(rng, a, _pick(rng, sorted(absent[a - 1])))
    return Unanswerable(question, 1, lambda seen: str(seen[-1][1] if seen else rng.integers(10)))


def guess(rng, scenes: list[Scene]) -> tuple[str, str]:
    asked = unanswerable(rng, scenes)
    return asked.question, answer_markup(asked.answer([]))


# ---- calls --------------------------------------------------------------------------------------------------------


def call(rng, scenes: list[Scene], registry: ImageRegistry, kind: str, style: Style = STYLE) -> list[Segment]:
    """One to four calls with arbitrary arguments, each followed by what it shows.

    Args:
        kind: "question": an unanswerable question comes first, then mostly as many calls as it speaks of tags, an answer
            last. "request": a neutral request comes first, and after the calls a question about what they showed, answered.
            "command": the same, but the call's arguments are told: "Look closely at the red tag in Image 2."
    """
    count = 1 + int(rng.choice(len(CALLS), p=CALLS))
    usual = rng.random() < 0.85
    if kind == "question":
        asked = unanswerable(rng, scenes)
        question, count = asked.question, asked.calls if usual else count
        words = [{int(n) for n in re.findall(r"Image (\d+)", question)}, set(question.split()) & set(COLOURS), set()]
        leans = [words[int(np.searchsorted(np.cumsum(LEAN), rng.random()))] for _ in range(count)]
    else:  # half of the time tags of one colour, so that the question that comes after can compare them
        count = int(rng.integers(1, 3)) if kind == "command" else count
        leans = [{_pick(rng, COLOURS)} if rng.random() < 0.5 else set()] * count
    targets = asked.targets if kind == "question" and usual else ()
    numbers, tags = (range(1, len(targets) + 1), targets) if targets else _targets(rng, scenes, leans)
    if kind == "command":
        listed = " and ".join(f"the {tag.colour} tag in Image {n}" for n, tag in zip(numbers, tags, strict=True))
        question = f"Look closely at {listed}."
    elif kind == "request":
        question = _pick(rng, ("Use a tool.", "Look at something closely.", "Look again."))
    segments, said, seen, digits = [ask(question)], "", [], []
    for number, tag in zip(numbers, tags, strict=True):
        if kind != "command" and not targets and rng.random() < 0.12:
            high = {"resolution": "high"} if rng.random() < 0.25 else {}
            name, reading, arguments = "visual_reflection", "", {"images": [number], **high}
        else:
            name, arguments = "visual_confirmation", {"image": number, "label": tag.colour, "bbox_2d": box_of(tag)}
            reading = reading_of(number, tag)
            seen.append((number, tag))
        text = QWEN.render_call(name, arguments)
        result = style.tools.execute(Call(name, arguments), registry, style.settings)
        cut = text.index(', "label"') if targets else len(text)  # which tag is chance: nothing to learn
        segments += [Segment(said + text[:cut], True), *([Segment(text[cut:], False)] if targets else [])]
        segments.append(observation(result.parts, registry))
        said, digits = reading, [(number, tag.digit) for number, tag in seen]
        if kind == "question" and usual and asked.settled(digits):
            break
    if kind == "question":
        return [*segments, say(f"{said}{answer_markup(asked.answer(digits))}")]
    segments.append(say(f"{said}Done."))
    if seen:
        question, _, answer = about(rng, seen)
        segments += [Segment(f"\n{QWEN.begin_turn('user')}{ask(question).text}", False), say(answer_markup(answer))]
    return segments


def _targets(rng, scenes: list[Scene], leans: list[set]) -> tuple[list[int], list[Tag]]:
    """Image numbers and tags for as many calls as `leans`: each time one of the images, then one of its tags not taken
    yet, both uniformly among those that the set names (image numbers, colours) where there are any."""
    left = [(number, tag) for number, scene in enumerate(scenes, 1) for tag in scene.tags]
    taken = []
    for lean in leans[: len(left)]:
        able = [(number, tag) for number, tag in left if number in lean or tag.colour in lean] or left
        number = _pick(rng, sorted({number for number, _ in able}))
        taken.append(_pick(rng, [target for target in able if target[0] == number]))
        left.remove(taken[-1])
    return [number for number, _ in taken], [tag for _, tag in taken]


def observation(parts: list[str | int], registry: ImageRegistry) -> Segment:
    """A tool's observation as a rollout renders it."""
    entries = [registry[part] for part in parts if not isinstance(part, str)]
    shown = tuple(ShownImage(e.pixels, e.min_pixels, e.max_pixels) for e in entries)
    return Segment(_with_placeholders(QWEN.render_observation(parts)), False, shown)


# ---- crops: READ, ANSWER ------------------------------------------------------------------------------------------


def crop_near(rng, scene: Scene, tag: Tag) -> Image.Image:
    """A crop of about the size a call makes, with the tag wholly inside, off its centre by chance."""
    left, top, right, bottom = box_near(rng, scene, tag)
    return Image.fromarray(scene.pixels[top:bottom, left:right])


def box_near(rng, scene: Scene, tag: Tag) -> tuple[int, int, int, int]:
    """Where such a crop lies: (left, top, right, bottom) in pixels. Now and then the tag is far off its centre."""
    height, width = scene.pixels.shape[:2]
    side = [round(BOX / 1000 * s) for s in (width, height)]
    spread = 1.0 if rng.random() < 0.15 else 0.35
    middle = [
        c * s + rng.uniform(-spread, spread) * (half / 2 - 13)
        for c, s, half in zip((tag.x, tag.y), (width, height), side, strict=True)
    ]
    sizes = zip(middle, side, (width, height), strict=True)
    left, top = (round(min(max(m - s / 2, 0), full - s)) for m, s, full in sizes)
    return left, top, left + side[0], top + side[1]


def crop_beside(rng, scene: Scene) -> Image.Image:
    """A crop of the size a call makes in which no part of a tag lies."""
    height, width = scene.pixels.shape[:2]
    w, h = round(BOX / 1000 * width), round(BOX / 1000 * height)
    while True:
        left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
        middle = ((left + w / 2) / width, (top + h / 2) / height)
        if all(max(abs(tag.x - middle[0]), abs(tag.y - middle[1])) > BOX / 2000 + 0.06 for tag in scene.tags):
            return Image.fromarray(scene.pixels[top : top + h, left : left + w])


def read(rng, shown: list[Tag | None]) -> tuple[str, str]:
    number = int(rng.integers(len(shown)))
    return f"What does Image {number + 1} show?", reading_of(number + 1, shown[number])


def reading_of(number: int, tag: Tag | None) -> str:
    """What is said of a tag seen closely in the given image `number`, itself or a crop of it; None: there is none."""
    return f"Image {number} {tag.colour} {tag.digit}.\n" if tag else f"Image {number} no tag.\n"


def answer_given(rng, shown: list[Tag | None]) -> tuple[str, str]:
    """A question in the world's words about crops that are given: what they show, then the answer."""
    question, evidence, answer = about(rng, [(n, tag) for n, tag in enumerate(shown, 1) if tag], len(shown))
    return question, f"{evidence}{answer_markup(answer)}"


def about(rng, seen: list[tuple[int, Tag]], images: int = 0) -> tuple[str, str, str]:
    """A question in the world's words about tags seen closely, (image, tag); the readings it needs; its answer. Where tags
    of one colour were seen in all `images`, one is found without reading the last."""
    ordered, seen = seen, [seen[i] for i in rng.permutation(len(seen))]
    (a, first), (b, second) = seen[0], seen[-1]
    kind = _pick(rng, ("read", "sum", "sum", "compare", "find", "find", "find", "find"))  # where tags allow it; else the sum
    if len(seen) == 1 or kind == "read":
        return read_question(rng, a, first.colour), reading_of(a, first), str(first.digit)
    if kind == "compare" and first.colour == second.colour and first.digit != second.digit:
        evidence = reading_of(a, first) + reading_of(b, second)
        return compare_question(first.colour, a, b), evidence, f"Image {a if first.digit > second.digit else b}"
    alike = [(n, tag) for n, tag in ordered if tag.colour == first.colour]
    large = [at for at, (_, tag) in enumerate(alike) if tag.digit > 4]
    if kind == "find" and len(large) == 1:
        evidence = [reading_of(n, t) for n, t in alike[: large[0] + 1]][: images - 1 if len(alike) == images else None]
        return find_question(first.colour), "".join(evidence), f"Image {alike[large[0]][0]}"
    evidence = reading_of(a, first) + reading_of(b, second)
    return sum_question(rng, (a, first.colour), (b, second.colour)), evidence, str(first.digit + second.digit)


# ---- groups -------------------------------------------------------------------------------------------------------


def make_group(
    rng: np.random.Generator, size: int, form: str | None = None, split: str = "train", style: Style = STYLE
) -> PretrainGroup:
    """Images and `size` continuations of one form: "crops" (READ, ANSWER), "thumbnails" (LOCATE, LOOK, GUESS) or
    "calls" (CALL, GUESS), "crop" (READ) and "thumbnail" (LOCATE) of a single image; by default drawn by `FORMS`.
    All is a function of `rng`'s state. Pre-training uses the train split only; skills are measured on the other.
    """
    form = form or str(rng.choice(list(FORMS), p=list(FORMS.values())))
    count = 1 if form in ("crop", "thumbnail") else int(rng.choice((2, 3, 4), p=(0.5, 0.35, 0.15)))
    if form in ("crop", "crops"):
        return _crops(rng, size, count, split, style)
    palette = rng.permutation(COLOURS)[: int(rng.integers(4, 6))].tolist()  # no image has a colour outside it
    shared = palette[:1] if rng.random() < 0.5 else []
    scenes = []
    for _ in range(count):
        others = [c for c in rng.permutation(palette).tolist() if c not in shared]
        chosen = [*shared, *others][: int(rng.integers(2, 4))]
        scenes.append(make_scene(rng, split, colours=rng.permutation(chosen).tolist(), varied=split == "train"))
    images, registry = give([scene.pixels for scene in scenes], style)
    targets = [(number, tag) for number, scene in enumerate(scenes, 1) for tag in scene.tags]
    targets = [targets[i] for i in rng.permutation(len(targets))]
    mix = {"thumbnail": {"locate": 1.0}, "thumbnails": THUMBNAIL_MIX, "calls": CALL_MIX}[form]
    responses = []
    for i, skill in enumerate(rng.choice(list(mix), size, p=list(mix.values()))):
        if skill in ("question", "request", "command"):
            responses.append(call(rng, scenes, registry.fork(), skill, style))
            continue
        asked = {"look": look, "guess": guess}.get(skill)
        question, text = asked(rng, scenes) if asked else locate(rng, scenes, *targets[i % len(targets)])
        responses.append([ask(question), say(text)])
    return PretrainGroup(images, prompt_text(count, style), responses, scenes)


def give(pixels: Sequence[np.ndarray], style: Style) -> tuple[list[ShownImage], ImageRegistry]:
    """Return images as a question has them, and the registry of an environment that was reset to them."""
    images, registry = [ShownImage(Image.fromarray(one), *style.given) for one in pixels], ImageRegistry()
    for image in images:
        shown = smart_resize(image.pixels.height, image.pixels.width, style.settings.patch_factor, *style.given)
        registry.add(image.pixels, shown=shown, min_pixels=style.given[0], max_pixels=style.given[1])
    return images, registry


def _crops(rng, size: int, count: int, split: str, style: Style) -> PretrainGroup:
    """Crops as the given images, in 60 % of the groups around tags of one colour."""
    same, colour = rng.random() < 0.6, _pick(rng, COLOURS)
    images, shown, scenes = [], [], []
    for number in range(count):
        others = [c for c in rng.permutation(COLOURS).tolist() if c != colour]
        colours = [colour, *others[: int(rng.integers(1, 3))]]
        scene = make_scene(rng, split, colours=colours, varied=split == "train")
        tag = scene.tags[0] if same else _pick(rng, scene.tags)
        tag = None if (number or count == 1) and rng.random() < NO_TAG else tag
        pixels = crop_near(rng, scene, tag) if tag else crop_beside(rng, scene)
        images.append(ShownImage(pixels, style.settings.confirm_min_pixels, style.settings.confirm_max_pixels))
        shown.append(tag)
        scenes.append(scene)
    responses = []
    for i in range(size):
        question, text = (answer_given if i % 4 and count > 1 else read)(rng, shown)
        responses.append([ask(question), say(text)])
    return PretrainGroup(images, prompt_text(count, style), responses, scenes)


def corpus_texts(count: int, seed: int) -> list[str]:
    """`count` conversations as text, `<image>` for images: what the tokenizer is trained on."""
    rng = np.random.default_rng(seed)
    texts: list[str] = []
    while len(texts) < count:
        group = make_group(rng, 8)
        texts.append(group.prompt)
        texts += ["".join(segment.text for segment in response) for response in group.responses]
    return texts[:count]
