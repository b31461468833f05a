"""Controls of an evaluation: the same tasks once more, with something taken away from the agent or exchanged."""

import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import numpy as np
from PIL import Image

from imagent_jax.chat import Call, MalformedCall
from imagent_jax.rollout.environment import ToolEnvironment
from imagent_jax.types import CallResult, CallStatus, ImageEntry, Task, Trajectory

CONTROLS = {
    "shuffle": "what another task's call returned in place of what a tool returns", "blank": "all images grey",
    "no_tools": "no tools", "one_observation": "what one call shows exchanged, after the same tokens",
    "permute": "the given images in another order", "without_image": "each given image grey in turn",
}  # fmt: skip
MOST_CALLS, MOST_IMAGES = 3, 6
"""Calls that `one_observation` exchanges, and images that `without_image` takes away, at most."""
_ORDER = re.compile(
    r"\b(first|second|third|fourth|fifth|last|next|previous|former|latter|earlier|later|before|after|left|right|order|sequence|"
    r"\d+(?:st|nd|rd|th))\b|第",
    re.I,
)
_WHICH = re.compile(r"\bwhich\b|\bnumber of the\b|\bits number\b|哪", re.I)
_PICTURE = r"\b(?:images?|pictures?|photo(?:graph)?s?|figures?)\b|图"
_IMAGE = re.compile(rf"((?:{_PICTURE})片?\s*)(\d+)((?:\s*(?:,|and|or|和|或)\s*\d+)*)", re.IGNORECASE)


class Variant(NamedTuple):
    """An evaluation that a control needs.

    Attributes:
        control: one of `CONTROLS`.
        label: what is taken away or exchanged, where a control has several variants.
        places: of the tasks, among those of the normal evaluation.
        environment: what `Collector(environment=...)` takes; None: the normal one.
        call: the call whose observation is exchanged, from 1; 0: none.
    """

    control: str
    label: str
    places: Sequence[int]
    tasks: Sequence[Task]
    environment: Callable[..., ToolEnvironment] | None = None
    call: int = 0

    @property
    def name(self) -> str:
        """The control and what is taken away or exchanged."""
        return f"{self.control}, {self.label}" if self.label else self.control


# ---- environments -----------------------------------------------------------------------------------------------------


def _grey(entry: ImageEntry) -> Image.Image:
    return Image.new("RGB", entry.size[::-1], (128, 128, 128))


class BlankEnvironment(ToolEnvironment):
    """Environment in which all images are grey."""

    def view(self, entry: ImageEntry, observed: bool) -> Image.Image:
        return _grey(entry)


class WithoutImageEnvironment(ToolEnvironment):
    """Environment in which one given image is grey, with all that is made of it.

    Args:
        number: of that image.
    """

    def __init__(self, *args, number: int):
        super().__init__(*args)
        self.number = number

    def view(self, entry: ImageEntry, observed: bool) -> Image.Image:
        root = entry
        while root.parent is not None:
            root = self.images[root.parent - 1]
        return _grey(entry) if root.number == self.number else entry.pixels


class ShuffledEnvironment(ToolEnvironment):
    """Environment in which what a call returns is replaced by what a call returned in another task: every text, by one of the
    same tool, and every image. Lines that name images stay.

    The choice depends on `seed` and on what is replaced, not on the order of the rollouts.

    Args:
        pool: images to draw from, each with the fingerprint of its task.
        texts: texts to draw from, each with the fingerprint of its task and the name of its tool.
        only: number of the call that is replaced, from 1; None: all.
    """

    def __init__(
        self,
        *args,
        pool: Sequence[tuple[int, Image.Image]],
        seed: int,
        texts: Sequence[tuple[int, str, str]] = (),
        only: int | None = None,
    ):
        super().__init__(*args)
        self.pool, self.texts, self.seed, self.only, self.calls = tuple(pool), tuple(texts), seed, only, 0  # forks share tuples
        self.own = 0

    def reset(self, task: Task) -> None:
        super().reset(task)
        self.own = fingerprint(self.images, task)

    def step(self, call: Call | MalformedCall) -> CallResult:
        result = super().step(call)
        if result.status == CallStatus.EXECUTED:
            self.calls += 1
            if self._replaces():
                return self._with_other_texts(result)
        return result

    def _replaces(self) -> bool:
        return self.only in (None, self.calls)

    def _with_other_texts(self, result: CallResult) -> CallResult:
        parts = list(result.parts)
        others = [text for owner, name, text in self.texts if owner != self.own and name == result.name]
        for i in told(result) if others else ():
            rng = np.random.default_rng((self.seed, zlib.crc32(str(parts[i]).encode("utf-8", "replace"))))
            parts[i] = others[rng.integers(len(others))]
        return replace(result, parts=parts)

    def view(self, entry: ImageEntry, observed: bool) -> Image.Image:
        observed = observed and self._replaces()
        others = [image for owner, image in self.pool if owner != self.own] if observed else []
        if not others:
            return entry.pixels
        rng = np.random.default_rng((self.seed, zlib.crc32(entry.pixels.tobytes())))
        return others[rng.integers(len(others))].resize(entry.size[::-1], Image.Resampling.BICUBIC)


def controlled(control: str, done: Sequence[Trajectory], seed: int, only: int | None = None) -> Callable[..., ToolEnvironment]:
    """Return the environment of the controls `blank` and `shuffle`. Image sizes and token counts do not change.

    Args:
        done: trajectories of the normal evaluation; `shuffle` draws from what their calls returned, of those whose images are in
            this process.
        seed: seed of that draw.
        only: see `ShuffledEnvironment`.
    Raises:
        ValueError: another control.
    """
    if control not in ("shuffle", "blank"):
        raise ValueError(f"There is no control {control!r}; choose shuffle or blank.")
    if control == "blank":
        return BlankEnvironment
    calls = [
        (fingerprint(t.images, t.task), t.images, turn.call)
        for t in done
        if t.images is not None
        for turn in t.turns
        if turn.call and turn.call.status == CallStatus.EXECUTED
    ]
    pool = [(owner, images[number - 1].pixels) for owner, images, call in calls for number in call.images]
    texts = [(owner, call.name, call.parts[i]) for owner, _, call in calls for i in told(call)]
    return partial(ShuffledEnvironment, pool=pool, texts=texts, seed=seed, only=only)


def told(result: CallResult) -> list[int]:
    """Return the indices of the parts of a result that are texts of their own: not the line that names the next image."""
    after = [*result.parts[1:], ""]
    return [i for i, part in enumerate(result.parts) if isinstance(part, str) and isinstance(after[i], str)]


def fingerprint(images: Sequence[ImageEntry], task: Task) -> int:
    """Return a checksum of the first image's pixels, or of the question without images, which identifies a task."""
    return zlib.crc32(images[0].pixels.tobytes() if images else task.question.encode("utf-8", "replace"))


# ---- variants ---------------------------------------------------------------------------------------------------------


def variants(control: str, done: Sequence[Trajectory], seed: int) -> list[Variant]:
    """Return the evaluations that a control needs.

    Args:
        done: trajectories of the normal evaluation.
        seed: of all that is drawn.
    """
    everywhere, tasks = range(len(done)), [t.task for t in done]
    if control == "no_tools":
        return [Variant(control, "", everywhere, [replace(task, tools=()) for task in tasks])]
    if control == "permute":
        found = [(i, permuted(task, seed)) for i, task in enumerate(tasks)]
        kept = [(i, task) for i, task in found if task is not None]
        return [Variant(control, "", [i for i, _ in kept], [task for _, task in kept])]
    if control == "without_image":
        made = []
        for number in range(1, min(MOST_IMAGES, max((len(task.images) for task in tasks), default=0)) + 1):
            places = [i for i, task in enumerate(tasks) if len(task.images) >= max(number, 2)]
            environment = partial(WithoutImageEnvironment, number=number)
            made.append(Variant(control, f"Image {number}", places, [tasks[i] for i in places], environment))
        return made
    if control == "one_observation":
        made = []
        for call in range(1, min(MOST_CALLS, max((t.executed_calls for t in done), default=0)) + 1):
            environment = controlled("shuffle", done, seed, only=call)
            made.append(Variant(control, f"call {call}", everywhere, tasks, environment, call))
        return made
    return [Variant(control, "", everywhere, tasks, controlled(control, done, seed))]


def permuted(task: Task, seed: int) -> Task | None:
    """Return a task with its images in another order, and their numbers in the question, options and answers changed alike.

    None: it has one image, its images stand within its text, its text speaks of their order in other words than numbers, or it
    asks which one and an answer or option is a bare number.
    """
    count, choosing = len(task.images), task.answer_type == "choice" and not task.options
    if count < 2 or task.parts or _ORDER.search(task.text):
        return None
    said = () if choosing else (*task.answers, *task.options)
    if _WHICH.search(task.question) and any(text.strip() in map(str, range(1, count + 1)) for text in said):
        return None
    rng = np.random.default_rng((seed, zlib.crc32(task.uid.encode("utf-8", "replace"))))
    while (order := rng.permutation(count)).tolist() == [*range(count)]:
        pass
    new = {str(old + 1): str(place + 1) for place, old in enumerate(order.tolist())}

    def renumbered(text: str) -> str:
        return _IMAGE.sub(lambda m: m[1] + re.sub(r"\d+", lambda n: new.get(n[0], n[0]), m[2] + m[3]), text)

    answers = [renumbered(answer) for answer in task.answers]
    if choosing:  # "2" alone names an image too
        answers = [new.get(answer.strip(), answer) for answer in answers]
    options = tuple(map(renumbered, task.options))
    return replace(
        task,
        question=renumbered(task.question),
        images=tuple(task.images[i] for i in order),
        options=options,
        answer=answers[0],
        other_answers=tuple(answers[1:]),
    )
