"""The part of the corpus on prints, programs and pages: what is wrong, what is shown, programs on command, large views.

Commands name the steps of a program ("Show Image 2 turned by 90.") or ask for a repair without saying how. A repair begins with
what is wrong ("Image 2 dark."), which its program follows. A question names a tag or an image that does not exist, and a print
that needs no repair. What follows is arbitrary, or repairs another print.
"""

from collections.abc import Sequence

import numpy as np
from PIL import Image

from imagent_jax.chat import QWEN, answer_markup
from imagent_jax.tiny import corpus, total_world
from imagent_jax.tiny.code_world import draw_problems
from imagent_jax.tiny.corpus import (
    PretrainGroup,
    Segment,
    ShownImage,
    Style,
    about,
    ask,
    box_of,
    give,
    prompt_text,
    reading_of,
    say,
)
from imagent_jax.tiny.corpus_style import SETTINGS, make_call
from imagent_jax.tiny.encyclopaedia import mark_words
from imagent_jax.tiny.prints import OPERATIONS, TURNS, Steps, applied, in_words, make_print, problem_words, program, repair, spoil
from imagent_jax.tiny.world import COLOURS, Scene, Tag
from imagent_jax.tools import ImageRegistry

PROGRAM_MIX = {"question": 0.42, "guess": 0.05, "command": 0.35, "repair": 0.18}
PAGE_MIX = {"question": 0.45, "guess": 0.05, "command": 0.5}
"""What the responses of a group answer; see `corpus.CALL_MIX`. "repair": a command to repair a print, without saying how."""
TO_IMAGE, REPAIRING = 0.55, 0.5
"""Chance that a program after a question is on an image that the question names; that one on another print repairs it."""
TWO = 0.7
"""Chance that a command names two images, where there are two."""
SPOILT, EXISTING, AS_IT_IS = 0.65, 0.85, 0.6
"""Chance that a print is drawn with problems; that a question names a sound print, where there is one; that such a print is said
to be sound and shown as it is."""


class Shown:
    """A print as it is shown: spoilt or not, and whether its tag can be read."""

    def __init__(self, rng: np.random.Generator, split: str, problems: Sequence[str], repaired: bool = False, marks: int = 1):
        colours = rng.permutation(COLOURS)[:marks].tolist()
        self.scene = make_print(rng, split, colours, varied=split == "train")
        self.problems = () if repaired else tuple(problems)
        self.pixels = spoil(rng, self.scene.pixels, problems, split)
        if repaired:
            self.pixels = run(self.pixels, repair(problems))

    @property
    def tag(self) -> Tag | None:
        """Its one tag, where it can be read."""
        return self.scene.tags[0] if not self.problems and len(self.scene.tags) == 1 else None

    def line(self, number: int) -> str:
        """What it shows as Image `number`: its tag, or what is wrong."""
        return reading_of(number, self.tag) if self.tag else fault_of(number, self.problems)

    @property
    def mark(self) -> str:
        return mark_words(tuple((tag.colour, tag.digit) for tag in self.scene.tags))


def fault_of(number: int, problems: Sequence[str]) -> str:
    """Return what is said of an image before its repair: "Image 2 rotation90 dark." or "Image 2 none."."""
    return f"Image {number} {problem_words(problems)}.\n"


def run(pixels: np.ndarray, steps: Steps) -> np.ndarray:
    """Return what a program of these steps shows of an image, uint8 [H, W, 3]."""
    return np.asarray(applied(Image.fromarray(pixels), steps))


def arbitrary_steps(rng: np.random.Generator) -> Steps:
    """Draw the steps of a program: none, a turn, another step, or both."""
    turn = ("turn", int(rng.choice(OPERATIONS["turn"].arguments)))
    name = str(rng.choice([name for name in OPERATIONS if name != "turn"]))
    arguments = OPERATIONS[name].arguments
    other = (name, arguments[rng.integers(len(arguments))])
    return [[], [turn], [other], [turn, other]][rng.choice(4, p=(0.1, 0.25, 0.4, 0.25))]


# ---- seeing -----------------------------------------------------------------------------------------------------------


def one_print(rng: np.random.Generator, split: str, style: Style) -> PretrainGroup:
    """A single print, and one question: what is wrong with it, what it shows, or its mark."""
    kind = ("wrong", "read", "mark")[rng.choice(3, p=(0.45, 0.37, 0.18))]
    shown = Shown(rng, split, () if kind == "mark" else draw_problems(rng), kind == "read", 2 if kind == "mark" else 1)
    return _group([shown], [_about_print(kind, 1, shown)], style)


def one_page(rng: np.random.Generator, split: str, style: Style) -> PretrainGroup:
    """A single page in its large view, and what it shows."""
    page = total_world.make_page(rng, split, varied=split == "train")
    images = [ShownImage(Image.fromarray(page.pixels), style.given[0], SETTINGS.high_pixels)]
    return PretrainGroup(images, prompt_text(1, style), [[ask("What does Image 1 show?"), say(page_reading(1, page))]], [page])


def prints(rng: np.random.Generator, size: int, split: str, style: Style) -> PretrainGroup:
    """One to three prints, some of them spoilt, repaired or with marks; questions about what is wrong and what is shown."""
    given = [
        Shown(rng, split, draw_problems(rng), bool(rng.random() < 0.5), 2 if rng.random() < 0.2 else 1)
        for _ in range(int(rng.integers(1, 4)))
    ]
    seen = [(n, one.tag) for n, one in enumerate(given, 1) if one.tag]
    responses = []
    for _ in range(size):
        if seen and rng.random() < 0.4:
            question, evidence, answer = about(rng, seen)
            responses.append((question, evidence + answer_markup(answer)))
            continue
        n = int(rng.integers(len(given)))
        shows = "read" if given[n].tag or given[n].problems else "mark"
        responses.append(_about_print("wrong" if rng.random() < 0.4 else shows, n + 1, given[n]))
    return _group(given, responses, style)


def _about_print(kind: str, number: int, shown: Shown) -> tuple[str, str]:
    if kind == "wrong":
        return f"What is wrong with Image {number}?", problem_words(shown.problems)
    if kind == "mark":
        return f"What mark is in Image {number}?", shown.mark
    return f"What does Image {number} show?", shown.line(number)


def _group(given: list[Shown], responses: list[tuple[str, str]], style: Style) -> PretrainGroup:
    images = [ShownImage(Image.fromarray(one.pixels), *style.given) for one in given]
    said = [[ask(question), say(text)] for question, text in responses]
    return PretrainGroup(images, prompt_text(len(given), style), said, [one.scene for one in given])


def page_reading(number: int, page: Scene) -> str:
    """What is said of a page seen in its large view: its tags from left to right."""
    return f"Image {number} {' '.join(f'{t.colour} {t.digit}' for t in sorted(page.tags, key=lambda t: t.x))}.\n"


# ---- programs ---------------------------------------------------------------------------------------------------------


def programs(rng: np.random.Generator, size: int, split: str, style: Style) -> PretrainGroup:
    """One to three prints; commands and unanswerable questions, followed by programs and what they showed."""
    given = [Shown(rng, split, draw_problems(rng) if rng.random() < SPOILT else ()) for _ in range(int(rng.integers(1, 4)))]
    images, registry = give([one.pixels for one in given], style)
    responses = []
    for kind in rng.choice(list(PROGRAM_MIX), size, p=list(PROGRAM_MIX.values())):
        if kind in ("question", "guess"):
            responses.append(_after_question(rng, given, registry.fork(), style, 2 if kind == "question" else 0))
        else:
            responses.append(_after_command(rng, given, registry.fork(), style, kind))
    return PretrainGroup(images, prompt_text(len(given), style), responses, [one.scene for one in given])


def _after_command(rng, given: list[Shown], registry, style: Style, kind: str) -> list[Segment]:
    numbers = [int(n) + 1 for n in rng.permutation(len(given))[: 2 if rng.random() < TWO else 1]]
    if kind == "repair":
        steps, command = [None] * len(numbers), f"Repair {' and '.join(f'Image {n}' for n in numbers)}."
    else:
        steps = [arbitrary_steps(rng) for _ in numbers]
        command = f"Show {' and '.join(f'Image {n} {in_words(s)}' for n, s in zip(numbers, steps, strict=True))}."
    segments, said, seen = [ask(command)], "", []
    for number, taken in zip(numbers, steps, strict=True):
        turn, said, tag = _program(given, registry, style, said, number, taken)
        segments += turn
        seen += [(number, tag)] if tag else []
    segments.append(say(f"{said}Done."))
    if seen:
        question, _, answer = about(rng, seen)
        segments += follow_up(question, answer)
    return segments


def _after_question(rng, given: list[Shown], registry, style: Style, calls: int) -> list[Segment]:
    """A question that nothing can answer, programs (at most `calls`) that lean to its images or repair others, and an answer that
    follows from what they showed."""
    clean = [n for n, one in enumerate(given, 1) if not one.problems]
    missing = absent_images(len(given), calls)
    named = [
        clean[rng.integers(len(clean))] if clean and rng.random() < EXISTING else missing[rng.integers(len(missing))]
        for _ in "ab"
    ]
    absent = [c for c in COLOURS if not any(one.scene.tag(c) for one in given)]
    a, b = (str(c) for c in rng.choice(absent, 2))
    kind = "read" if named[0] == named[1] else ("read", "sum", "compare")[rng.choice(3, p=(0.5, 0.3, 0.2))]
    question = {
        "read": lambda: corpus.read_question(rng, named[0], a),
        "sum": lambda: corpus.sum_question(rng, (named[0], a), (named[1], b)),
        "compare": lambda: corpus.compare_question(a, *named),
    }[kind]()
    count = min(calls, (1 if kind == "read" else 2) if rng.random() < 0.85 else int(rng.integers(1, 3)))
    segments, said, digits, seen = [ask(question)], "", [], set[int]()
    for _ in range(count):
        to = [n for n in named if n <= len(given) and n not in seen] if rng.random() < TO_IMAGE else []
        number = int(rng.choice(to or [n for n in range(1, len(given) + 1) if n not in named] or range(1, len(given) + 1)))
        seen = seen | {number}
        # A named print is sound: as it is, its tag can be read, but it is not the one that is asked for.
        repairing = rng.random() < (AS_IT_IS if number in named else REPAIRING)
        turn, said, tag = _program(given, registry, style, said, number, None if repairing else arbitrary_steps(rng))
        segments += turn
        digits += [(number, tag.digit)] if tag else []
    return [*segments, say(said + answer_markup(_follows(rng, kind, named, digits)))]


def absent_images(given: int, calls: int) -> list[int]:
    """Return numbers of images that do not exist, not even after so many calls that show one each."""
    return list(range(given + calls + 1, given + calls + 3))


def _follows(rng, kind: str, named: list[int], digits: list[tuple[int, int]]) -> str:
    """Return the answer that follows from the digits read last, or one by chance."""
    if kind == "read":
        return str(digits[-1][1] if digits else rng.integers(10))
    if kind == "sum":
        return str(digits[-1][1] + digits[-2][1] if len(digits) > 1 else rng.integers(19))
    if len(digits) > 1 and digits[-1][1] != digits[-2][1]:
        return f"Image {max(digits[-2:], key=lambda one: one[1])[0]}"
    return f"Image {rng.choice(named)}"


def _program(
    given: list[Shown], registry: ImageRegistry, style: Style, said: str, number: int, steps: Steps | None
) -> tuple[list[Segment], str, Tag | None]:
    """Return the turn of a program, what is said of what it showed, and the tag that can be read there. Without `steps` it says
    what is wrong and repairs it."""
    problems = given[number - 1].problems
    if steps is None:
        said, steps = said + fault_of(number, problems), repair(problems)
    turn, _ = make_call(style, registry, said, "python", {"code": program(number, steps)})
    tag = given[number - 1].scene.tags[0] if readable(problems, steps) else None
    return turn, reading_of(number, tag), tag


def readable(problems: Sequence[str], steps: Steps) -> bool:
    """Return whether a print with these problems can be read after these steps: they repair it and do nothing more that hurts."""
    turned = sum(int(name.removeprefix("rotation")) for name in problems if name in TURNS)
    turned += sum(int(argument) for name, argument in steps if name == "turn")
    other = [step for step in steps if step[0] != "turn"]
    needed = [step for step in repair(problems) if step[0] != "turn"]
    harmless = [] if needed else [("sharpen", ""), ("denoise", "")]
    return turned % 360 == 0 and (other == needed or (bool(other) and other[0] in harmless))


def follow_up(question: str, answer: str) -> list[Segment]:
    """A question of a later user turn, and its answer."""
    return [Segment(f"\n{QWEN.begin_turn('user')}{ask(question).text}", False), say(answer_markup(answer))]


# ---- pages ------------------------------------------------------------------------------------------------------------


def pages(rng: np.random.Generator, size: int, split: str, style: Style) -> PretrainGroup:
    """One to three pages; commands to see one large, and questions about an image that is not there."""
    scenes = [total_world.make_page(rng, split, varied=split == "train") for _ in range(int(rng.integers(1, 4)))]
    images, registry = give([scene.pixels for scene in scenes], style)
    responses = []
    for kind in rng.choice(list(PAGE_MIX), size, p=list(PAGE_MIX.values())):
        fork, number = registry.fork(), int(rng.integers(1, len(scenes) + 1))
        if kind == "command":
            turn, said, total = _look(rng, scenes, fork, style, number, "high")
            start = [ask(f"Look at Image {number} again at high."), *turn, say(f"{said}Done.")]
            responses.append([*start, *follow_up(total_world.ask(number), str(total))])
            continue
        segments, said, total = [ask(total_world.ask(int(rng.choice(absent_images(len(scenes), 1)))))], "", None
        if kind == "question":
            turn, said, total = _look(
                rng, scenes, fork, style, number, str(rng.choice(["high", "low", "crop"], p=(0.5, 0.2, 0.3)))
            )
            segments += turn
        responses.append([*segments, say(said + answer_markup(str(total if total is not None else rng.integers(4, 24))))])
    return PretrainGroup(images, prompt_text(len(scenes), style), responses, scenes)


def _look(rng, scenes, registry, style: Style, number: int, how: str) -> tuple[list[Segment], str, int | None]:
    """Return the turn of a look at a page, what is said of it, and the sum of what can be read (None: nothing)."""
    page = scenes[number - 1]
    if how == "crop":
        tag = page.tags[rng.integers(len(page.tags))]
        arguments = {"image": number, "label": tag.colour, "bbox_2d": box_of(tag)}
        return make_call(style, registry, "", "visual_confirmation", arguments)[0], reading_of(number, tag), tag.digit
    arguments = {"images": [number]} | ({"resolution": "high"} if how == "high" else {})
    turn, _ = make_call(style, registry, "", "visual_reflection", arguments)
    if how == "low":
        return turn, reading_of(number, None), None
    return turn, page_reading(number, page), sum(tag.digit for tag in page.tags)
