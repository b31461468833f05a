"""Checks of a task file before training: every image is decoded once, every prompt is tried, and the verdict is remembered."""

import concurrent.futures
import contextlib
import hashlib
import itertools
import json
import os
import pathlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import PIL

from imagent_jax.images.decode import read_image
from imagent_jax.types import Task

Progress = Callable[[str], None]
"""Shows a sentence about work in progress; called up to a hundred times for each part of the work."""
Size = tuple[int, int]
"""(height, width) of an image in pixels."""
Key = str | tuple[str, int, int]
"""An image: its path; or source, row and place in the row."""
T = TypeVar("T")
VERSION = 3
"""Of the checks here and in `reader`; remembered verdicts of another version do not count."""


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


def left_out(tasks: Tasks) -> str:
    """Return a sentence about the rows that are left out of `tasks`: how many, why, and the first; "" if there are none."""
    if not (faults := tasks.faults):
        return ""
    counts = ", ".join(f"{n} {kind}" for kind, n in Counter(fault.kind for fault in faults).most_common())
    names, rows = [*dict.fromkeys(pathlib.Path(fault.path).name for fault in faults)], len(tasks) + len(faults)
    where = ", ".join([*names[:3], *["..."] * (len(names) > 3)])
    return f"{where}: {len(faults):,} of {rows:,} rows are left out ({counts}). The first: {faults[0]}."


def image_sizes(images: Iterable[tuple[Key, str | bytes]], total: int, progress: Progress) -> dict[Key, Size | RowError]:
    """Decode every image on all cores; return its size, or why it cannot be used, by key.

    Args:
        images: key, and path or bytes, of each of `total` images. At most 64 are in memory at one time.
    """

    def decoded() -> Iterator[tuple[Key, Size | RowError]]:
        stream = iter(images)
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            while part := list(itertools.islice(stream, 64)):
                yield from zip((key for key, _ in part), pool.map(_size, (image for _, image in part)), strict=True)

    return dict(tracked(decoded(), total, "images decoded", progress))


def _size(image: str | bytes) -> Size | RowError:
    name = f"the image {image}" if isinstance(image, str) else "an image inside the row"
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


class Verdicts:
    """The faults of task files, remembered in a folder under a key of all that they depend on.

    That is the content of the files, path, size and modification time of every image, and the check's fingerprint.

    Args:
        folder: None: nothing is remembered.
    """

    def __init__(self, folder: pathlib.Path | None, content: str, paths: Sequence[str], fingerprint: str):
        self.path = None
        if folder is not None:
            key = hashlib.sha256(f"{VERSION} {PIL.__version__} {content} {fingerprint}".encode())
            for path in paths:
                key.update(f"\n{path} {_stamp(path)}".encode("utf-8", "surrogatepass"))
            self.path = folder / f"{key.hexdigest()[:32]}.json"

    def recall(self) -> list[Fault] | None:
        """Return the remembered faults; None if there is no verdict."""
        with contextlib.suppress(OSError, ValueError, TypeError):
            return [Fault(*fields) for fields in json.loads(self.path.read_text())] if self.path else None
        return None

    def remember(self, faults: Sequence[Fault]) -> None:
        """Write the faults. A folder that cannot be written is no error: the next start checks again."""
        if self.path is None:
            return
        with contextlib.suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            part = self.path.with_suffix(f".{os.getpid()}.part")
            part.write_text(json.dumps([[f.path, f.line, f.reason, f.kind, f.unit] for f in faults]))
            part.replace(self.path)


def _stamp(path: str) -> str:
    with contextlib.suppress(OSError, ValueError):
        found = os.stat(path)
        return f"{found.st_size} {found.st_mtime_ns}"
    return "missing"
