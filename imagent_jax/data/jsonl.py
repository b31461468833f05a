"""Tasks from JSON Lines files with image paths.

One object per line:

    {"uid": "q1", "question": "Which image has a dog?", "images": ["a.jpg", "b.png"], "answer": "Image 2",
     "answer_type": "choice", "kind": "animals"}

`images` are paths, absolute or relative to the file's folder. `uid` (default: file name and line), `answer_type` (default
"exact") and `kind` are optional, and null is the same as absent; other keys are kept in `Task.meta`.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import pathlib
from collections.abc import Sequence
from dataclasses import replace
from decimal import Decimal
from typing import Any, NamedTuple, NoReturn, overload

from imagent_jax.chat import answer_markup, extract_answer
from imagent_jax.config import DataConfig
from imagent_jax.data.check import Fault, Progress, RowError, TaskCheck, Verdicts, image_sizes, tracked
from imagent_jax.scoring import score
from imagent_jax.types import ANSWER_TYPES, Task, quote


class Row(NamedTuple):
    """A row of a file: its line (from 1), its task without image bytes, and the paths of its images."""

    line: int
    task: Task
    paths: tuple[str, ...]


class JsonlTasks(Sequence[Task]):
    """The valid rows of a file as tasks. Image bytes are read when a task is accessed.

    Attributes:
        faults: omitted rows, in file order; empty unless `skip_bad`.
    """

    def __init__(self, rows: Sequence[Row], faults: Sequence[Fault] = ()):
        self._rows = tuple(rows)
        self.faults = tuple(faults)

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Task: ...
    @overload
    def __getitem__(self, index: slice) -> list[Task]: ...
    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        row = self._rows[index]
        return replace(row.task, images=tuple(pathlib.Path(path).read_bytes() for path in row.paths))


def read_jsonl(
    path: str | os.PathLike, *, skip_bad: bool = False, check: TaskCheck | None = None,
    memory: pathlib.Path | None = None, progress: Progress = lambda sentence: None,
) -> JsonlTasks:  # fmt: skip
    """Read and check a file: every row is parsed, its answer is scored against itself, every image is decoded once.

    Args:
        path: the JSON Lines file; blank lines are ignored.
        skip_bad: omit invalid rows and list them in the result's `faults`.
        check: tries whether a run can use a task; default: not tried.
        memory: folder in which verdicts are remembered, see `Verdicts`; default: none.
        progress: shows how far the check is.

    Returns:
        A random-access sequence of tasks.

    Raises:
        ValueError: the file is missing or has no valid row; or, unless `skip_bad`, the first invalid row: not a JSON object;
            missing question, answer or images; an answer that does not score against itself; a duplicate uid; an image that
            is missing or does not decode; or what `check` refuses.
    """
    path = pathlib.Path(path).expanduser()
    if not path.is_file():
        raise ValueError(f"The task file {path} does not exist; write it or correct data.path.")
    rows, faults, content = _parse(path)
    verdicts = Verdicts(memory, f"{path} {content}", _images(rows), check.fingerprint if check else "")
    if (known := verdicts.recall()) is None:
        known = _judge(path, rows, faults, check, lambda words: progress(f"Checking {path.name}: {words}"))
        verdicts.remember(known)
    if known and not skip_bad:
        more = f" ({len(known) - 1:,} more rows have faults)" if known[1:] else ""
        raise ValueError(f"{known[0]}{more}, or set data.skip_bad to leave such rows out.")
    bad = {fault.line for fault in known}
    if not (good := [row for row in rows if row.line not in bad]):
        first = f", the first fault: {known[0]}" if known else ""
        raise ValueError(f"The task file {path} has no usable row{first}; add rows with question, images and answer.")
    return JsonlTasks(good, known)


def open_split(
    cfg: DataConfig, split: str, check: TaskCheck | None = None, progress: Progress = lambda sentence: None
) -> JsonlTasks:
    """Read `<cfg.path>/<split>.jsonl`; see `read_jsonl`. Verdicts are remembered in `cfg.cache_dir`."""
    memory = pathlib.Path(cfg.cache_dir).expanduser() / "checked"
    path = pathlib.Path(cfg.path) / f"{split}.jsonl"
    return read_jsonl(path, skip_bad=cfg.skip_bad, check=check, memory=memory, progress=progress)


# ---- the rows of a file -----------------------------------------------------------------------------------------------


def _parse(path: pathlib.Path) -> tuple[list[Row], list[Fault], str]:
    """Return the rows that can be read, the faults of the others, and a hash of the file's content."""
    rows, faults, content, names = [], [], hashlib.sha256(), {}
    with path.open("rb") as file:
        for line, text in enumerate(file, 1):
            content.update(text)
            if not text.strip():
                continue
            try:
                task, images = _task_of(text, f"{path.stem}:{line}")
            except RowError as error:
                faults.append(Fault(str(path), line, error.reason, error.kind))
                continue
            for name in images:
                if name not in names:
                    names[name] = os.path.join(path.parent, os.path.expanduser(name))
            rows.append(Row(line, task, tuple(names[name] for name in images)))
    return rows, faults, content.hexdigest()


def _images(rows: Sequence[Row]) -> list[str]:
    return sorted({path for row in rows for path in row.paths})


def _judge(
    path: pathlib.Path, rows: Sequence[Row], faults: Sequence[Fault], check: TaskCheck | None, progress: Progress
) -> list[Fault]:
    """Return all faults in file order: those of parsing, and of images, prompts and repeated uids."""
    found, seen, sizes = list(faults), {}, image_sizes(_images(rows), progress)
    for row in tracked(rows, len(rows), "rows checked", progress):
        try:
            _try_row(row, sizes, check)
            if (uid := row.task.uid) in seen:
                raise RowError("repeated uid", f"the uid {uid!r} occurs already on line {seen[uid]}; give every row its own uid")
        except RowError as error:
            found.append(Fault(str(path), row.line, error.reason, error.kind))
        else:
            seen[uid] = row.line  # the uid of a row left out is free
    return sorted(found, key=lambda fault: fault.line)


def _try_row(row: Row, sizes: dict[str, tuple[int, int] | RowError], check: TaskCheck | None) -> None:
    for image in row.paths:
        if isinstance(fault := sizes[image], RowError):
            raise RowError(fault.kind, fault.reason)
    _score_itself(row.task.answer, row.task.answer_type)
    try:
        if check is not None:
            check(row.task, [sizes[image] for image in row.paths])
    except Exception as error:  # whatever would stop the run later
        raise RowError("unusable prompt", str(error).rstrip(".")) from error


def _task_of(text: bytes, default_uid: str) -> tuple[Task, list[str]]:
    """Return the task of a line, without image bytes, and the names of its images."""
    try:
        row = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise RowError("not JSON", f"this is not JSON ({error}); write one object a line") from None
    if not isinstance(row, dict):
        raise RowError("not JSON", "this is not a JSON object; write one object a line")
    if b"\\u" in text or b"\xed" in text:  # else no half of a surrogate pair can be in it
        try:
            json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = error.object[error.start : error.end].encode("ascii", "backslashreplace").decode()
            raise RowError("broken text", f"the row has half a character ({half}); write whole characters") from None
    question = row.pop("question", None)
    if not isinstance(question, str) or not question.strip():
        raise RowError("no question", 'the row has no question; add "question" as text')
    answer = _plain(row.pop("answer", None))
    if answer is None or not answer.strip():
        raise RowError("no answer", 'the row has no answer; add "answer" as text or number')
    images = row.pop("images", None)
    if not isinstance(images, list) or not images or not all(isinstance(name, str) and name for name in images):
        raise RowError("no images", 'the row has no images; add "images" as a list of one or more paths')
    answer_type = _optional(row, "answer_type", "exact")
    if answer_type not in ANSWER_TYPES:
        raise RowError(
            "unknown answer type", f"the answer type {answer_type!r} does not exist; use one of {', '.join(ANSWER_TYPES)}"
        )
    uid, kind = _optional(row, "uid", default_uid), _optional(row, "kind", "")
    return Task(uid, question, (), answer, answer_type, kind, meta=row), images


def _plain(value: Any) -> str | None:
    """Return text, or a number as decimal digits without an exponent; None for anything else."""
    if isinstance(value, float):
        return format(Decimal(repr(value)), "f") if math.isfinite(value) else None
    return str(value) if isinstance(value, (str, int)) and not isinstance(value, bool) else None


def _optional(row: dict[str, Any], name: str, default: str) -> str:
    """Take an optional field out of a row; null is the same as absent."""
    if (value := row.pop(name, None)) is None:
        return default
    if (text := _plain(value)) is None:
        raise RowError(f"bad {name}", f'"{name}" is {quote(value)}; write text, or leave it out')
    return text


def _score_itself(answer: str, answer_type: str) -> None:
    """Raise RowError where an answer, as a policy would write it, does not score 1 against itself."""
    try:
        right = score(extract_answer(answer_markup(answer)), answer, answer_type) == 1
    except ValueError as error:
        sentence = str(error).rstrip(".")
        raise RowError("unusable answer", f"{sentence[0].lower()}{sentence[1:]}") from None
    if not right:
        raise RowError("unusable answer", f"the answer {quote(answer)} does not score 1 against itself; correct it or its type")


def _refuse_constant(word: str) -> NoReturn:
    raise ValueError(f"{word} is no JSON number")
