"""Tasks from JSON Lines files with image paths.

One object per line:

    {"uid": "q1", "question": "Which image has a dog?", "images": ["a.jpg", "b.png"], "answer": "Image 2",
     "answer_type": "choice", "kind": "animals"}

`images` are paths, absolute or relative to the file's folder. `uid` (default: file name and line), `answer_type` (default
"exact") and `kind` are optional; other keys are kept in `Task.meta`.
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
    """An invalid row: file, line (from 1), and the reason with a remedy."""

    path: str
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{self.path}, line {self.line}: {self.reason}"


class JsonlTasks(Sequence[Task]):
    """The valid rows of a file as tasks. Image bytes are read when a task is accessed.

    Attributes:
        faults: omitted rows, in file order; empty unless `skip_bad`.
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
    """Read and check a file: every row is parsed and every image is decoded once.

    Args:
        path: the JSON Lines file; blank lines are ignored.
        skip_bad: omit invalid rows and list them in the result's `faults`.
        workers: threads that decode images.

    Returns:
        A random-access sequence of tasks.

    Raises:
        ValueError: the file is missing or has no valid row; or, unless `skip_bad`, the first invalid row: not a JSON object,
            missing question, answer or images, unknown answer type, duplicate uid, or an image that is missing or does not
            decode.
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
                    raise _RowError(f"the uid {task.uid!r} occurs already on line {seen[task.uid]}; give every row its own uid")
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
    """Reason why a row is invalid, with a remedy."""


def _parse_lines(path: pathlib.Path) -> Iterator[tuple[int, bytes]]:
    with path.open("rb") as file:
        for line, text in enumerate(file, 1):
            if text.strip():
                yield line, text


def _task_of(text: bytes, path: pathlib.Path, line: int) -> tuple[Task, tuple[pathlib.Path, ...]]:
    """Return the task of a line, without image bytes, and the paths of its images."""
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
    """Return None if the file decodes completely, else the reason."""
    if not path.is_file():
        return f"the image {path} does not exist; add the file or correct the path"
    try:
        with Image.open(path) as image:
            image.load()
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError):
        return f"the image {path} does not decode; replace the file"
    return None
