"""Tasks from the files people bring: rows become tasks, and every row is checked before training.

A row of JSON Lines:

    {"uid": "q1", "question": "Which image has a dog?", "images": ["a.jpg", "b.png"], "answer": "Image 2",
     "answer_type": "choice", "kind": "animals"}

`docs/data.md` describes it, the other formats (`formats`) and containers (`files`).
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, overload

from imagent_jax.chat import answer_markup, extract_answer
from imagent_jax.config import DataConfig, import_path
from imagent_jax.data.check import Fault, Key, Progress, RowError, Size, TaskCheck, Tasks, Verdicts, image_sizes, tracked
from imagent_jax.data.files import Source, open_sources
from imagent_jax.data.formats import Format, format_among, format_of, read_row, unknown_columns
from imagent_jax.scoring import score
from imagent_jax.types import Task, quote


class Row(NamedTuple):
    """A row of a source.

    Attributes:
        line: number of the row in its source, from 1.
        task: the task, with b"" for each image.
        paths: paths of its images; None for one inside the source.
        form, place: of the row, to read images inside the source again.
    """

    source: Source
    line: int
    task: Task
    paths: tuple[str | None, ...]
    form: Format
    place: Any

    def image_keys(self) -> tuple[Key, ...]:
        """Return a key of each image: its path, or where it is inside a source."""
        return tuple(path or (self.source.name, self.line, i) for i, path in enumerate(self.paths))

    def images(self) -> tuple[bytes, ...]:
        """Read the images."""
        read = read_row(self.source.read(self.place), self.form, "")[1] if None in self.paths else ()
        inside = (image for image in read if isinstance(image, bytes))
        return tuple(pathlib.Path(path).read_bytes() if path else next(inside) for path in self.paths)


class FileTasks(Tasks):
    """The valid rows of files as tasks. Image bytes are read when a task is accessed.

    Attributes:
        rows: the rows, in order.
        faults: omitted rows, in the order of files and rows; empty unless `skip_bad`.
    """

    def __init__(self, rows: Sequence[Row], faults: Sequence[Fault] = ()):
        self.rows = tuple(rows)
        self.faults = tuple(faults)

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> Task: ...
    @overload
    def __getitem__(self, index: slice) -> list[Task]: ...
    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        row = self.rows[index]
        return replace(row.task, images=row.images())


def read_tasks(
    sources: Sequence[Source], *, skip_bad: bool = False, check: TaskCheck | None = None, shuffle: int | None = None,
    answer_type: str = "", memory: pathlib.Path | None = None, progress: Progress = lambda sentence: None,
    form: Format | None = None,
) -> FileTasks:  # fmt: skip
    """Read and check rows: every row becomes a task, its answers are scored against themselves, every image is decoded once.

    Args:
        sources: see `files.open_file`.
        skip_bad: omit invalid rows and list them in the result's `faults`.
        check: tries whether a run can use a task; default: not tried.
        shuffle: seed of the order of options; None: as in the row.
        answer_type: of rows that name none, see `formats.read_row`.
        memory: folder in which verdicts are remembered, see `Verdicts`; default: none.
        progress: shows how far the check is.
        form: format of all rows; None: by their columns.

    Returns:
        A random-access sequence of tasks.

    Raises:
        ValueError: there is no valid row; or, unless `skip_bad`, the first invalid row: unreadable; of no known format; missing
            question or answer; an answer that does not score against itself; a duplicate uid; an image that is missing or does
            not decode; or what `check` refuses.
    """
    names = ", ".join(source.name for source in sources)
    rows, faults = [], []
    for source in sources:
        _parse(source, form, (shuffle, answer_type), rows, faults)
    content = " ".join(f"{source.name} {source.content()}" for source in sources)
    paths = sorted({path for row in rows for path in row.paths if path})
    verdicts = Verdicts(
        memory, f"{content} {shuffle} {answer_type} {form and form.name}", paths, check.fingerprint if check else ""
    )
    if (known := verdicts.recall()) is None:
        known = _judge(sources, rows, faults, check, lambda words: progress(f"Checking {pathlib.Path(names).name}: {words}"))
        verdicts.remember(known)
    if known and not skip_bad:
        more = f" ({len(known) - 1:,} more rows have faults)" if known[1:] else ""
        raise ValueError(f"{known[0]}{more}, or set data.skip_bad to leave such rows out.")
    bad = {(fault.path, fault.line) for fault in known}
    if not (good := [row for row in rows if (row.source.name, row.line) not in bad]):
        first = f", the first fault: {known[0]}" if known else ""
        raise ValueError(f"The task file {names} has no usable row{first}; add rows with question and answer.")
    return FileTasks(good, known)


def open_split(
    cfg: DataConfig, split: str, check: TaskCheck | None = None, progress: Progress = lambda sentence: None
) -> FileTasks:
    """Read the files of a split; see `files.open_sources` and `read_tasks`. Verdicts are remembered in `cfg.cache_dir`."""
    memory = pathlib.Path(cfg.cache_dir).expanduser() / "checked"
    tasks = read_tasks(
        open_sources(cfg, split), skip_bad=cfg.skip_bad, check=check, shuffle=cfg.seed if cfg.shuffle_options else None,
        answer_type=cfg.answer_type, memory=memory, progress=progress,
    )  # fmt: skip
    for path in sorted({row.task.environment for row in tasks.rows} - {""}):
        import_path(path, "environment of a row")  # each time: no remembered verdict knows whether it can be imported
    return tasks


# ---- the rows of a source ---------------------------------------------------------------------------------------------


def _parse(source: Source, fixed: Format | None, how: tuple[int | None, str], rows: list[Row], faults: list[Fault]) -> None:
    """Append the rows that can be read, and the faults of the others. `how`: the last arguments of `read_row`."""
    form, names = None, {}
    for line, place, found in source.rows():
        try:
            if isinstance(found, RowError):
                raise found
            if (form := format_among([fixed], found) if fixed else format_of(found) or form) is None:
                raise unknown_columns(found, fixed)
            task, images = read_row(found, form, f"{source.path.stem}:{line}", *how)
        except RowError as error:
            faults.append(Fault(source.name, line, error.reason, error.kind, source.unit))
            continue
        for name in images:
            if isinstance(name, str) and name not in names:
                names[name] = os.path.join(source.path.parent, os.path.expanduser(name))
        paths = tuple(names[image] if isinstance(image, str) else None for image in images)
        rows.append(Row(source, line, task, paths, form, place if None in paths else None))


def _pictures(sources: Sequence[Source], rows: Sequence[Row]) -> Iterator[tuple[Key, str | bytes]]:
    """Yield every image once: its key, and its path or bytes. Sources are read from the beginning to the end."""
    yield from ((path, path) for path in sorted({path for row in rows for path in row.paths if path}))
    inside = {(row.source.name, row.line): row for row in rows if None in row.paths}
    for source in sources:
        if any(name == source.name for name, _ in inside):
            for line, _, found in source.rows():
                if (row := inside.get((source.name, line))) and not isinstance(found, RowError):
                    images = read_row(found, row.form, "")[1]
                    yield from ((key, i) for key, i in zip(row.image_keys(), images, strict=True) if isinstance(i, bytes))


def _judge(
    sources: Sequence[Source], rows: Sequence[Row], faults: Sequence[Fault], check: TaskCheck | None, progress: Progress
) -> list[Fault]:
    """Return all faults in the order of rows: those of parsing, and of images, prompts and repeated uids."""
    total = len({key for row in rows for key in row.image_keys()})
    found, seen, sizes = list(faults), {}, image_sizes(_pictures(sources, rows), total, progress)
    for row in tracked(rows, len(rows), "rows checked", progress):
        try:
            _try_row(row, [sizes[key] for key in row.image_keys()], check)
            if (first := seen.setdefault(row.task.uid, row)) is not row:
                where = f"{first.source.unit} {first.line}" + (
                    f" of {first.source.name}" if first.source is not row.source else ""
                )
                reason = f"the uid {row.task.uid!r} occurs already on {where}; give every row its own uid"
                raise RowError("repeated uid", reason)
        except RowError as error:
            found.append(Fault(row.source.name, row.line, error.reason, error.kind, row.source.unit))
    order = {source.name: i for i, source in enumerate(sources)}
    return sorted(found, key=lambda fault: (order[fault.path], fault.line))


def _try_row(row: Row, sizes: Sequence[Size | RowError], check: TaskCheck | None) -> None:
    for size in sizes:
        if isinstance(size, RowError):
            raise RowError(size.kind, size.reason)
    for answer in row.task.answers:
        _score_itself(answer, row.task.answer_type)
    try:
        if check is not None:
            check(row.task, [size for size in sizes if not isinstance(size, RowError)])
    except Exception as error:  # whatever would stop the run later
        raise RowError("unusable prompt", str(error).rstrip(".")) from error


def _score_itself(answer: str, answer_type: str) -> None:
    """Raise RowError where an answer, as a policy would write it, does not score 1 against itself."""
    try:
        right = score(extract_answer(answer_markup(answer)), answer, answer_type) == 1
    except ValueError as error:
        sentence = str(error).rstrip(".")
        raise RowError("unusable answer", f"{sentence[0].lower()}{sentence[1:]}") from None
    if not right:
        raise RowError("unusable answer", f"the answer {quote(answer)} does not score 1 against itself; correct it or its type")
