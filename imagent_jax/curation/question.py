"""A question in the making: what it says, what it rests on, and everything that happened to it."""

import dataclasses
import json
import string
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from imagent_jax.scoring import is_right, score

KINDS = ("read", "count", "compare", "order", "locate", "relate", "difference", "sum")
"""What a question asks for; "difference" is spot the difference, "sum" is sum up."""
SIDE = 1000
"""Boxes count in thousandths of the image's width and height."""


@dataclass(frozen=True)
class Evidence:
    """A place that the answer rests on.

    Attributes:
        image: number of the image in the question, from 1.
        box: left, top, right, bottom, in thousandths of the image.
        asks: a question that the place alone answers; "": none.
        shows: the answer to it.
    Raises:
        ValueError: the box is empty or not inside the image, the number is below 1, or a number is not whole.
    """

    image: int
    box: tuple[int, int, int, int]
    asks: str = ""
    shows: str = ""

    def __post_init__(self):
        if any(number % 1 for number in (self.image, *self.box)):
            raise ValueError(f"the box {list(self.box)} of image {self.image} is not in whole numbers")
        object.__setattr__(self, "image", int(self.image))  # JSON schemas take 1.0 for a whole number, lists do not
        object.__setattr__(self, "box", tuple(map(int, self.box)))
        left, top, right, bottom = self.box
        if self.image < 1 or not (0 <= left < right <= SIDE and 0 <= top < bottom <= SIDE):
            raise ValueError(f"the box {list(self.box)} of image {self.image} is empty or not within 0 to {SIDE}")


@dataclass(frozen=True)
class Event:
    """Something that happened to a question.

    Attributes:
        by: the role, filter or person: "proposer", "filter:duplicate", "review:anna".
        what: one word: "proposed", "answered", "attacked", "repaired", "kept", "dropped", "accepted", ...
        facts: what was found or changed; JSON values.
    """

    by: str
    what: str
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Question:
    """A question about a group of images.

    Attributes:
        uid: unique in the data set.
        text: the question; images are named "Image 1", "Image 2", ...
        images: ids of the pool's images, in the order shown.
        answer: the reference; a letter where there are options.
        kind: one of `KINDS`.
        evidence: the places that the answer rests on.
        several: it claims to need more than one image.
        options: of a multiple-choice question.
        group: the image group, which is in one split alone.
        answer_type: how answers are compared, one of `types.ANSWER_TYPES`.
        history: everything that happened, in order.
    """

    uid: str
    text: str
    images: tuple[str, ...]
    answer: str
    kind: str
    evidence: tuple[Evidence, ...] = ()
    several: bool = True
    options: tuple[str, ...] = ()
    group: str = ""
    answer_type: str = "exact"
    history: tuple[Event, ...] = ()

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"the kind {self.kind!r} does not exist; use one of {', '.join(KINDS)}")
        if beyond := [e.image for e in self.evidence if e.image > len(self.images)]:
            raise ValueError(f"the evidence names image {beyond[0]}, but the question has {len(self.images)}")

    def after(self, event: Event, **changes: Any) -> "Question":
        """Return the question with changed fields and the event at the end of its history."""
        return dataclasses.replace(self, **changes, history=(*self.history, event))

    def said(self, what: str) -> list[Event]:
        """Return the events of a kind since the question last changed, by a repair or by people who mended it."""
        people = [event for event in self.history if event.by.startswith("review:")]
        deciding = [event for event in people if event.facts.get("adjudicator")][-1:] or people
        if any(event.what == "mended" for event in deciding):
            return []
        last = max((i for i, event in enumerate(self.history) if event.what == "repaired"), default=0)
        return [event for event in self.history[last:] if event.what == what]

    @property
    def letters(self) -> str:
        """Letters of the options, in order."""
        return string.ascii_uppercase[: len(self.options)]

    @property
    def open_type(self) -> str:
        """How answers are compared where there are no options."""
        offered = [event.facts["type"] for event in self.history if event.what == "offered"]
        return (offered[-1] if offered else "exact") if self.options else self.answer_type

    def options_fault(self) -> str:
        """Return why training cannot read the options and the letter of the right one; "": it can."""
        from imagent_jax.data.check import RowError
        from imagent_jax.data.fields import options_of

        try:
            if self.options:
                options_of([*self.options], [self.answer])
        except RowError as error:
            return error.reason
        return ""

    def right(self, answer: str) -> bool:
        """Return whether an answer is the claimed one.

        Raises:
            ValueError: the claimed answer is not of its type.
        """
        return is_right(score(answer, self.answer, self.answer_type), self.answer_type)

    def to_json(self) -> str:
        """Return one line of JSON, the inverse of `from_json`."""
        return json.dumps(dataclasses.asdict(self), ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> "Question":
        """Return the question of a line that `to_json` wrote.

        Raises:
            ValueError: the line is none.
        """
        try:
            values = json.loads(text)
            evidence = tuple(
                Evidence(e["image"], tuple(e["box"]), e.get("asks", ""), e.get("shows", "")) for e in values.pop("evidence")
            )
            history = tuple(Event(**event) for event in values.pop("history"))
            lists = {name: tuple(values.pop(name)) for name in ("images", "options")}
            return cls(**values, **lists, evidence=evidence, history=history)
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"the line is no question of a data set in the making ({error})") from None
