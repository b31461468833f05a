"""Formats of rows: a table from columns to the task of a row. `docs/data.md` shows a row of each."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import itertools
import json
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from imagent_jax.data.check import Image, RowError, StoredImage
from imagent_jax.data.fields import (
    MARK,
    NUMBERED,
    answers_of,
    guess_type,
    lettered,
    listed,
    name_images,
    options_of,
    shuffled,
    text_of,
    tools_of,
    weights_of,
    without_markup,
)
from imagent_jax.types import ANSWER_TYPES, Task, quote

_BASE64 = re.compile(r"(?:/9j/|iVBORw0KGgo|R0lGOD|UklGR|Qk)[A-Za-z0-9+/=\s]{40,}")
"""Base64 of a JPEG, PNG, GIF, WebP or BMP file."""
_OPTIONS = ("options", "choices", "multi-choice options")
_UNREAD = ("video", "videos", "audio", "audios")
"""Columns of options, and of what no task shows."""
_PICTURE = re.compile(
    r"(image|img|picture|photo)(_?\d+|s?(_?(url|path|file|list|base64|b64|bytes|data)s?)?)|bytes|file_name|multi_modal_data"
)
"""Columns of images, also those that no format reads."""
_OPTION = re.compile(r"[AB]|(?i:option|choice)[ _]?[abAB12]")
"""Columns of the first two options, where each has a column of its own."""
_INSIDE = ("image", "image_url", "url", "path", "base64", "bytes", "source")
"""Keys of a part of a message under which an image stands."""
_CONVERSATION = re.compile(r"""\s*\[\s*\{\s*['"](role|from|content|value)['"]""")
"""Begins a list of messages that stands as text."""
_QUOTED = re.compile(r"""(['"])(.*?)\1""")
_ANSWERS = ("ground_truth", "answer", "solution")
"""Columns of an answer; a solution may be a derivation of it."""
_ROLES = {"human": "user", "gpt": "assistant"}

Row = dict[str, Any]


class Fields(NamedTuple):
    """What a row says: a question (text with marks, or parts of a message), its images, its answer or answers.

    `tools`, `reward` and `environment` are of our own rows.
    """

    question: Any
    images: Any
    answer: Any
    options: Any = None
    uid: Any = None
    kind: Any = None
    answer_type: Any = None
    tools: Any = None
    reward: Any = None
    environment: Any = None


class Slot(NamedTuple):
    """Place of an image in a question, and the image where a message holds it. None: the next of the row's images."""

    image: Any = None


CONVERTED = "ArrayRecord of imagent-jax"
"""Name of the format of rows that `to_row` wrote."""


class Format(NamedTuple):
    """A format: its name, the columns that it needs ("a|b": one of them), and the function that takes the fields out of a row.

    `lettered`: an answer that is a letter means the option of that letter, even if it is the text of another.
    """

    name: str
    needs: tuple[str, ...]
    read: Callable[[Row], Fields]
    lettered: bool = False


# ---- the formats ------------------------------------------------------------------------------------------------------


def _own(row: Row) -> Fields:
    return Fields(row.pop("question", None), _images(row), *(row.pop(name, None) for name in Fields._fields[2:]))


def _verl(row: Row) -> Fields:
    model = row.pop("reward_model")
    if isinstance(model, str):
        with contextlib.suppress(ValueError, RecursionError):
            model = json.loads(model)
    answer = model.get("ground_truth") if isinstance(model, dict) else None
    answer = answer.get("target") if isinstance(answer, dict) else answer  # as Search-R1 writes it
    return Fields(_asked(row, "prompt"), _images(row), answer, kind=row.pop("data_source", None))


def _trl(row: Row) -> Fields:
    question = _asked(row, "prompt" if row.get("prompt") else "problem")
    return Fields(question, _images(row), without_markup(_first(row, _ANSWERS)))


def _verifiers(row: Row) -> Fields:
    question = _asked(row, "prompt" if row.get("prompt") else "question")
    return Fields(question, _images(row), row.pop("answer", None), kind=row.pop("task", None))


def _pyvision(row: Row) -> Fields:
    question, answer = row.pop("question", None), row.pop("answer", None)
    return Fields(question, _images(row), answer, uid=row.pop("id", None), kind=row.pop("ability", None))


def _chat(row: Row) -> Fields:
    question, said = _messages(row, "messages" if row.get("messages") else "conversations")
    answer = _first(row, _ANSWERS)
    return Fields(question, _images(row), without_markup(said if answer is None else answer), uid=row.pop("id", None))


def _vlmevalkit(row: Row) -> Fields:
    options, question, hint = lettered(row), row.pop("question", None), row.pop("hint", None)
    if hint and isinstance(question, str):
        question = f"{hint}\n{question}"
    answer = row.pop("answer", None)
    return Fields(question, _images(row), answer, options or None, row.pop("index"), row.pop("category", None))


def multi_image(row: Row) -> Fields:
    """Take the fields out of a row of MuirBench, BLINK or ReMI."""
    answer, options = _first(row, ("answer", "label")), _first(row, ("options", "choices"))
    uid, kind = _first(row, ("idx", "id")), _first(row, ("sub_task", "task"))
    return Fields(row.pop("question"), _images(row), answer, options or None, uid, kind)


def _mat(row: Row) -> Fields:
    kind, problem, solution = row.pop("type", None), row.pop("problem"), row.pop("solution")
    if step := re.match(r"\s*<(problem|code|search)>", str(solution)):
        raise RowError(
            "a step, no answer",
            f"the solution is a step ({step[1]}) towards an answer; keep the rows whose solution holds <answer>",
        )
    if kind == "pre_answer" and isinstance(row["image_path"], str):  # it names the mended image: start from the damaged one
        row["image_path"] = re.sub(r"_ori(?=\.\w+$)", "_proc", row["image_path"])
    question = re.sub(r"^\s*<query>|</?query>\s*$", "", problem).strip() if isinstance(problem, str) else problem
    return Fields(question, _images(row), without_markup(solution), kind=kind)


FORMATS = (
    Format("verl and EasyR1 Parquet", ("prompt", "reward_model"), _verl),
    Format("chat messages", ("messages|conversations",), _chat),
    Format("VLMEvalKit", ("index", "question", "answer", "image|image_path|A"), _vlmevalkit),
    Format("imagent-jax", ("question", "answer", "images"), _own),
    Format("MuirBench, BLINK and ReMI", ("question", "answer|label", "image_list|image_1"), multi_image),
    Format("PyVision", ("id", "question", "answer", "image_path"), _pyvision),
    Format("imagent-jax", ("question", "answer", "options|tools|reward|environment|uid|kind"), _own),
    Format("PyVision", ("id", "question", "answer", "ability"), _pyvision),
    Format("prime verifiers", ("question|prompt", "answer", "info|task"), _verifiers),
    Format("MAT", ("image_path", "problem", "solution"), _mat),
    Format("EasyR1", ("problem", "answer|solution"), _trl),
    Format("TRL", ("prompt", "ground_truth|solution|answer"), _trl),
    Format("imagent-jax", ("question", "answer"), _own),
    Format(CONVERTED, ("imagent_task",), _own),
)
"""See `format_among`."""


def format_of(row: Row) -> Format | None:
    """Return the format of a row, see `format_among`; None: unknown."""
    return format_among(FORMATS, row)


def format_among(forms: Iterable[Format], row: Row) -> Format | None:
    """Return the first of some formats whose columns hold values in a row, else the first whose columns it has; None: no such."""
    filled = {name for name, value in row.items() if value not in (None, "")}
    pairs = itertools.product((filled, row.keys()), forms)
    return next((f for names, f in pairs if all(names & set(need.split("|")) for need in f.needs)), None)


def unknown_columns(row: Row, wanted: Format | None = None) -> RowError:
    """Return the error of a row that has no format, or not the one that is wanted."""
    if wanted:
        needs = ", ".join(need.replace("|", " or ") for need in wanted.needs)
        return RowError("unknown columns", f"the columns {', '.join(row)} are not those of {wanted.name}; it has {needs}")
    known = ", ".join(dict.fromkeys(f.name for f in FORMATS[:-1]))
    return RowError(
        "unknown columns", f"the columns {', '.join(row)} are of no format known here; use one of {known} (docs/data.md)"
    )


def fields_of(row: Row, form: Format) -> Fields:
    """Take the fields out of a row.

    Raises:
        RowError: a column would be lost that holds options, images, video or audio. A benchmark keeps such columns in its tasks.
    """
    fields = form.read(row)
    if form not in FORMATS:
        return fields
    filled = [name for name, value in row.items() if value not in (None, "", b"", [], {}) and value is not False]
    options = [name for name in filled if _OPTION.fullmatch(name)]

    def unseen(name: str) -> bool:
        if name in ("images", "image", "image_list") and fields.images:
            return row[name] not in (fields.images, *fields.images)
        if _PICTURE.fullmatch(name):
            return not fields.images or name[-1].isdigit()
        return name in _UNREAD or fields.options is None and (name in _OPTIONS or name in options[:-1])

    if lost := [*filter(unseen, filled)]:
        raise RowError(
            "unread column",
            f'the column "{lost[0]}" is none of {form.name} and would be lost; write it as docs/data.md shows, or remove it',
        )
    return fields


# ---- from a row to a task ---------------------------------------------------------------------------------------------


def read_row(
    row: Row, form: Format, default_uid: str, shuffle: int | None = None, answer_type: str = ""
) -> tuple[Task, list[Image]]:
    """Return the task of a row, with b"" for each image, and its images.

    Args:
        default_uid: uid of a row without one.
        shuffle: seed of the order of options; None: as in the row.
        answer_type: of a row that names none; "": by its options, format and answers.
    Raises:
        RowError: the row has no question or answer, or a field is not what it should be.
    """
    if form.name == CONVERTED:
        return _converted(row, shuffle)
    row = dict(row)
    fields = fields_of(row, form)
    named = row.pop("answer_type", None) if fields.answer_type is None else fields.answer_type
    answer_type = text_of("answer_type", named, answer_type)
    images, options, count = fields.images, fields.options, len(fields.images)
    parts = _parts(fields.question, count)
    count = count or sum(isinstance(part, Slot) and part.image is not None for part in parts)
    if isinstance(options, list):
        parts, options = _marks_of_options(parts, options, count)
    question, parts, images = _placed(parts, images)
    answers = answers_of(listed(fields.answer) if form.read is _vlmevalkit and answer_type != "set" else fields.answer, count)
    uid, kind = text_of("uid", fields.uid, default_uid), text_of("kind", fields.kind, "")
    if options is not None:
        options, answers = options_of(options, answers, form.lettered)
        if shuffle is not None:
            options, answers = shuffled(options, answers, f"{shuffle}\n{uid}")
    default = "choice" if options else "exact" if form.read is _own else guess_type(answers)
    if (answer_type := answer_type or default) not in ANSWER_TYPES:
        raise RowError(
            "unknown answer type", f"the answer type {answer_type!r} does not exist; use one of {', '.join(ANSWER_TYPES)}"
        )
    if options and answer_type != "choice":
        raise RowError("bad options", f'a row with options has answer type "choice", not {quote(answer_type)}')
    own = tools_of(fields.tools), weights_of(fields.reward), text_of("environment", fields.environment, "")
    try:
        meta = json.loads(json.dumps(row, default=_described))
        shown = uid, question, (b"",) * len(images), answers[0], answer_type, kind, meta, parts, answers[1:], options or ()
        task = Task(*shown, "", *own)
    except RecursionError:
        raise RowError("nested too deeply", "the row is nested too deeply; write its facts as flat fields") from None
    return task, images


def _converted(row: Row, shuffle: int | None) -> tuple[Task, list[Image]]:
    """Return the task that `to_row` wrote, and its images."""
    try:
        fields: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in row["imagent_task"].items()
        }
        task = Task(images=(b"",) * len(row["images"]), **fields)
        if not all(isinstance(image, StoredImage) for image in row["images"]):
            raise TypeError("images are missing")
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise RowError("bad record", f"the record is none that `imagent data` writes ({error}); convert the data again") from None
    if shuffle is not None and task.options:
        options, answers = shuffled(task.options, task.answers, f"{shuffle}\n{task.uid}")
        task = dataclasses.replace(task, options=options, answer=answers[0], other_answers=answers[1:])
    return task, row["images"]


def to_row(task: Task) -> Row:
    """Return a task without its images as a row of JSON values, which `read_row` reads."""
    names = [field.name for field in dataclasses.fields(task) if field.name != "images"]
    return {"imagent_task": {name: getattr(task, name) for name in names}}


# ---- questions and images ---------------------------------------------------------------------------------------------


def _asked(row: Row, column: str) -> Any:
    """Take a conversation without an answer out of a row: the content of its one user message."""
    return _messages(row, column, answered=False)[0]


def _messages(row: Row, column: str, answered: bool = True) -> tuple[Any, Any]:
    """Take a conversation out of a row: the content of its one user message, and of an assistant's message at its end.

    Without `answered`, a message at its end is no answer, and a fault.

    A text is the user message itself, or the JSON of a list of messages. A system message goes to the row's "system".
    """
    messages = row.pop(column, None)
    if isinstance(messages, str) and _CONVERSATION.match(messages):
        try:
            messages = json.loads(messages)
        except (ValueError, RecursionError) as error:
            raise RowError("no question", f'"{column}" begins as a list of messages and is not JSON ({error}); mend it') from None
    if not isinstance(messages, list):
        return messages, None
    if not all(isinstance(message, dict) for message in messages):
        raise RowError("no question", f'"{column}" is not a list of messages; write them as {{"role": ..., "content": ...}}')
    turns = [(str(m.get("role") or m.get("from")), m.get("content") or m.get("value")) for m in messages]
    turns = [(_ROLES.get(role, role), content) for role, content in turns]
    if system := [content for role, content in turns if role == "system"]:
        row.setdefault("system", system[0])
    for role, content in turns:
        held = [part for part in content if isinstance(part, dict)] if isinstance(content, list) and role != "user" else []
        if any(str(part.get("type")).startswith("image") or part.get("image") or part.get("image_url") for part in held):
            raise RowError("not text or image", f"a message of {quote(role)} holds an image; show it in the message of the user")
    turns = [turn for turn in turns if turn[0] != "system"]
    answer = turns.pop()[1] if answered and turns and turns[-1][0] == "assistant" else None
    if [role for role, _ in turns] != ["user"]:
        roles = ", ".join(quote(role) for role, _ in turns) or "none"
        raise RowError("several turns", f"the messages before the answer are of {roles}; a task is one message of a user")
    return turns[0][1], answer


def _parts(content: Any, count: int) -> list[str | Slot]:
    """Return texts and slots of a question about `count` images: a text with marks, or the content parts of a message."""
    if isinstance(content, str):
        numbers = [int(number) for number in NUMBERED.findall(content)]
        if numbers and MARK in content:
            raise RowError("marks and images", f'the question has marks "{MARK}" with and without number; write all in one way')
        content = name_images(content, count, place=[*dict.fromkeys(numbers)] == [*range(1, count + 1)])
        return _pieces(content)
    parts = [_part(part) for part in content] if isinstance(content, list) else []
    texts = [part for part in parts if isinstance(part, str)]
    if parts and len(texts) == len(parts):
        return _parts("\n".join(texts), count)
    inside = sum(isinstance(part, Slot) and part.image is not None for part in parts)
    places = len(parts) - len(texts) - inside + sum(text.count(MARK) for text in texts)
    pieces = (_pieces(name_images(part, inside + max(places, count))) if isinstance(part, str) else [part] for part in parts)
    return [*itertools.chain.from_iterable(pieces)]


def _part(part: Any) -> str | Slot:
    """Return a part of a message: text, or an image or its place."""
    if isinstance(part, str):
        return part
    held = part if isinstance(part, dict) else {}
    text, image = held.get("text"), next((held[key] for key in _INSIDE if held.get(key)), None)
    kind = held.get("type") or ("image" if image else "text" if text else None)
    if kind not in ("text", "image", "image_url"):
        raise RowError("not text or image", f"a message has a part {quote(kind)}; only text and images can be shown")
    if text and any(held.get(key) for key in (_INSIDE[:2] if kind == "text" else ("text",))):
        raise RowError("not text or image", "a message has a part of text with an image; write each as a part of its own")
    return str(text or "") if kind == "text" else Slot(image)


def _pieces(text: str) -> list[str | Slot]:
    """Return a text with a slot in the place of each mark."""
    return [part for piece in text.split(MARK) for part in (Slot(), piece)][1:]


def _marks_of_options(parts: list[str | Slot], options: Sequence[Any], count: int) -> tuple[list[str | Slot], list[Any]]:
    """Return parts and options of a question about `count` images, the options without marks.

    Images of marks without number stand behind the question, and options name them.
    """
    options = [name_images(option, count) if isinstance(option, str) else option for option in options]
    marks = sum(option.count(MARK) for option in options if isinstance(option, str)) if count else 0
    number = itertools.count(count - marks + 1)
    if marks:
        options = [
            re.sub(MARK, lambda _: f"Image {next(number)}", option) if isinstance(option, str) else option for option in options
        ]
    return [*parts, *[Slot()] * marks], options


def _placed(parts: Sequence[str | Slot], images: Sequence[Any]) -> tuple[str, tuple[str | int, ...], list[Image]]:
    """Return the question as text, as parts (() where all images come first), and the images in the order shown."""
    slots, following = [part for part in parts if isinstance(part, Slot)], iter(images)
    texts = [part for part in parts if isinstance(part, str)]
    if not "".join(texts).strip():
        raise RowError("no question", 'the row has no question; add "question" as text')
    if not slots:
        return "\n".join(texts), (), [_image(image) for image in images]
    marks = sum(slot.image is None for slot in slots)
    if (inside := len(slots) - marks) and (marks or images):
        raise RowError(
            "marks and images",
            f'the message holds images itself ({inside}), besides {marks} marks "{MARK}" and {len(images)} images of a column; '
            "write all images in the message without marks, or all in a column",
        )
    if marks != len(images):
        raise RowError(
            "marks and images",
            f'the question has {marks} marks "{MARK}" and the row {len(images)} images; write one mark for '
            "each image, or no mark to show images first",
        )
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
    for name in ("images", "image", "image_list", "image_path"):
        if value := row.pop(name, None):
            if isinstance(value, str) and value[0] == "[" and value[-1] == "]":  # how TSV files write a list
                if re.sub(_QUOTED, "", value).strip("[], \t\n"):
                    raise RowError("bad images", f"{quote(value)} is no list of images; put each path in quotes")
                value = [match[1] for match in re.findall(_QUOTED, value)]
            return value if isinstance(value, list) else [value]
    numbered = [*itertools.takewhile(row.__contains__, (f"image_{number}" for number in itertools.count(1)))]
    values = [row.pop(name) for name in numbered]
    images = [*itertools.takewhile(bool, values)]
    if any(values[len(images) :]):
        raise RowError(
            "bad images", f'"image_{len(images) + 1}" is empty and a later one is not; number the images without a gap'
        )
    return images


def _image(image: Any) -> str | bytes:
    """Return the path of an image, or its bytes."""
    while isinstance(image, dict):
        image = next((image[key] for key in ("bytes", "path", "url", "image", "data") if image.get(key)), None)
    if isinstance(image, str):
        if re.match(r"(?!file:)\w+://", image):
            raise RowError("image by address", f"the image {quote(image, 80)} is on the web; download it and write its path")
        data = image.partition(",")[2] if image.startswith("data:") else image if _BASE64.fullmatch(image) else None
        if data is not None:
            try:
                return base64.b64decode(data)
            except ValueError as error:  # also of characters beyond ASCII
                raise RowError("image unusable", f"an image's base64 text is damaged ({error}); write it again") from None
        image = image.removeprefix("file://")
    if not isinstance(image, (str, bytes)) or not image:
        raise RowError("bad images", f"{quote(image)} is no image; write a path, bytes, base64 text or a data URI")
    return image


def images_of(row: Row) -> list[Image]:
    """Return the images of a row of any format, without reading its question.

    Raises:
        RowError: a value is no image.
    """
    return [image if isinstance(image, StoredImage) else _image(image) for image in _images(dict(row))]


def _first(row: Row, names: Sequence[str]) -> Any:
    """Take the first of these columns that is not null out of a row."""
    return next((row.pop(name) for name in names if row.get(name) is not None), None)


def _described(value: Any) -> str:
    return f"{len(value)} bytes" if isinstance(value, bytes) else str(value)
