"""Formats of rows: a table from columns to the task of a row. `docs/data.md` shows a row of each."""

from __future__ import annotations

import base64
import binascii
import contextlib
import hashlib
import json
import math
import re
import string
from collections.abc import Callable, Iterable, Sequence
from decimal import Decimal
from typing import Any, NamedTuple

from imagent_jax.chat import extract_answer
from imagent_jax.data.check import RowError
from imagent_jax.scoring import number
from imagent_jax.types import ANSWER_TYPES, Task, quote

MARK = "<image>"
"""Stands in a question where an image stands."""
_BASE64 = re.compile(r"(?:/9j/|iVBORw0KGgo|R0lGOD|UklGR|Qk)[A-Za-z0-9+/=\s]{40,}")
"""Base64 of a JPEG, PNG, GIF, WebP or BMP file."""
_LETTER = re.compile(r"\(?([A-Za-z])\)?\.?")
_ROLES = {"human": "user", "gpt": "assistant"}

Row = dict[str, Any]


class Fields(NamedTuple):
    """What a row says: a question (text with marks, or parts of a message), its images, its answer or answers."""

    question: Any
    images: Any
    answer: Any
    options: Any = None
    uid: Any = None
    kind: Any = None


class Slot(NamedTuple):
    """Place of an image in a question. None: the next of the row's images."""

    image: Any = None


class Format(NamedTuple):
    """A format: its name, the columns that it needs ("a|b": one of them), and the function that takes the fields out of a row."""

    name: str
    needs: tuple[str, ...]
    read: Callable[[Row], Fields]


# ---- the formats ------------------------------------------------------------------------------------------------------


def _own(row: Row) -> Fields:
    columns = ("answer", "options", "uid", "kind")
    return Fields(row.pop("question", None), _images(row), *(row.pop(name, None) for name in columns))


def _verl(row: Row) -> Fields:
    model = row.pop("reward_model")
    answer = model.pop("ground_truth", None) if isinstance(model, dict) else None
    question, _ = _messages(row, "prompt")
    return Fields(question, _images(row), answer, kind=row.pop("data_source", None))


def _trl(row: Row) -> Fields:
    question, _ = _messages(row, "prompt" if "prompt" in row else "problem")
    return Fields(question, _images(row), _marked(_first(row, ("ground_truth", "solution", "answer"))))


def _verifiers(row: Row) -> Fields:
    question, _ = _messages(row, "prompt" if row.get("prompt") else "question")
    return Fields(question, _images(row), row.pop("answer", None), kind=row.pop("task", None))


def _pyvision(row: Row) -> Fields:
    question, answer = row.pop("question", None), row.pop("answer", None)
    return Fields(question, _images(row), answer, uid=row.pop("id", None), kind=row.pop("ability", None))


def _chat(row: Row) -> Fields:
    question, answer = _messages(row, "messages" if "messages" in row else "conversations")
    return Fields(question, _images(row), _marked(answer), uid=row.pop("id", None))


def _vlmevalkit(row: Row) -> Fields:
    options, question, hint = [], row.pop("question", None), row.pop("hint", None)
    for letter in string.ascii_uppercase:
        if row.get(letter) is None:
            break
        options.append(_plain(row.pop(letter)))
    if hint and isinstance(question, str):
        question = f"{hint}\n{question}"
    answer = row.pop("answer", None)
    return Fields(question, _images(row), answer, options or None, row.pop("index"), row.pop("category", None))


FORMATS = (
    Format("verl and EasyR1 Parquet", ("prompt", "reward_model"), _verl),
    Format("chat messages", ("messages|conversations",), _chat),
    Format("VLMEvalKit", ("index", "question", "answer", "image|image_path"), _vlmevalkit),
    Format("imagent-jax", ("question", "answer", "images"), _own),
    Format("PyVision", ("id", "question", "answer", "image_path"), _pyvision),
    Format("prime verifiers", ("question|prompt", "answer", "info|task"), _verifiers),
    Format("EasyR1", ("problem", "answer|solution"), _trl),
    Format("TRL", ("prompt", "ground_truth|solution|answer"), _trl),
    Format("imagent-jax", ("question", "answer"), _own),
)
"""The first whose columns a row has is its format."""


def format_of(row: Row) -> Format | None:
    """Return the format of a row by its columns; None: unknown."""
    return format_among(FORMATS, row)


def format_among(forms: Iterable[Format], row: Row) -> Format | None:
    """Return the first of some formats whose columns a row has; None: it has those of none."""
    return next((f for f in forms if all(row.keys() & set(need.split("|")) for need in f.needs)), None)


def unknown_columns(row: Row, wanted: Format | None = None) -> RowError:
    """Return the error of a row that has no format, or not the one that is wanted."""
    if wanted:
        needs = ", ".join(need.replace("|", " or ") for need in wanted.needs)
        return RowError("unknown columns", f"the columns {', '.join(row)} are not those of {wanted.name}; it has {needs}")
    known = ", ".join(dict.fromkeys(f.name for f in FORMATS))
    return RowError(
        "unknown columns", f"the columns {', '.join(row)} are of no format known here; use one of {known} (docs/data.md)"
    )


# ---- from a row to a task ---------------------------------------------------------------------------------------------


def read_row(
    row: Row, form: Format, default_uid: str, shuffle: int | None = None, answer_type: str = ""
) -> tuple[Task, list[str | bytes]]:
    """Return the task of a row, with b"" for each image, and its images: a path, or the bytes of an image file.

    Args:
        default_uid: uid of a row without one.
        shuffle: seed of the order of options; None: as in the row.
        answer_type: of a row that names none; "": by its options, format and answers.
    Raises:
        RowError: the row has no question or answer, or a field is not what it should be.
    """
    row = dict(row)
    answer_type = _text("answer_type", row.pop("answer_type", None), answer_type)
    own: dict[str, Any] = {}
    if form.read is _own:
        own = {"tools": _tools(row.pop("tools", None)), "reward": _weights(row.pop("reward", None))}
        own["environment"] = _text("environment", row.pop("environment", None), "")
    fields = form.read(row)
    question, parts, images = _placed(_parts(fields.question), fields.images)
    answers, options = _answers(fields.answer), ()
    uid, kind = _text("uid", fields.uid, default_uid), _text("kind", fields.kind, "")
    if fields.options is not None:
        options, answers = _options(fields.options, answers)
        if shuffle is not None:
            options, answers = _shuffled(options, answers, f"{shuffle}\n{uid}")
    default = "choice" if options else "exact" if form.read is _own else _guess(answers)
    if (answer_type := answer_type or default) not in ANSWER_TYPES:
        raise RowError(
            "unknown answer type", f"the answer type {answer_type!r} does not exist; use one of {', '.join(ANSWER_TYPES)}"
        )
    if options and answer_type != "choice":
        raise RowError("bad options", f'a row with options has answer type "choice", not {quote(answer_type)}')
    try:
        meta = json.loads(json.dumps(row, default=_described))
        shown = uid, question, (b"",) * len(images), answers[0], answer_type, kind, meta, parts, answers[1:], options
        task = Task(*shown, **own)
    except RecursionError:
        raise RowError("nested too deeply", "the row is nested too deeply; write its facts as flat fields") from None
    return task, images


# ---- questions and images ---------------------------------------------------------------------------------------------


def _messages(row: Row, column: str) -> tuple[Any, Any]:
    """Take a conversation out of a row: the content of its one user message, and of an assistant's message at its end.

    A text is the user message itself. A system message goes to the row's "system".
    """
    messages = row.pop(column, None)
    if not isinstance(messages, list):
        return messages, None
    if not all(isinstance(message, dict) for message in messages):
        raise RowError("no question", f'"{column}" is not a list of messages; write them as {{"role": ..., "content": ...}}')
    turns = [(str(m.get("role") or m.get("from")), m.get("content") or m.get("value")) for m in messages]
    turns = [(_ROLES.get(role, role), content) for role, content in turns]
    if system := [content for role, content in turns if role == "system"]:
        row.setdefault("system", system[0])
    turns = [turn for turn in turns if turn[0] != "system"]
    answer = turns.pop()[1] if turns and turns[-1][0] == "assistant" else None
    if [role for role, _ in turns] != ["user"]:
        roles = ", ".join(quote(role) for role, _ in turns) or "none"
        raise RowError("several turns", f"the messages before the answer are of {roles}; a task is one message of a user")
    return turns[0][1], answer


def _parts(content: Any) -> list[str | Slot]:
    """Return texts and slots of a question: a text with marks, or the content parts of a message."""
    if isinstance(content, str):
        return [part for piece in content.split(MARK) for part in (Slot(), piece)][1:]
    parts: list[str | Slot] = []
    for part in content if isinstance(content, list) else ():
        kind = "text" if isinstance(part, str) else part.get("type") if isinstance(part, dict) else None
        if kind == "text":
            parts.append(part if isinstance(part, str) else str(part.get("text") or ""))
        elif kind in ("image", "image_url"):
            parts.append(Slot(part.get("image") or part.get("image_url") or part.get("url")))
        else:
            raise RowError("not text or image", f"a message has a part {quote(kind)}; only text and images can be shown")
    return parts


def _placed(parts: Sequence[str | Slot], images: Sequence[Any]) -> tuple[str, tuple[str | int, ...], list[str | bytes]]:
    """Return the question as text, as parts (() where all images come first), and the images in the order shown."""
    slots, following = [part for part in parts if isinstance(part, Slot)], iter(images)
    texts = [part for part in parts if isinstance(part, str)]
    if not "".join(texts).strip():
        raise RowError("no question", 'the row has no question; add "question" as text')
    if not slots:
        return "\n".join(texts), (), [_image(image) for image in images]
    if (marks := sum(slot.image is None for slot in slots)) != len(images):
        raise RowError(
            "marks and images", f'the question has {marks} marks "{MARK}" and the row {len(images)} images; write one mark for '
            "each image, or no mark to show images first",
        )  # fmt: skip
    shown, placed = [], []
    for part in parts:
        if isinstance(part, Slot):
            placed.append(_image(next(following) if part.image is None else part.image))
            shown.append(len(placed))
        elif part.strip():
            shown.append(part.strip())
    if shown[:-1] == [*range(1, len(slots) + 1)]:
        return shown[-1], (), placed
    return " ".join(part if isinstance(part, str) else f"[Image {part}]" for part in shown), tuple(shown), placed


def _images(row: Row) -> list[Any]:
    """Take the images out of a row."""
    for name in ("images", "image", "image_path"):
        if value := row.pop(name, None):
            if isinstance(value, str) and value[0] == "[" and value[-1] == "]":  # how TSV files write a list
                value = [match[1] for match in re.findall(r"""(['"])(.*?)\1""", value)]
            return value if isinstance(value, list) else [value]
    return []


def _image(image: Any) -> str | bytes:
    """Return the path of an image, or its bytes."""
    while isinstance(image, dict):
        image = next((image[key] for key in ("bytes", "path", "url", "image") if image.get(key)), None)
    if isinstance(image, str):
        if re.match(r"(?!file:)\w+://", image):
            raise RowError("image by address", f"the image {quote(image, 80)} is on the web; download it and write its path")
        data = image.partition(",")[2] if image.startswith("data:") else image if _BASE64.fullmatch(image) else None
        if data is not None:
            try:
                return base64.b64decode(data)
            except binascii.Error as error:
                raise RowError("image unusable", f"an image's base64 text is damaged ({error}); write it again") from None
        image = image.removeprefix("file://")
    if not isinstance(image, (str, bytes)) or not image:
        raise RowError("bad images", f"{quote(image)} is no image; write a path, bytes, base64 text or a data URI")
    return image


# ---- answers ----------------------------------------------------------------------------------------------------------


def _answers(value: Any) -> tuple[str, ...]:
    given = value if isinstance(value, list) else [value]
    answers = _texts(given)
    if not given or len(answers) < len(given):
        raise RowError("no answer", 'the row has no answer; add "answer" as text or number, or as a list of them')
    return answers


def _marked(answer: Any) -> Any:
    """Return what stands between answer markers, or all of an answer without them."""
    if isinstance(answer, list) and all(isinstance(part, dict) for part in answer):  # content parts of a message
        answer = "".join(str(part.get("text") or "") for part in answer)
    return extract_answer(answer) or answer if isinstance(answer, str) else answer


def _guess(answers: Iterable[str]) -> str:
    """Return the answer type of references of other formats, which name none."""
    if all(re.fullmatch(r"[A-Z]|\([A-Z]\)", answer.strip()) for answer in answers):
        return "choice"
    with contextlib.suppress(ValueError):
        if all(number(answer, answer) for answer in answers):
            return "number"
    return "exact"


def _options(value: Any, answers: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the options, and the letters of the right ones."""
    options = _texts(value) if isinstance(value, list) else ()
    if not 2 <= len(options) <= 26 or len(options) < len(value):
        raise RowError("bad options", '"options" is no list of 2 to 26 texts; write the text of each option')
    letters, found = string.ascii_uppercase[: len(options)], []
    for answer in answers:
        meant: set[str] = {letters[i] for i, option in enumerate(options) if option.strip() == answer.strip()}
        if (match := _LETTER.fullmatch(answer.strip())) and match[1].upper() in letters:
            meant.add(match[1].upper())
        if len(meant) != 1:
            raise RowError(
                "answer and options", f"the answer {quote(answer)} means {' and '.join(sorted(meant)) or 'none'} of the options; "
                f"write one letter of {letters[0]} to {letters[-1]}, or the text of one option",
            )  # fmt: skip
        found += meant
    return options, tuple(found)


def _shuffled(options: Sequence[str], answers: Sequence[str], key: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return options in an order that depends on `key` alone, and the new letters of the answers."""
    order = sorted(range(len(options)), key=lambda i: hashlib.sha256(f"{key}\n{i}".encode()).digest())
    letters = string.ascii_uppercase
    return tuple(options[i] for i in order), tuple(letters[order.index(letters.index(answer))] for answer in answers)


# ---- fields -----------------------------------------------------------------------------------------------------------


def _first(row: Row, names: Sequence[str]) -> Any:
    """Take the first of these columns that is not null out of a row."""
    return next((row.pop(name) for name in names if row.get(name) is not None), None)


def _plain(value: Any) -> str | None:
    """Return text, or a number as decimal digits without an exponent; None for anything else."""
    if isinstance(value, float):
        return format(Decimal(repr(value)), "f") if math.isfinite(value) else None
    return str(value) if isinstance(value, (str, int)) and not isinstance(value, bool) else None


def _texts(values: Sequence[Any]) -> tuple[str, ...]:
    """Return those of the values that are text or numbers, as text, without blank ones."""
    return tuple(text for value in values if (text := _plain(value)) and text.strip())


def _text(name: str, value: Any, default: str) -> str:
    """Return an optional field; null is the same as absent."""
    if value is None:
        return default
    if (text := _plain(value)) is None:
        raise RowError(f"bad {name}", f'"{name}" is {quote(value)}; write text, or leave it out')
    return text


def _tools(value: Any) -> tuple[str, ...] | None:
    if value is None or (isinstance(value, list) and all(isinstance(name, str) for name in value)):
        return value if value is None else tuple(value)
    raise RowError("bad tools", f'"tools" is {quote(value)}; write a list of names of tools, or leave it out')


def _weights(value: Any) -> dict[str, float]:
    if value is None:
        return {}
    given = {name: weight for name, weight in value.items() if weight is not None} if isinstance(value, dict) else {"": ""}
    if all(isinstance(w, (int, float)) and not isinstance(w, bool) and math.isfinite(w) for w in given.values()):
        return {name: float(weight) for name, weight in given.items()}
    raise RowError("bad reward", f'"reward" is {quote(value)}; write weights by name, such as {{"format": 0}}, or leave it out')


def _described(value: Any) -> str:
    return f"{len(value)} bytes" if isinstance(value, bytes) else str(value)
