"""What the agents are asked, role by role: messages with images in, checked answers out."""

from __future__ import annotations

import base64
import functools
import importlib.resources
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from imagent_jax.curation.agents import AgentError, Backend, load_backend
from imagent_jax.curation.pool import Pool, showable
from imagent_jax.curation.question import KINDS, SIDE, Evidence, Question
from imagent_jax.curation.settings import AgentSettings, FilterSettings
from imagent_jax.types import Task

Prompt = Literal[
    "proposer", "answerer", "text_attack", "image_attack", "other_attack", "crop", "repairer", "distractors"
]  # fmt: skip
ROLES = ("proposer", "answerer", "attacker", "repairer", "distractors")
"""Roles that may have a backend of their own. The attacker also reads crops."""
LONGEST = 8
"""Most that the longer side of an enlarged crop has of the shorter side that is wanted."""
ANSWER_TYPES = ("exact", "number", "choice")

_TEXT, _BOOL = {"type": "string"}, {"type": "boolean"}
_BOX = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": SIDE}, "minItems": 4, "maxItems": 4}
_IMAGE = {"type": "integer", "minimum": 1}


def _object(title: str, **properties: Any) -> dict[str, Any]:
    shape = {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}
    return {"title": title, **shape} if title else shape


_PLACE = _object("", image=_IMAGE, box=_BOX, asks=_TEXT, shows=_TEXT)
_QUESTION = {
    "question": _TEXT,
    "answer": _TEXT,
    "answer_type": {"type": "string", "enum": [*ANSWER_TYPES]},
    "kind": {"type": "string", "enum": [*KINDS]},
    "several": _BOOL,
    "evidence": {"type": "array", "items": _PLACE},
}
SCHEMAS: dict[Prompt, dict[str, Any]] = {
    "proposer": _object("proposal", **_QUESTION),
    "answerer": _object("answer", answer=_TEXT, sure=_BOOL),
    "text_attack": _object("text_attack", answer=_TEXT, sure=_BOOL),
    "image_attack": _object("image_attack", answer=_TEXT, sure=_BOOL),
    "other_attack": _object("other_attack", other=_TEXT, vague=_BOOL, why=_TEXT),
    "crop": _object("crop", answer=_TEXT),
    "repairer": _object("repair", **_QUESTION),
    "distractors": _object("distractors", options={"type": "array", "items": _TEXT}),
}
"""JSON schema of the answer to each prompt. Its title says what is asked."""
LOOKING = _object(
    "answer_or_look", look={"anyOf": [_object("", image=_IMAGE, box=_BOX), {"type": "null"}]}, answer=_TEXT, sure=_BOOL
)
"""Schema of an answerer that may ask for a crop."""


class Roles:
    """Asks agents.

    Args:
        backends: by role, see `ROLES`.
        prompts: system text by name of the prompt.
    """

    def __init__(self, backends: Mapping[str, Backend], prompts: Mapping[str, str], pool: Pool, cfg: FilterSettings):
        self.backends, self.prompts, self.pool, self.cfg = backends, prompts, pool, cfg

    def propose(self, number: int, images: Sequence[str], earlier: int) -> dict[str, Any]:
        """Return a proposal about a group of images.

        Args:
            number: of the proposal, so that each is another conversation.
            earlier: how many proposals there are about these images before this one.
        """
        words = f"Proposal {number}. There are {earlier} earlier questions about these images; ask about something else."
        return self._ask("proposer", [*self._shown(images), _text(words)])

    def answer(self, question: Question, name: str, looks: int) -> tuple[str, int]:
        """Return a blind answer, and for how many crops the answerer asked. `name` makes answerers different."""
        content = [*self._shown(question.images), _text(f"{asked(question)}\n\nYou are {name}.")]
        messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
        for used in range(looks):
            found = self._complete("answerer", messages, LOOKING)
            look = found["look"]
            if look is None:
                return found["answer"], used
            try:
                place = Evidence(look["image"], tuple(look["box"]))
                crop = self._crop(question.images[place.image - 1], place, 0.0)
                reply = [_text(f"Part {look['box']} of Image {place.image}:"), _picture(_png(crop))]
            except (ValueError, IndexError) as error:
                reply = [_text(f"There is no such part ({error}). Ask for another one, or answer.")]
            messages += [{"role": "assistant", "content": json.dumps(found)}, {"role": "user", "content": reply}]
        return self._complete("answerer", messages, SCHEMAS["answerer"])["answer"], looks

    def from_text(self, question: Question) -> tuple[str, bool]:
        """Return the answer that the text alone gives, and whether it settles it."""
        found = self._ask("text_attack", [_text(asked(question))])
        return found["answer"], found["sure"]

    def from_image(self, question: Question, number: int) -> tuple[str, bool]:
        """Return the answer that a single image gives, and whether it settles it."""
        shown = [_text(f"Image {number}:"), _picture(self.pool.data(question.images[number - 1]))]
        found = self._ask("image_attack", [*shown, _text(asked(question))])
        return found["answer"], found["sure"]

    def attack(self, question: Question) -> dict[str, Any]:
        """Return another defensible answer, and whether a reference is vague."""
        return self._ask("other_attack", [*self._shown(question.images), _text(f"{asked(question)}\nAnswer: {question.answer}")])

    def read(self, question: Question, place: Evidence) -> str:
        """Return the answer of a crop of a place to the question that the place answers."""
        crop = self._crop(question.images[place.image - 1], place, self.cfg.crop_margin)
        return self._ask("crop", [_picture(_png(crop)), _text(f"Question: {place.asks}")])["answer"]

    def repair(self, question: Question, findings: Sequence[str]) -> dict[str, Any]:
        """Return the question rewritten, in the form of a proposal."""
        claim = {
            "question": question.text,
            "answer": question.answer,
            "answer_type": question.answer_type,
            "kind": question.kind,
            "several": question.several,
            "evidence": [{"image": e.image, "box": [*e.box], "asks": e.asks, "shows": e.shows} for e in question.evidence],
        }
        words = f"The question:\n{json.dumps(claim, ensure_ascii=False)}\n\nFound:\n" + "\n".join(f"- {one}" for one in findings)
        return self._ask("repairer", [*self._shown(question.images), _text(words)])

    def distract(self, question: Question, count: int) -> list[str]:
        """Return `count` wrong options, or all that there are of those that differ from each other and from the answer."""
        words = f"{asked(question)}\nAnswer: {question.answer}\nWrong options wanted: {count}"
        found = self._ask("distractors", [*self._shown(question.images), _text(words)])["options"]
        wrong: dict[str, str] = {}
        for one in map(str.strip, found):
            if one and one.lower() != question.answer.lower():
                wrong.setdefault(one.lower(), one)
        return [*wrong.values()][:count]

    # ---- messages -----------------------------------------------------------------------------------------------------

    def _ask(self, prompt: Prompt, content: list[dict[str, Any]]) -> dict[str, Any]:
        return self._complete(prompt, [{"role": "user", "content": content}], SCHEMAS[prompt])

    def _complete(self, prompt: Prompt, messages: Sequence[dict[str, Any]], schema: dict[str, Any]) -> dict[str, Any]:
        role = "attacker" if prompt in ("text_attack", "image_attack", "other_attack", "crop") else prompt
        found = self.backends[role].complete([{"role": "system", "content": self.prompts[prompt]}, *messages], schema)
        if missing := [name for name in schema["required"] if name not in found]:
            raise AgentError(f"The {role}'s answer has no {', '.join(missing)}.")
        return found

    def _shown(self, images: Sequence[str]) -> list[dict[str, Any]]:
        return [part for n, name in enumerate(images, 1) for part in (_text(f"Image {n}:"), _picture(self.pool.data(name)))]

    def _crop(self, image: str, place: Evidence, margin: float) -> Image.Image:
        """Return the pixels of a place with a margin, at least one, enlarged to `crop_side` where they are fewer.

        The longer side becomes at most `LONGEST` times that: a strip of one pixel would be a picture of gigabytes.
        """
        whole = self.pool.image(image)
        (width, height), edge = whole.size, SIDE * margin
        left, top = (max(0.0, low - edge) / SIDE for low in place.box[:2])
        right, bottom = (min(float(SIDE), high + edge) / SIDE for high in place.box[2:])
        begin = min(round(left * width), width - 1), min(round(top * height), height - 1)
        crop = whole.crop((*begin, max(round(right * width), begin[0] + 1), max(round(bottom * height), begin[1] + 1)))
        if (factor := min(self.cfg.crop_side / min(crop.size), LONGEST * self.cfg.crop_side / max(crop.size))) > 1:
            crop = crop.resize((round(crop.width * factor), round(crop.height * factor)), Image.Resampling.BICUBIC)
        return crop


def asked(question: Question) -> str:
    """Return the question and its options as agents see them."""
    options = [f"{letter}. {option}" for letter, option in zip(question.letters, question.options, strict=True)]
    return "\n".join([f"Question: {question.text}", *options])


def load_prompts(folder: str) -> dict[str, str]:
    """Return the prompts: those of a folder of the user's, and the package's for what is not there.

    Raises:
        ValueError: there is no such folder, or a file in it is no prompt's.
    """
    own = Path(folder).expanduser()
    if folder and not own.is_dir():
        raise ValueError(f"agents.prompts {folder!r} is no folder; name one with files such as proposer.md.")
    if folder and (odd := [f.name for f in own.glob("*.md") if f.stem not in SCHEMAS]):
        raise ValueError(f"{own} has {', '.join(odd)}, which is no prompt; there are {', '.join(f'{n}.md' for n in SCHEMAS)}.")
    ours = importlib.resources.files("imagent_jax.curation") / "prompts"
    files = {name: own / f"{name}.md" if folder and (own / f"{name}.md").is_file() else ours / f"{name}.md" for name in SCHEMAS}
    return {name: file.read_text(encoding="utf-8").strip() for name, file in files.items()}


def load_backends(cfg: AgentSettings) -> dict[str, Backend]:
    """Return the backend of each role. Roles without one of their own share one.

    Raises:
        ValueError: there is no such role or backend, or its settings are wrong.
    """
    for role, own in cfg.roles.items():
        if role not in ROLES:
            raise ValueError(f"agents.roles has {role!r}, which is no role; there are {', '.join(ROLES)}.")
        if not isinstance(own, Mapping) or set(own) - {"backend", "settings"}:
            raise ValueError(f"agents.roles.{role} must hold 'backend' and 'settings' only, not {own!r}.")
    shared = functools.cache(lambda: load_backend(cfg.backend, cfg.settings, "agents.backend"))

    def backend(role: str) -> Backend:
        if not (own := cfg.roles.get(role)):
            return shared()
        return load_backend(own.get("backend", cfg.backend), own.get("settings", {}), f"agents.roles.{role}.backend")

    return {role: backend(role) for role in ROLES}


def _text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def _picture(data: bytes) -> dict[str, Any]:
    data, kind = showable(data)
    return {"type": "image_url", "image_url": {"url": f"data:{kind};base64,{base64.b64encode(data).decode()}"}}


def _png(image: Image.Image) -> bytes:
    image.save(out := io.BytesIO(), "PNG")
    return out.getvalue()


def task_of(question: Question, images: Sequence[bytes]) -> Task:
    """Return a question as a task of training."""
    meta = {"several": question.several, "group": question.group}
    return Task(
        question.uid,
        question.text,
        tuple(images),
        question.answer,
        question.answer_type,
        question.kind,
        meta,
        options=question.options,
    )
