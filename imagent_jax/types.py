"""Plain data that all rooms share: tasks, numbered images, calls, turns and trajectories. No jax."""

import copy
import string
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from PIL import Image

from imagent_jax.scoring import SCORERS, is_right, score

ANSWER_TYPES = tuple(SCORERS)


class Markup(str):
    """Text of a chat template or of the policy, in which markers such as "<|im_end|>" are marker tokens.

    In any other `str`, of a data set, a tool or the web, a marker is plain text.
    """


class ToolError(Exception):
    """A mistake that the policy can repair. Its message is shown: one short line, what was wrong, what was expected."""


class ImageNumber(int):
    """The number of an image of a trajectory. A tool that returns one shows that image."""


@dataclass(frozen=True)
class Task:
    """One question, with any number of images, and its reference answer.

    Attributes:
        uid: unique name of the task within its data set; logs and errors name it.
        question: the question as plain text, without image markers. Images are called "Image 1", "Image 2", ...
        images: encoded files (JPEG, PNG, ...) in the order shown; `images[0]` is Image 1. May be empty.
        answer: the reference answer as text; with `options`, a letter.
        answer_type: how an answer is compared with the reference, one of `ANSWER_TYPES`.
        kind: the family of questions the task belongs to; metrics are reported per kind.
        meta: further facts about the task, JSON-serialisable. Never shown to the policy. Every `Task` has its own copy, so that a
            reward or an environment that changes it changes no other rollout.
        parts: the question as shown, in order: texts, and numbers of images where they stand. (): all images, then `question`.
        other_answers: further references. The best score counts.
        options: options of a multiple-choice question, shown after it as lines "A. ...".
        source: name of the source in a mixture; metrics are reported per source.
        tools: names of the tools it may call, of those of the run. None: all.
        reward: weights of rewards by name, in place of the run's.
        environment: 'package.module:Class' of its environment, which is made as `ToolEnvironment` is. "": the run's.

    Raises:
        ValueError: `parts` do not show every image once, in order, or `options` and answers do not go together.
    """

    uid: str
    question: str
    images: tuple[bytes, ...]
    answer: str
    answer_type: str = "exact"
    kind: str = ""
    meta: dict = field(default_factory=dict)
    parts: tuple[str | int, ...] = ()
    other_answers: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    source: str = ""
    tools: tuple[str, ...] | None = None
    reward: dict[str, float] = field(default_factory=dict)
    environment: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "meta", copy.deepcopy(self.meta))
        object.__setattr__(self, "reward", dict(self.reward))
        numbers, count = [part for part in self.parts if isinstance(part, int)], len(self.images)
        if self.parts and numbers != [*range(1, count + 1)]:
            raise ValueError(f"Task {self.uid}: parts show images {numbers}; show each of its {count} images once, in order.")
        if self.options and (self.answer_type != "choice" or len(self.options) > 26 or {*self.answers} - {*self.letters}):
            raise ValueError(
                f"Task {self.uid}: with {len(self.options)} options, the answer type is {self.answer_type!r} and the answer "
                f"{', '.join(self.answers)!r}; use answer type 'choice', at most 26 options, and the letter of one as the answer."
            )

    @property
    def answers(self) -> tuple[str, ...]:
        """All references."""
        return self.answer, *self.other_answers

    @property
    def letters(self) -> str:
        """The letters of the options."""
        return string.ascii_uppercase[: len(self.options)]

    @property
    def option_lines(self) -> tuple[str, ...]:
        """The options as shown."""
        return tuple(f"{letter}. {option}" for letter, option in zip(self.letters, self.options, strict=True))

    @property
    def shown(self) -> tuple[str | int, ...]:
        """What the policy is shown, in order: texts, each on lines of its own, and the numbers of images."""
        return *(self.parts or (*range(1, len(self.images) + 1), self.question)), *self.option_lines

    @property
    def text(self) -> str:
        """The question and its options as one text, for logs."""
        return "\n".join([self.question, *self.option_lines])


class Pixels(Protocol):
    """Pixels that are decoded when they are asked for (`images.originals.Original`)."""

    size: tuple[int, int]

    def decoded(self) -> Image.Image:
        """Return the pixels in RGB."""


@dataclass(frozen=True, eq=False)
class ImageEntry:
    """One numbered image of a trajectory.

    Attributes:
        number: 1-based, as in "Image 3".
        source: RGB pixels at their own resolution, never rescaled, or what decodes them. Crops and views of an image share its
            source, and all rollouts of a group do: only read it.
        shown: (height, width) in pixels at which the policy sees the image.
        parent: number of the image it was made from; None for a given image.
        box: (left, top, right, bottom) in pixels of the parent where it was cut out; None unless a crop.
        origin: what it is, in words, such as "crop"; "" for a given image.
        min_pixels, max_pixels: the budget that made `shown`; preparing `image` with it gives that size again.
        region: (left, top, right, bottom) in pixels of `source` that the image is; None: all of it.
    """

    number: ImageNumber
    source: Image.Image | Pixels
    shown: tuple[int, int]
    parent: int | None = None
    box: tuple[int, int, int, int] | None = None
    origin: str = ""
    min_pixels: int | None = None
    max_pixels: int | None = None
    region: tuple[int, int, int, int] | None = None

    @property
    def pixels(self) -> Image.Image:
        """RGB pixels at their own resolution. Whoever draws on them draws on a copy, which Pillow makes then."""
        source = self.source if isinstance(self.source, Image.Image) else self.source.decoded()
        if self.region is not None:
            return source.crop(self.region)
        source.load()
        shared = source._new(source.im)
        shared.readonly = 1
        return shared

    @property
    def image(self) -> Image.Image:
        """A copy of `pixels`."""
        return self.pixels.copy()

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the original pixels."""
        left, top, right, bottom = self.region or (0, 0, *self.source.size)
        return bottom - top, right - left

    def part(self, box: tuple[int, int, int, int] | None) -> "ImageEntry":
        """Return the entry with the region of a box in its pixels (None: all of them)."""
        left, top, *_ = self.region or (0, 0)
        return self if box is None else replace(self, region=(box[0] + left, box[1] + top, box[2] + left, box[3] + top))

    def describe(self) -> str:
        """Return the line shown above the image: "Image 1", "Image 4: crop of Image 2"."""
        if self.parent is not None:
            return f"Image {self.number}: {self.origin or 'made'} of Image {self.parent}"
        return f"Image {self.number}: {self.origin}" if self.origin else f"Image {self.number}"


class CallStatus(IntEnum):
    """How a tool call ended."""

    EXECUTED = 0
    INVALID = 1
    FAULT = 2


@dataclass
class CallResult:
    """The outcome of a tool call.

    Attributes:
        status: EXECUTED, INVALID (the policy's mistake) or FAULT (an error of the environment).
        name, arguments: of the call, as far as they could be read.
        parts: the observation in order: a text line, or the number of an image to show there. The line that names an image
            precedes it.
        error: for logs; the policy's message when INVALID, the traceback or the timeout when FAULT.
        seconds: how long it took, wall time; no part of what happened, and not compared.
        ends: the trajectory ends with this call, without an answer. For environments that execute nothing.
    """

    status: CallStatus
    name: str | None = None
    arguments: dict[str, Any] | None = None
    parts: list[str | int] = field(default_factory=list)
    error: str | None = None
    seconds: float = field(default=0.0, compare=False)
    ends: bool = False

    @property
    def images(self) -> list[int]:
        """The numbers of the images shown, in order."""
        return [part for part in self.parts if not isinstance(part, str)]


class TokenKind(IntEnum):
    """What a token of a response is. The first four are actions: the policy sampled them."""

    TEXT = 0
    TOOL_CALL = 1
    INVALID_CALL = 2
    ANSWER = 3
    OBSERVATION = 4
    PAD = 5


class EndReason(IntEnum):
    """Why a trajectory ended. FAULT: an environment error, not a mistake of the policy."""

    ANSWERED = 0
    TRUNCATED = 1
    OVER_TURNS = 2
    VOID = 3
    REPEATED = 4
    FAULT = 5


@dataclass
class Turn:
    """One assistant turn: tokens [start, stop) of the response, their text, and the call it made."""

    start: int
    stop: int
    text: str
    call: CallResult | None = None


@dataclass
class Trajectory:
    """One finished rollout: the exact ids, append-only. r tokens. Its arrays are read-only.

    Attributes:
        ids: int32[r].
        logprobs: float32[r], the sampler's; 0 at observations.
        kind: uint8[r], `TokenKind`.
        positions: int32[3, r], M-RoPE.
        vision: int32[r], feature row of an image placeholder; -1 at text.
        answer: what stands in the last `<answer>…</answer>`; None where there is none.
        images: the numbered images, given and made; None where another process has them.
        error: traceback or timeout of an environment error.
        environment_reward: what its environment's `reward` returned.
    """

    task: Task
    rollout: int
    ids: np.ndarray
    logprobs: np.ndarray
    kind: np.ndarray
    positions: np.ndarray
    vision: np.ndarray
    turns: list[Turn]
    end: EndReason
    answer: str | None
    images: Sequence[ImageEntry] | None = field(repr=False, default=())
    error: str | None = None
    environment_reward: float | None = None

    @cached_property
    def score(self) -> float:
        """How right the answer is, 0 to 1, by the task's own kind of scoring; with several references, the best score.

        Raises:
            ValueError: the task's reference is not of its answer type.
        """
        return self.scored_as(self.task.answer_type)

    def scored_as(self, answer_type: str) -> float:
        """Return the score by another answer type than the task's own; see `score`.

        Raises:
            BadReference: a reference is not of that type.
        """
        return max(score(self.answer, reference, answer_type) for reference in self.task.answers)

    @property
    def right(self) -> bool:
        """Whether the answer is right: wholly, or a box well enough (`scoring.is_right`)."""
        return is_right(self.score, self.task.answer_type)

    def _calls(self, status: CallStatus) -> int:
        return sum(turn.call is not None and turn.call.status == status for turn in self.turns)

    @property
    def executed_calls(self) -> int:
        """Number of calls that a tool executed."""
        return self._calls(CallStatus.EXECUTED)

    @property
    def invalid_calls(self) -> int:
        """Number of calls that were malformed or impossible."""
        return self._calls(CallStatus.INVALID)

    @property
    def faulted_calls(self) -> int:
        """Number of calls that failed on an environment error."""
        return self._calls(CallStatus.FAULT)


def quote(value: Any, limit: int = 24) -> str:
    """A value as the policy wrote it, shortened to `limit` characters, printable on one line."""
    text = value if isinstance(value, str) else repr(value)
    text = "".join(char if char.isprintable() else " " for char in text[: limit + 1])
    text = text if len(text) <= limit else text[: limit - 3] + "..."
    return f'"{text}"' if isinstance(value, str) else text
