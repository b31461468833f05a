"""Tasks from the files people bring: rows become tasks, and every row is checked before training.

A row of JSON Lines:

    {"uid": "q1", "question": "Which image has a dog?", "images": ["a.jpg", "b.png"], "answer": "Image 2",
     "answer_type": "choice", "kind": "animals"}

`docs/data.md` describes it, the other formats (`formats`) and containers (`files`).
"""

from __future__ import annotations

import itertools
import os
import pathlib
import zlib
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, overload

import numpy as np

from imagent_jax.chat import answer_markup, extract_answer
from imagent_jax.config import DataConfig, import_path
from imagent_jax.data.check import (
    Fault,
    Image,
    Progress,
    RowError,
    Size,
    StoredImage,
    TaskCheck,
    Tasks,
    Verdict,
    Verdicts,
    sized,
    tracked,
)
from imagent_jax.data.files import Source, open_sources
from imagent_jax.data.formats import FORMATS, Format, format_among, read_row, unknown_columns
from imagent_jax.scoring import score
from imagent_jax.scoring.boxes import coordinates
from imagent_jax.types import Task, quote

Sizes = list[Size | RowError]


class Row(NamedTuple):
    """A row of a source that can be read.

    Attributes:
        line: number of the row in its source, from 1.
        place: of the row, to read it again.
        form: its format.
        task: the task, with b"" for each image.
        images: its images; paths are those to open.
    """

    source: Source
    line: int
    place: int
    form: Format
    task: Task
    images: tuple[Image, ...]

    def fault(self, error: RowError) -> Fault:
        """Return the fault of the row."""
        return Fault(self.source.name, self.line, error.reason, error.kind, self.source.unit)


class FileTasks(Tasks):
    """The valid rows of files as tasks. Only their places are in memory: a row is read when its task is accessed.

    Args:
        sources: files, as when `places` were found.
        places: int64[rows, 5]: source, line, place, format, checksum of the task.
        forms: formats, as numbered in `places`.
        how: last arguments of `read_row`.

    Attributes:
        faults: omitted rows, in the order of files and rows; empty unless `skip_bad`.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        places: np.ndarray,
        forms: Sequence[Format],
        how: tuple[int | None, str],
        faults: Sequence[Fault] = (),
    ):
        self.sources, self.places, self.forms, self.how, self.faults = tuple(sources), places, forms, how, tuple(faults)
        self.stems = stems_of(sources)

    def __len__(self) -> int:
        return len(self.places)

    @overload
    def __getitem__(self, index: int) -> Task: ...
    @overload
    def __getitem__(self, index: slice) -> list[Task]: ...
    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        row = self.row(index)
        return replace(row.task, images=tuple(image_bytes(row.source, image) for image in row.images))

    def meta_of(self, index: int) -> Mapping[str, Any]:
        """See `Tasks.meta_of`."""
        return self.row(index).task.meta

    def row(self, index: int) -> Row:
        """Read a row, without the bytes of its images.

        Raises:
            ValueError: it is not the row that was checked.
        """
        number, line, place, form, checksum = self.places[index].tolist()
        source = self.sources[number]
        try:
            row = _row(source, f"{self.stems[number]}:{line}", line, place, self.forms[form], source.read(place), self.how)
            if _checksum(row.task) != checksum:
                raise ValueError("it is another row")
        except Exception as error:  # whatever a row raises that was once read
            raise ValueError(
                f"{source.name} has changed since it was checked: {source.unit} {line} cannot be read again ({error}); start the "
                "run again, which checks it again."
            ) from error
        return row


def read_tasks(
    sources: Sequence[Source],
    *,
    skip_bad: bool = False,
    check: TaskCheck | None = None,
    shuffle: int | None = None,
    answer_type: str = "",
    memory: pathlib.Path | None = None,
    progress: Progress = lambda sentence: None,
    form: Format | None = None,
) -> FileTasks:
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
    names, how, forms = ", ".join(source.name for source in sources), (shuffle, answer_type), (form,) if form else FORMATS
    content = " ".join(f"{source.name} {source.content()}" for source in sources)
    content += f" {shuffle} {answer_type} {[known[:2] for known in forms]}"
    verdicts = Verdicts(memory, content, check.fingerprint if check else "")
    if (found := verdicts.recall()) is None:
        known: dict = {}
        found = _judge(sources, forms, how, check, lambda words: progress(f"Checking {pathlib.Path(names).name}: {words}"), known)
        verdicts.remember(found, known)
    if (faults := found.faults) and not skip_bad:
        more = f" ({len(faults) - 1:,} more rows have faults)" if faults[1:] else ""
        raise ValueError(f"{faults[0]}{more}, or set data.skip_bad to leave such rows out.")
    if not len(found.index):
        first = f", the first fault: {faults[0]}" if faults else ""
        raise ValueError(f"The task file {names} has no usable row{first}; add rows with question and answer.")
    for path in found.environments:
        import_path(path, "environment of a row")  # each time: no remembered verdict knows whether it can be imported
    return FileTasks(sources, found.index, forms, how, faults)


def open_split(
    cfg: DataConfig, split: str, check: TaskCheck | None = None, progress: Progress = lambda sentence: None
) -> FileTasks:
    """Read the files of a split; see `files.open_sources` and `read_tasks`. Verdicts are remembered in `cfg.cache_dir`."""
    memory = pathlib.Path(cfg.cache_dir).expanduser() / "checked"
    return read_tasks(
        open_sources(cfg, split),
        skip_bad=cfg.skip_bad,
        check=check,
        shuffle=cfg.seed if cfg.shuffle_options else None,
        answer_type=cfg.answer_type,
        memory=memory,
        progress=progress,
    )


def image_bytes(source: Source, image: Image) -> bytes:
    """Return the file of an image of a source."""
    if isinstance(image, StoredImage):
        return source.image(image.number)  # ty: ignore[missing-attribute] - of a source that stores images
    return pathlib.Path(image).read_bytes() if isinstance(image, str) else image


def stems_of(sources: Sequence[Source]) -> list[str]:
    """Return what begins the uids of rows without one: the name of each file; where names repeat, its path below all."""
    counts = Counter(source.path.stem for source in sources)
    if max(counts.values(), default=1) == 1:
        return [source.path.stem for source in sources]
    common = os.path.commonpath([source.path.parent.absolute() for source in sources])
    return [os.path.relpath(s.path.absolute(), common) if counts[s.path.stem] > 1 else s.path.stem for s in sources]


# ---- the check --------------------------------------------------------------------------------------------------------


def checked(
    sources: Sequence[Source],
    forms: Sequence[Format],
    how: tuple[int | None, str],
    check: TaskCheck | None,
    progress: Progress,
    known: dict,
) -> Iterator[tuple[Row | Fault, Sizes]]:
    """Yield every row or its fault, in order, and the sizes of its images. Few rows and images are in memory at one time.

    Args:
        forms: formats that a row may have.
        how: last arguments of `read_row`.
        known: sizes of image files by path, see `check.sized`.
    """
    seen: dict[str, tuple[Source, int]] = {}
    total = sum(source.count() for source in sources)
    stems = zip(sources, stems_of(sources), strict=True)
    rows = itertools.chain.from_iterable(_rows(source, stem, forms, how) for source, stem in stems)
    pairs = ((row, row.images if isinstance(row, Row) else ()) for row in rows)
    for row, sizes in tracked(sized(pairs, known), total, "rows checked", progress):
        if isinstance(row, Row):
            try:
                _try_row(row, sizes, check)
                source, line = seen.setdefault(row.task.uid, (row.source, row.line))
                if (source, line) != (row.source, row.line):
                    where = f"{source.unit} {line}" + (f" of {source.name}" if source is not row.source else "")
                    reason = f"the uid {row.task.uid!r} occurs already on {where}; give every row its own uid"
                    raise RowError("repeated uid", reason)
            except RowError as error:
                row = row.fault(error)
        yield row, sizes


def _judge(
    sources: Sequence[Source],
    forms: Sequence[Format],
    how: tuple[int | None, str],
    check: TaskCheck | None,
    progress: Progress,
    known: dict,
) -> Verdict:
    """Check all rows, see `checked`."""
    index, faults, environments = array("q"), [], set()
    for row, _ in checked(sources, forms, how, check, progress, known):
        if isinstance(row, Fault):
            faults.append(row)
        else:
            index.extend((sources.index(row.source), row.line, row.place, forms.index(row.form), _checksum(row.task)))
            environments.add(row.task.environment)
    return Verdict(faults, np.array(index, np.int64).reshape(-1, 5), sorted(environments - {""}))


def _rows(source: Source, stem: str, forms: Sequence[Format], how: tuple[int | None, str]) -> Iterator[Row | Fault]:
    """Yield the rows of a source that can be read, and the faults of the others. `stem`: begins the uids of rows without one."""
    form = None
    for line, place, found in source.rows():
        try:
            if isinstance(found, RowError):
                raise found
            only = forms[0] if len(forms) == 1 else None
            if (form := format_among(forms, found) or (None if only else form)) is None:
                raise unknown_columns(found, only)
            yield _row(source, f"{stem}:{line}", line, place, form, found, how)
        except RowError as error:
            yield Fault(source.name, line, error.reason, error.kind, source.unit)


def _row(source: Source, uid: str, line: int, place: int, form: Format, found: dict, how: tuple[int | None, str]) -> Row:
    """Return a row from its columns. `uid`: of a row without one.

    Raises:
        RowError: see `read_row`; also for whatever a format's reader raises at a row that is not as it expects.
    """
    try:
        task, images = read_row(found, form, uid, *how)
    except RowError:
        raise
    except Exception as error:
        if isinstance(error, KeyError) and error.args[0] not in found:
            raise RowError("missing column", f"the row has no column {error}; add it") from error
        reason = f"the row is not one of {form.name} ({type(error).__name__}: {str(error)[:200]}); correct its columns"
        raise RowError("unreadable row", " ".join(reason.split())) from error
    folder = source.path.parent
    paths = (os.path.join(folder, os.path.expanduser(image)) if isinstance(image, str) else image for image in images)
    return Row(source, line, place, form, task, tuple(paths))


def _checksum(task: Task) -> int:
    """Return a checksum of what a policy is shown and compared with."""
    return zlib.crc32(repr((task.uid, task.shown, task.answers)).encode("utf-8", "backslashreplace"))


def _try_row(row: Row, sizes: Sizes, check: TaskCheck | None) -> None:
    """Raise RowError where a run could not use a row."""
    for size in sizes:
        if isinstance(size, RowError):
            raise RowError(size.kind, size.reason)
    for answer in row.task.answers:
        _score_itself(answer, row.task.answer_type)
    try:
        if check is not None:
            check(row.task, [size for size in sizes if not isinstance(size, RowError)])
    except RowError:
        raise
    except Exception as error:  # whatever would stop the run later
        raise RowError("unusable prompt", str(error).rstrip(".")) from error


def _score_itself(answer: str, answer_type: str) -> None:
    """Raise RowError where an answer, as a policy would write it, does not score 1 against itself."""
    said = str(coordinates(answer)[:4]) if answer_type == "point" else answer  # of several boxes, a point is in one
    try:
        right = score(extract_answer(answer_markup(said)), answer, answer_type) == 1
    except ValueError as error:
        sentence = str(error).rstrip(".")
        raise RowError("unusable answer", f"{sentence[0].lower()}{sentence[1:]}") from None
    if not right:
        raise RowError("unusable answer", f"the answer {quote(answer)} does not score 1 against itself; correct it or its type")
