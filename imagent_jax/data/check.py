"""Checks of a task file before training: every image is decoded once, every prompt is tried, and the verdict is remembered."""

import contextlib
import hashlib
import json
import os
import pathlib
import zipfile
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import PIL

from imagent_jax.images.decode import read_image
from imagent_jax.types import Task

Progress = Callable[[str], None]
"""Shows a sentence about work in progress; called up to a hundred times for each part of the work."""
Size = tuple[int, int]
"""(height, width) of an image in pixels."""
T = TypeVar("T")
VERSION = 6
"""Of the checks here and in `reader`; remembered verdicts of another version do not count."""


class StoredImage(NamedTuple):
    """An image in an ArrayRecord file, decoded when it was written: the number of its record, and its size."""

    number: int
    size: Size


Image = str | bytes | StoredImage
"""An image of a row: a path, the bytes of an image file, or its place in an ArrayRecord file."""


@dataclass(frozen=True)
class Fault:
    """An invalid row: file, line (from 1), the reason with a remedy, the kind of reason in a few words, what `line` counts."""

    path: str
    line: int
    reason: str
    kind: str
    unit: str = "line"

    def __str__(self) -> str:
        return f"{self.path}, {self.unit} {self.line}: {self.reason}"


class RowError(Exception):
    """Why a row is invalid: the kind in a few words, and the reason with a remedy."""

    def __init__(self, kind: str, reason: str):
        super().__init__(kind, reason)
        self.kind, self.reason = kind, reason


class TaskCheck(Protocol):
    """Tries whether a run can use a task, given the (height, width) of its images; raises where it cannot.

    `fingerprint` names everything on which that depends besides the task, so that a verdict can be remembered.
    """

    fingerprint: str

    def __call__(self, task: Task, sizes: Sequence[tuple[int, int]]) -> None: ...


class Tasks(Sequence[Task]):
    """Tasks with random access. `faults` are the omitted rows."""

    faults: Sequence[Fault] = ()

    def meta_of(self, index: int) -> Mapping[str, Any]:
        """Return the `meta` of a task whose row is cheap to read without its images; of others nothing."""
        return {}


def left_out(tasks: Tasks) -> str:
    """Return a sentence about the rows that are left out of `tasks`: how many, why, and the first; "" if there are none."""
    if not (faults := tasks.faults):
        return ""
    counts = ", ".join(f"{n} {kind}" for kind, n in Counter(fault.kind for fault in faults).most_common())
    names, rows = [*dict.fromkeys(pathlib.Path(fault.path).name for fault in faults)], len(tasks) + len(faults)
    where = ", ".join([*names[:3], *["..."] * (len(names) > 3)])
    return f"{where}: {len(faults):,} of {rows:,} rows are left out ({counts}). The first: {faults[0]}."


def sized(
    items: Iterable[tuple[T, Sequence[Image]]], known: dict[str, Size | RowError | Future]
) -> Iterator[tuple[T, list[Size | RowError]]]:
    """Yield items with the sizes of their images, or why one cannot be used. Images are decoded ahead, on all cores.

    Args:
        items: each with its images. They are read ahead until four images wait for each core.
        known: sizes of image files by path, to which those of the items are added. A file is decoded once.
    """
    cores, waiting, ahead = os.cpu_count() or 1, deque(), 0
    pool = ThreadPoolExecutor(cores)

    def ask(image: Image) -> Size | RowError | Future:
        if isinstance(image, StoredImage):
            return image.size
        if isinstance(image, bytes):
            return pool.submit(_size, image)
        return known.get(image) or known.setdefault(image, pool.submit(_size, image))

    def first() -> tuple[T, list[Size | RowError]]:
        item, images, sizes = waiting.popleft()
        sizes = [size.result() if isinstance(size, Future) else size for size in sizes]
        known.update((image, size) for image, size in zip(images, sizes, strict=True) if isinstance(image, str))
        return item, sizes

    try:
        for item, images in items:
            waiting.append((item, images, [ask(image) for image in images]))
            ahead += len(images)
            while ahead > 4 * cores or len(waiting) > 1000:
                ahead -= len(waiting[0][1])
                yield first()
        while waiting:
            yield first()
    finally:
        pool.shutdown(cancel_futures=True)


def _size(image: str | bytes) -> Size | RowError:
    name = f"the image {image[:1000]}" if isinstance(image, str) else "an image inside the row"
    try:
        pixels = read_image(pathlib.Path(image).read_bytes() if isinstance(image, str) else image)
    except FileNotFoundError:
        return RowError("image missing", f"{name} does not exist; add the file or correct the path")
    except (OSError, ValueError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or error
        return RowError("image unusable", f"{name} cannot be used ({reason}); replace the file")
    return pixels.height, pixels.width


def tracked(items: Iterable[T], total: int, words: str, progress: Progress) -> Iterator[T]:
    """Yield items, and show after every hundredth part how many there were."""
    for count, item in enumerate(items, 1):
        yield item
        if count % (total // 100 + 1) == 0:
            progress(f"{count:,} of {total:,} {words}")


class Verdict(NamedTuple):
    """What a check of files found: the faults, the rows without (`reader.FileTasks.places`), and the environments they name."""

    faults: list[Fault]
    index: np.ndarray
    environments: list[str]


class Verdicts:
    """The verdict on task files, remembered in a folder under a key of the files' content and the check's fingerprint.

    It holds as long as path, size and modification time of every image are the same.

    Args:
        folder: None: nothing is remembered.
    """

    def __init__(self, folder: pathlib.Path | None, content: str, fingerprint: str):
        key = hashlib.sha256(f"{VERSION} {PIL.__version__} {content} {fingerprint}".encode())
        self.path = folder and folder / f"{key.hexdigest()[:32]}.npz"

    def recall(self) -> Verdict | None:
        """Return the remembered verdict; None if there is none."""
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError, EOFError, zipfile.BadZipFile):
            if self.path:
                with np.load(self.path) as file:
                    text, index = file["text"].tobytes(), file["index"]
                faults, environments, paths, stamps = json.loads(text)
                if stamps == _stamps(paths):
                    return Verdict([Fault(*fields) for fields in faults], index, environments)
        return None

    def remember(self, verdict: Verdict, paths: Iterable[str]) -> None:
        """Write a verdict that depends on images. A folder that cannot be written is no error: the next start checks again."""
        if self.path is None:
            return
        with contextlib.suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            part, faults = self.path.with_suffix(f".{os.getpid()}.part"), [[*vars(fault).values()] for fault in verdict.faults]
            text = json.dumps([faults, verdict.environments, paths := sorted(paths), _stamps(paths)]).encode()
            with part.open("wb") as file:
                np.savez(file, text=np.frombuffer(text, np.uint8), index=verdict.index)
            part.replace(self.path)


def _stamps(paths: Sequence[str]) -> str:
    found = hashlib.sha256()
    for path in paths:
        found.update(f"{path} {stamp(path)}\n".encode("utf-8", "surrogatepass"))
    return found.hexdigest()


def stamp(path: str | pathlib.Path) -> str:
    """Return size and modification time of a file."""
    with contextlib.suppress(OSError, ValueError):
        found = os.stat(path)
        return f"{found.st_size} {found.st_mtime_ns}"
    return "missing"
