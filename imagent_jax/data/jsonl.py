"""Tasks from JSON Lines files with image paths.

One object a line:

    {"uid": "q1", "question": "Which image has a dog?", "images": ["a.jpg", "b.png"], "answer": "Image 2",
     "answer_type": "choice", "kind": "animals"}

`images` are paths relative to the file's own folder, or absolute. `uid` (default: file name and line), `answer_type`
(default "exact") and `kind` are optional; any other key is kept in `Task.meta`.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import json
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import overload

from PIL import Image

from imagent_jax.config import DataConfig
from imagent_jax.types import ANSWER_TYPES, Task


@dataclasses.dataclass(frozen=True)
class Fault:
    """A row that cannot be used: the file, its line (from 1) and what is wrong, with the remedy."""

    path: str
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{self.path}, line {self.line}: {self.reason}"


class JsonlTasks(Sequence[Task]):
    """The usable rows of a file as tasks; the bytes of images are read when a task is.

    Attributes:
        faults: the rows left out, in the order of the file. Empty unless faults are skipped.
    """

    def __init__(self, rows: Sequence[tuple[Task, tuple[pathlib.Path, ...]]], faults: Sequence[Fault] = ()):
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
        task, paths = self._rows[index]
        return dataclasses.replace(task, images=tuple(path.read_bytes() for path in paths))


def read_jsonl(path: str | os.PathLike, *, skip_bad: bool = False, workers: int = 8) -> JsonlTasks:
    """Reads and checks a file: every row is parsed and every image decoded once, before anything is trained.

    Args:
        path: the JSON Lines file; blank lines are ignored.
        skip_bad: leave rows with faults out and list them in the result's `faults`.
        workers: threads that decode images.

    Returns:
        A sequence of tasks with random access.

    Raises:
        ValueError: the file is missing or has no usable row; or, unless `skip_bad`, the first fault: a line that is
            not a JSON object, a row without question, answer or images, an unknown answer type, a uid that occurred
            before, an image that is missing or does not decode.
    """
    path = pathlib.Path(path).expanduser()
    if not path.is_file():
        raise ValueError(f"The task file {path} does not exist; write it or correct data.path.")
    rows, faults, seen = [], [], {}
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        for line, parsed in _parse_lines(path):
            try:
                task, paths = _task_of(parsed, path, line)
                if task.uid in seen:
                    raise _RowError(
                        f"the uid {task.uid!r} occurs already on line {seen[task.uid]}; give every row its own uid"
                    )
                for reason in pool.map(_image_fault, paths):
                    if reason:
                        raise _RowError(reason)
            except _RowError as error:
                fault = Fault(str(path), line, str(error))
                if not skip_bad:
                    raise ValueError(f"{fault}, or set data.skip_bad to leave such rows out.") from None
                faults.append(fault)
                continue
            seen[task.uid] = line
            rows.append((task, paths))
    if not rows:
        first = f", the first fault: {faults[0]}" if faults else ""
        raise ValueError(f"The task file {path} has no usable row{first}; add rows with question, images and answer.")
    return JsonlTasks(rows, faults)


def open_split(cfg: DataConfig, split: str) -> JsonlTasks:
    """Read `<cfg.path>/<split>.jsonl`; see `read_jsonl`."""
    return read_jsonl(pathlib.Path(cfg.path).expanduser() / f"{split}.jsonl", skip_bad=cfg.skip_bad)


class _RowError(Exception):
    """What is wrong with a row, and the remedy."""


def _parse_lines(path: pathlib.Path) -> Iterator[tuple[int, bytes]]:
    with path.open("rb") as file:
        for line, text in enumerate(file, 1):
            if text.strip():
                yield line, text


def _task_of(text: bytes, path: pathlib.Path, line: int) -> tuple[Task, tuple[pathlib.Path, ...]]:
    """The task of a line, still without image bytes, and the paths of its images."""
    try:
        row = json.loads(text)
    except ValueError as error:
        raise _RowError(f"this is not JSON ({error}); write one object a line") from None
    if not isinstance(row, dict):
        raise _RowError("this is not a JSON object; write one object a line")
    question = row.pop("question", None)
    if not isinstance(question, str) or not question.strip():
        raise _RowError('the row has no question; add "question" as text')
    answer = row.pop("answer", None)
    if isinstance(answer, (int, float)) and not isinstance(answer, bool):
        answer = str(answer)
    if not isinstance(answer, str) or not answer.strip():
        raise _RowError('the row has no answer; add "answer" as text or number')
    images = row.pop("images", None)
    if not isinstance(images, list) or not images or not all(isinstance(name, str) and name for name in images):
        raise _RowError('the row has no images; add "images" as a list of one or more paths')
    answer_type = row.pop("answer_type", "exact")
    if answer_type not in ANSWER_TYPES:
        raise _RowError(f"the answer type {answer_type!r} does not exist; use one of {', '.join(ANSWER_TYPES)}")
    uid, kind = str(row.pop("uid", f"{path.stem}:{line}")), str(row.pop("kind", ""))
    task = Task(uid, question, (), answer, answer_type, kind, meta=row)
    return task, tuple(path.parent / os.path.expanduser(name) for name in images)


def _image_fault(path: pathlib.Path) -> str | None:
    """None if the file decodes completely, else what is wrong with it."""
    if not path.is_file():
        return f"the image {path} does not exist; add the file or correct the path"
    try:
        with Image.open(path) as image:
            image.load()
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError):
        return f"the image {path} does not decode; replace the file"
    return None
