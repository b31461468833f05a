"""Writes tasks to a folder of ArrayRecord files, which `files.ArrayRecord` reads with random access."""

from __future__ import annotations

import contextlib
import hashlib
import json
import pathlib
import shutil
import tempfile
from collections.abc import Generator

import grain
from array_record.python.array_record_module import ArrayRecordWriter

from imagent_jax.data.check import RowError
from imagent_jax.data.files import ArrayRecord
from imagent_jax.data.formats import to_row
from imagent_jax.data.reader import Row, Sizes, image_bytes


class Writer:
    """Writes tasks and their images, each image file once, as the bytes that it had.

    Args:
        folder: of the files, one for each split and `ArrayRecord.IMAGES`.
    """

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        self.files: dict[str, ArrayRecordWriter] = {}
        self.counts: dict[str, int] = {}
        self.known: dict[bytes | str, int] = {}  # record of an image, by content and by path

    def add(self, split: str, row: Row, sizes: Sizes) -> None:
        """Write a task that was checked, and of its images those that are new."""
        numbers = [self._image(row, image) for image in row.images]
        images = [(number, *size) for number, size in zip(numbers, sizes, strict=True) if not isinstance(size, RowError)]
        self._write(f"{split}.array_record", json.dumps(to_row(row.task) | {"images": images}).encode())

    def close(self) -> None:
        """Finish the files and read their ends.

        Raises:
            OSError: a file is not whole.
        """
        for file in self.files.values():
            file.close()
        for name, count in self.counts.items():
            with contextlib.suppress(RuntimeError):
                if len(grain.sources.ArrayRecordDataSource([str(self.folder / name)])) == count:
                    continue
            raise OSError(f"{self.folder / name} could not be written; is the disk full?")

    def _image(self, row: Row, image) -> int:
        if isinstance(image, str) and image in self.known:
            return self.known[image]
        data = image_bytes(row.source, image)
        key = hashlib.sha256(data).digest()
        if key not in self.known:
            self.known[key] = self._write(ArrayRecord.IMAGES, data)
        if isinstance(image, str):
            self.known[image] = self.known[key]
        return self.known[key]

    def _write(self, name: str, record: bytes) -> int:
        """Write a record to a file; returns its number."""
        if name not in self.files:
            kind = "uncompressed" if name == ArrayRecord.IMAGES else "zstd"
            self.files[name], self.counts[name] = ArrayRecordWriter(str(self.folder / name), f"group_size:1,{kind}"), 0
        self.files[name].write(record)
        self.counts[name] += 1
        return self.counts[name] - 1


@contextlib.contextmanager
def new_folder(out: pathlib.Path) -> Generator[pathlib.Path, None, None]:
    """Give a folder to write to. It becomes `out` at the end; after an error or an interrupt nothing is left of it.

    Raises:
        ValueError: `out` exists.
    """
    if out.exists():
        raise ValueError(f"{out} exists already; delete it or name another folder.")
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = pathlib.Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        yield folder
        folder.chmod(0o755)
        folder.rename(out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
