"""Containers of rows: JSON Lines, JSON, TSV, Parquet, ArrayRecord, and data sets of the Hugging Face hub.

Rows are read one at a time: all in order, or one again by its place, a number that `rows` gives.
"""

from __future__ import annotations

import contextlib
import csv
import functools
import glob
import hashlib
import importlib
import json
import os
import pathlib
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any, NoReturn, Protocol

import grain

from imagent_jax.config import DataConfig
from imagent_jax.data.check import RowError, StoredImage, stamp
from imagent_jax.types import quote

BATCH = 16
"""Rows of a Parquet file or a hub data set in memory at one time."""


class NoSplit(ValueError):
    """A data set has no such split."""


class Source(Protocol):
    """Rows with random access.

    Attributes:
        name: path or id, for messages.
        unit: what `rows` counts: "line" or "row".
        path: of the file; relative paths of images begin at its folder.
    """

    path: pathlib.Path
    name: str
    unit: str

    def content(self) -> str:
        """Return a checksum of the content."""

    def count(self) -> int:
        """Return about how many rows there are, not fewer, without reading them."""

    def rows(self) -> Iterator[tuple[int, int, dict[str, Any] | RowError]]:
        """Yield the number of each row (from 1), its place for `read`, and the row or why it cannot be read."""

    def read(self, place: int) -> dict[str, Any]:
        """Return one row again."""


class _File:
    unit = "line"

    def __init__(self, path: pathlib.Path):
        self.path, self.name = path, str(path)

    def content(self) -> str:
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def count(self) -> int:
        with self.path.open("rb") as file:
            return sum(1 for _ in file)


class JsonLines(_File):
    """One JSON object a line; blank lines are ignored."""

    def rows(self):
        with self.path.open("rb") as file:
            place = 0
            for line, text in enumerate(file, 1):
                if text.strip():
                    yield line, place, _parsed(text)
                place += len(text)

    def read(self, place: int) -> dict[str, Any]:
        with self.path.open("rb") as file:
            file.seek(place)
            return json.loads(file.readline())


class JsonList(_File):
    """A JSON list of objects. It is read whole, and kept."""

    unit = "row"

    @functools.cached_property
    def _list(self) -> list[Any]:
        try:
            rows, search = _loaded(self.path.read_bytes())
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{self.name} is not JSON ({error}); write a list of objects.") from None
        if not isinstance(rows, list):
            raise ValueError(f"{self.name} holds no list; write a list of objects, or one object a line in a .jsonl file.")
        return [_checked(row, search) for row in rows]

    def count(self) -> int:
        return len(self._list)

    def rows(self):
        yield from ((place + 1, place, row) for place, row in enumerate(self._list))

    def read(self, place: int) -> dict[str, Any]:
        return self._list[place]


class Tsv(_File):
    """Tab-separated cells under a header, quoted as pandas does. A blank cell is absent. White space around a name is left out.

    As in VLMEvalKit, `image` may be the `index` of an earlier row, which has the image.
    """

    def rows(self):
        places: dict[str, int] = {}  # of the rows that have their image, by index
        image = self._header.index("image") if "image" in self._header else -1
        with self.path.open("rb") as file:
            cells, before = self._reader(file), 0
            next(cells, None)
            while True:
                line, place = before + cells.line_num + 1, file.tell()
                try:
                    row = self._whole(next(cells, None))
                except csv.Error as error:
                    yield line, place, RowError("not TSV", f"the row is not TSV ({error}); mend its quotes and line breaks")
                    file.seek(place)
                    file.readline()
                    cells, before = self._reader(file), line  # an open quote took the lines after it: they are read again
                    continue
                if row is None:
                    self.__dict__["_places"] = places
                    return
                if row:
                    found = self._row(row, places)
                    if isinstance(found, dict) and len(row[image] if "image" in found else "") > 64:
                        places.setdefault(found.get("index", ""), place)
                    yield line, place, found

    def read(self, place: int) -> dict[str, Any]:
        return _found(self._row(self._cells(place), None))

    def _cells(self, place: int) -> list[str]:
        with self.path.open("rb") as file:
            file.seek(place)
            return next(self._reader(file), [])

    @functools.cached_property
    def _header(self) -> Sequence[str]:
        try:
            names = [name.lstrip("\ufeff").strip() for name in self._cells(0)]
            "".join(names).encode()
        except csv.Error as error:
            raise ValueError(f"The header of {self.name} is not TSV ({error}); mend its quotes and line breaks.") from None
        except UnicodeEncodeError:
            raise ValueError(f"The header of {self.name} is not UTF-8; write the file in UTF-8.") from None
        return _distinct(names, self.name)

    @functools.cached_property
    def _places(self) -> dict[str, int]:
        for _ in self.rows():  # sets it at its end
            pass
        return self.__dict__["_places"]

    def _whole(self, row: list[str] | None) -> list[str] | None:
        """Return the cells of a row, or raise csv.Error where a quote that was left open took the row after it."""
        rest = (line for cell in row or () for line in cell.split("\n")[1:])
        if any(line.count("\t") >= len(self._header) - 1 > 0 for line in rest):
            raise csv.Error("a quoted cell holds a whole row")
        return row

    def _reader(self, file):
        csv.field_size_limit(2**31 - 1)  # a cell may hold an image
        return csv.reader((line.decode("utf-8", "surrogateescape") for line in file), delimiter="\t", strict=True)

    def _row(self, cells: list[str], places: dict[str, int] | None) -> dict[str, Any] | RowError:
        """Return the row of some cells. `places`: of images of earlier rows; None: of all rows, read where one is asked for."""
        if len(cells) != len(self._header):
            return RowError("not TSV", f"the row has {len(cells)} cells and the header {len(self._header)}; mend the row")
        row = {name: cell for name, cell in zip(self._header, cells, strict=True) if cell.strip()}
        try:
            "".join(row.values()).encode()
        except UnicodeEncodeError:
            return RowError("broken text", "the row is not UTF-8; write the file in UTF-8")
        if 0 < len(image := row.get("image", "")) <= 64:
            place = (self._places if places is None else places).get(image)
            if place is not None:
                row["image"] = self._cells(place)[self._header.index("image")]
        return row


class Parquet(_File):
    """A Parquet file. A row is found by reading its row group from the beginning, a few rows at a time."""

    unit = "row"

    def count(self) -> int:
        with self._open() as file:
            return file.metadata.num_rows

    def rows(self):
        number = 0
        with self._open() as file:
            for group in range(file.num_row_groups):
                for batch in self._batches(file, group):
                    for row in _listed(batch):
                        yield number + 1, number, row
                        number += 1

    def read(self, place: int) -> dict[str, Any]:
        with self._open() as file:
            for group in range(file.num_row_groups):
                if place < (rows := file.metadata.row_group(group).num_rows):
                    break
                place -= rows
            for batch in self._batches(file, group):
                if place < len(batch):
                    return _found(_listed(batch.slice(place, 1))[0])
                place -= len(batch)
        raise IndexError(f"{self.name} has no such row")

    def _batches(self, file, group: int) -> Iterator[Any]:
        """Yield a row group, a few rows at a time.

        Raises:
            ValueError: the file is damaged there.
        """
        try:
            yield from file.iter_batches(BATCH, row_groups=[group])
        except (ValueError, OSError) as error:
            where, reason = f"Row group {group + 1} of {file.num_row_groups} of {self.name}", " ".join(str(error).split())
            raise ValueError(f"{where} cannot be read ({reason}); write it again.") from error

    def _open(self):
        parquet = _extra("pyarrow.parquet")
        try:
            file = parquet.ParquetFile(self.path, memory_map=True, pre_buffer=False)
        except (ValueError, OSError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"The Parquet file {self.name} cannot be read ({reason}); write it again.") from error
        _distinct(file.schema_arrow.names, self.name)
        return file


class ArrayRecord(_File):
    """Tasks that `imagent data` wrote, with random access. Their images are the records of the file `IMAGES` beside it.

    A record is JSON: the fields of a task, and of each image the number of its record, height and width.
    """

    unit = "row"
    IMAGES = "images.array_record"

    def content(self) -> str:
        return f"{super().content()} {stamp(self.path.with_name(self.IMAGES))}"

    def count(self) -> int:
        return len(self._tasks)

    def rows(self):
        for first in range(0, len(self._tasks), 256):
            part = range(first, min(first + 256, len(self._tasks)))
            for place, record in zip(part, self._tasks.__getitems__(part), strict=True):
                yield place + 1, place, self._row(record)

    def read(self, place: int) -> dict[str, Any]:
        return self._row(self._tasks[place])

    def image(self, number: int) -> bytes:
        """Return an image file."""
        return self._images[number]

    def _row(self, record: bytes) -> dict[str, Any]:
        try:
            row = json.loads(record)
            return row | {"images": [StoredImage(number, (height, width)) for number, height, width in row["images"]]}
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{self.name} holds no tasks that `imagent data` wrote; name the folder it wrote.") from error

    @functools.cached_property
    def _tasks(self) -> grain.sources.ArrayRecordDataSource:
        return _records(self.path)

    @functools.cached_property
    def _images(self) -> grain.sources.ArrayRecordDataSource:
        return _records(self.path.with_name(self.IMAGES))


def _records(path: pathlib.Path) -> grain.sources.ArrayRecordDataSource:
    try:
        return grain.sources.ArrayRecordDataSource([str(path)])
    except (RuntimeError, OSError, ValueError) as error:
        raise ValueError(
            f"The ArrayRecord file {path} cannot be read ({' '.join(str(error).split())}); convert the data again."
        ) from error


class HubSplit:
    """A split of a data set on the Hugging Face hub, or of one that `datasets` saved to a folder."""

    unit = "row"

    def __init__(self, name: str, split: str, config: str = ""):
        self.name = f"{name} ({f'{config}, ' if config else ''}{split})"
        datasets = _extra("datasets")
        try:
            which = [config] if config else []
            saved = (pathlib.Path(name) / "dataset_dict.json").is_file()
            data = datasets.load_from_disk(name)[split] if saved else datasets.load_dataset(name, *which, split=split)
        except Exception as error:  # whatever the hub or a file of it raises
            reason = " ".join(str(error).split())
            kind = NoSplit if isinstance(error, KeyError) or "Unknown split" in reason else ValueError
            raise kind(f"There is no file or folder {name}, and no data set {self.name} ({reason}).") from error
        self.path = pathlib.Path(name) / f"{f'{config}-' if config else ''}{split}"
        self._hash, self._data = data._fingerprint, data.with_format("arrow")

    def content(self) -> str:
        return self._hash

    def count(self) -> int:
        return len(self._data)

    def rows(self):
        number = 0
        for batch in self._data.iter(BATCH):
            for row in _listed(batch):
                yield number + 1, number, row
                number += 1

    def read(self, place: int) -> dict[str, Any]:
        return _found(_listed(self._data[place : place + 1])[0])


CONTAINERS = {".jsonl": JsonLines, ".json": JsonList, ".parquet": Parquet, ".tsv": Tsv, ".array_record": ArrayRecord}


def open_file(path: str | os.PathLike) -> Source:
    """Return the rows of a file.

    Raises:
        ValueError: there is no such file, or its name ends in none of `CONTAINERS`.
    """
    path = pathlib.Path(path).expanduser()
    if not path.is_file():
        raise ValueError(f"The task file {path} does not exist; write it or correct data.path.")
    if path.suffix not in CONTAINERS:
        raise ValueError(f"The task file {path} ends in {path.suffix!r}; use one of {', '.join(CONTAINERS)}.")
    return CONTAINERS[path.suffix](path)


def open_sources(cfg: DataConfig, split: str) -> list[Source]:
    """Return the files of a split: of a folder, those named `<split>.*` or `<split>-*.*`, also in its folder `data`; else the
    file, the files of a glob pattern, or the split of a hub data set.

    Raises:
        NoSplit: the data set has no such split.
        ValueError: there is no such file, folder or data set.
    """
    name = os.path.expanduser(cfg.test_path if split == "test" and cfg.test_path else cfg.path)
    if os.path.isfile(os.path.join(name, "dataset_dict.json")):
        return [HubSplit(name, split)]
    if os.path.isdir(name):
        return [open_file(path) for path in _files_of(pathlib.Path(name), split)]
    found = [name] if os.path.isfile(name) else sorted(glob.glob(name, recursive=True))
    if not found and re.fullmatch(r"[\w.-]+/[\w.-]+", name) and os.path.splitext(name)[1] not in CONTAINERS:
        return [HubSplit(name, split)]
    if split == "test" and not cfg.test_path:
        raise NoSplit(
            f"data.path {cfg.path} names training tasks only; set data.test_path to held-out tasks, or eval.tasks and eval.every "
            "to 0 to evaluate nothing."
        )
    return [open_file(path) for path in found or [name]]


def _files_of(folder: pathlib.Path, split: str) -> list[pathlib.Path]:
    places = [path for place in (folder, folder / "data") if place.is_dir() for path in place.iterdir()]
    found = sorted(path for path in places if path.suffix in CONTAINERS and re.match(rf"{split}[.-]", path.name))
    kinds = {path.suffix for path in found}
    if len(kinds) == 1:
        return found
    if kinds:
        raise ValueError(f"{folder} has {' and '.join(sorted(kinds))} files of the {split} split; name one file in data.path.")
    raise NoSplit(f"{folder} has no {split} split; write {split}.jsonl (or {', '.join(list(CONTAINERS)[1:])}) there.")


def _distinct(names: Sequence[str], file: str) -> Sequence[str]:
    """Return the names of columns, or raise ValueError where two columns have one name. Blank ones are no names."""
    name, count = Counter(filter(None, names)).most_common(1)[0] if any(names) else ("", 1)
    if count > 1:
        raise ValueError(f"{file} has {count} columns named {quote(name, 80)}; remove or rename all but one.")
    return names


def _extra(module: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise ValueError(f'{module} is not installed; run pip install "imagent-jax[data]".') from None


def _listed(table: Any) -> list[dict[str, Any] | RowError]:
    """Return the rows of an Arrow table or batch, each or why one of its values cannot be read."""
    try:
        return table.to_pylist()
    except Exception as error:  # text that is not UTF-8, a date after 9999: pyarrow and Python raise many kinds
        if len(table) > 1:
            return [row for place in range(len(table)) for row in _listed(table.slice(place, 1))]
        column = next((name for name in table.column_names if not _readable(table[name])), "")
        reason = " ".join(str(error).split())[:200]
        return [RowError("unreadable value", f"the value of {quote(column)} cannot be read ({reason}); mend or remove it")]


def _readable(column: Any) -> bool:
    with contextlib.suppress(Exception):
        column.to_pylist()
        return True
    return False


def _found(row: dict[str, Any] | RowError) -> dict[str, Any]:
    """Return a row, or raise why it cannot be read."""
    if isinstance(row, RowError):
        raise row
    return row


def _parsed(text: bytes) -> dict[str, Any] | RowError:
    try:
        row, search = _loaded(text)
    except (ValueError, RecursionError) as error:
        return RowError("not JSON", f"this is not JSON ({error}); write one object a line")
    return _checked(row, search)


def _loaded(text: bytes) -> tuple[Any, bool]:
    """Return what JSON text holds, and whether a fault that `_checked` searches for can be in it.

    An error stands in the place of an object that has a key twice.
    """
    errors = []

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any] | RowError:
        found = dict(pairs)
        if len(found) == len(pairs):
            return found
        [(key, _)] = Counter(key for key, _ in pairs).most_common(1)
        errors.append(RowError("repeated key", f"an object of the row has the key {quote(key)} twice; keep one of them"))
        return errors[-1]

    value = json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=unique)
    return value, bool(errors) or b"\\u" in text or b"\xed" in text  # half of a surrogate pair is written as one of these


def _checked(row: Any, search: bool) -> dict[str, Any] | RowError:
    """Return a row of JSON, or why it is none. `search`: see `_loaded`."""
    if search:
        try:
            json.dumps(row, ensure_ascii=False, default=_raise).encode()
        except RowError as error:
            return error
        except UnicodeEncodeError as error:
            half = error.object[error.start : error.end].encode("ascii", "backslashreplace").decode()
            return RowError("broken text", f"the row has half a character ({half}); write whole characters")
    if not isinstance(row, dict):
        return RowError("not JSON", "this is not a JSON object; write one object a line")
    return row


def _raise(error: RowError) -> NoReturn:
    raise error


def _refuse_constant(word: str) -> NoReturn:
    raise ValueError(f"{word} is no JSON number")
