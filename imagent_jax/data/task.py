"""The unit every data source yields: one question about several images."""

from __future__ import annotations

import dataclasses

ANSWER_TYPES = ("exact", "choice", "number", "f1")


@dataclasses.dataclass(frozen=True)
class Task:
    """One question about several images, with its reference answer.

    Attributes:
        uid: unique name of the task within its data set; logs and errors name it.
        question: the question as plain text, without image markers. Images are called "Image 1", "Image 2", ...
        images: encoded files (JPEG, PNG, ...) in the order shown; `images[0]` is Image 1.
        answer: the reference answer as text.
        answer_type: how an answer is compared with the reference, one of `ANSWER_TYPES`.
        kind: the family of questions the task belongs to; metrics are reported per kind.
        meta: further facts about the task, JSON-serialisable. Never shown to the policy.
    """

    uid: str
    question: str
    images: tuple[bytes, ...]
    answer: str
    answer_type: str = "exact"
    kind: str = ""
    meta: dict = dataclasses.field(default_factory=dict)
