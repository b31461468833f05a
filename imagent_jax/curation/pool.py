"""The pool of pictures: from folders, data sets and tar shards, without duplicates, each with its licence and origin."""

from __future__ import annotations

import csv
import glob
import hashlib
import io
import json
import os
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import ExifTags, Image

from imagent_jax.config import DataConfig, import_path
from imagent_jax.curation.likeness import Known, look_of
from imagent_jax.curation.settings import PoolSettings
from imagent_jax.images.decode import read_image
from imagent_jax.runs.whole import Lines, write_whole

if TYPE_CHECKING:
    from imagent_jax.data.files import Source

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"}
LICENCES = "licences.csv"
"""File beside the pictures of a folder: columns file, licence, origin, and others, which are facts of the picture."""


@dataclass(frozen=True)
class Picture:
    """A picture of the pool.

    Attributes:
        id: first 16 digits of the SHA-256 of its file.
        file: its place in the run's folder.
        licence, origin: as the source says.
        facts: other columns of the source; groups may be made by one.
    """

    id: str
    file: str
    width: int
    height: int
    licence: str = "unknown"
    origin: str = ""
    facts: Mapping[str, str] = field(default_factory=dict)


class Pool:
    """The pictures of a run's folder.

    Args:
        folder: of the run, which has `pool.jsonl` and the folder `pool`.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        pictures = [Picture(**values) for values in Lines(folder / "pool.jsonl").values]
        self.pictures = {picture.id: picture for picture in pictures}
        self.dropped: dict[str, int] = json.loads((folder / "pool_dropped.json").read_text(encoding="utf-8"))

    def data(self, picture: str) -> bytes:
        """Return the file of a picture."""
        return (self.folder / self.pictures[picture].file).read_bytes()

    def image(self, picture: str) -> Image.Image:
        """Return the pixels of a picture, in RGB."""
        return read_image(self.data(picture))


Found = tuple[bytes, dict[str, str]]
"""An image file and its columns; `origin` is set."""


def build_pool(cfg: PoolSettings, seed: int, out: Path, progress: Callable[[str], None] = lambda words: None) -> Pool:
    """Write the pool of a run, unless it is there, and return it.

    Raises:
        ValueError: there are no pictures, or the source cannot be read.
    """
    if not (out / "pool.jsonl").exists():
        source = Path(cfg.path).expanduser()
        unfinished = source.parent / f".{source.name}.unfinished"
        if cfg.make and (not source.exists() or unfinished.exists()):
            progress(f"making {cfg.make_count} pictures in {cfg.path}")
            make = import_path(cfg.make, "pool.make")
            source.parent.mkdir(parents=True, exist_ok=True)
            unfinished.touch()  # a killed process leaves a folder with some of the pictures
            make(source, cfg.make_count, seed)
            unfinished.unlink()
        (out / "pool").mkdir(parents=True, exist_ok=True)
        pictures, dropped = _kept(cfg, out, progress)
        if not pictures:
            raise ValueError(f"pool.path {cfg.path} has no picture that can be used ({dropped}); name another source.")
        write_whole(out / "pool_dropped.json", json.dumps(dropped, indent=2))
        write_whole(out / "pool.jsonl", "".join(json.dumps(asdict(picture), ensure_ascii=False) + "\n" for picture in pictures))
    return Pool(out)


def _kept(cfg: PoolSettings, out: Path, progress: Callable[[str], None]) -> tuple[list[Picture], dict[str, int]]:
    """Copy the pictures that are kept; return them, and how many were dropped by reason."""
    pictures, known, ids = [], Known(), set()
    dropped = {"does not decode": 0, "too small": 0, "equal file": 0, "near duplicate": 0}
    for number, (data, facts) in enumerate(pictures_of(cfg.path), 1):
        if number % 100 == 0:
            progress(f"{number} pictures read, {len(pictures)} kept")
        key = hashlib.sha256(data).hexdigest()[:16]
        if key in ids:
            dropped["equal file"] += 1
            continue
        try:
            image, suffix = read_image(data), _suffix(data)
        except ValueError:
            dropped["does not decode"] += 1
            continue
        if min(image.size) < cfg.least_side:
            dropped["too small"] += 1
            continue
        if cfg.near:
            look = look_of(image)
            if known.find(look) is not None:
                dropped["near duplicate"] += 1
                continue
            known.add(key, look)
        ids.add(key)
        (out / "pool" / f"{key}{suffix}").write_bytes(data)
        licence, origin = facts.pop("licence", "") or facts.pop("license", "") or cfg.licence, facts.pop("origin")
        pictures.append(Picture(key, f"pool/{key}{suffix}", *image.size, licence, origin, facts))
    return pictures, dropped


def _suffix(data: bytes) -> str:
    with Image.open(io.BytesIO(data)) as image:
        return {"JPEG": ".jpg", "PNG": ".png", "WEBP": ".webp", "GIF": ".gif"}.get(image.format or "", ".img")


def showable(data: bytes) -> tuple[bytes, str]:
    """Return an image file that every server and browser shows upright, and its MIME type: this one or a PNG."""
    with Image.open(io.BytesIO(data)) as image:
        try:
            upright = image.getexif().get(ExifTags.Base.Orientation, 1) == 1
        except Exception:  # damaged EXIF data
            upright = False
        if upright and image.format in ("JPEG", "PNG", "WEBP", "GIF"):
            return data, f"image/{image.format.lower()}"
    read_image(data).save(out := io.BytesIO(), "PNG")
    return out.getvalue(), "image/png"


# ---- sources ----------------------------------------------------------------------------------------------------------


def sources_of(path: str, splits: Sequence[str]) -> list[Source]:
    """Return the rows of a data set, of those of some splits that it has.

    Raises:
        NoSplit: it has none of them.
        ValueError: there is no such data set.
    """
    from imagent_jax.data.files import NoSplit, open_sources

    found, missing = {}, None
    for split in splits:
        try:
            sources = open_sources(DataConfig(name="files", path=path, test_path=path), split)
            found |= {source.name: source for source in sources}  # a file is of every split
        except NoSplit as error:
            missing = missing or error
    if not found and missing:
        raise missing
    return [*found.values()]


def pictures_of(path: str, splits: Sequence[str] = ("train",)) -> Iterator[Found]:
    """Yield the image files of a source, in an order that the source alone decides.

    Args:
        path: folder of pictures; tar shards of WebDataset (a file, or a pattern such as "a-*.tar"); else rows with images of a
            file, a folder with `train.*`, or a hub data set.
        splits: of the rows; those that there are.
    Raises:
        ValueError: there is no such source, or it cannot be read.
    """
    name = os.path.expanduser(path)
    shards = sorted(glob.glob(name)) if name.endswith(".tar") else []
    if shards:
        for shard in shards:
            yield from _of_shard(Path(shard))
    elif os.path.isdir(name) and (files := sorted(f for f in Path(name).rglob("*") if f.suffix.lower() in SUFFIXES)):
        yield from _of_folder(Path(name), files)
    else:
        yield from _of_rows(sources_of(path, splits))


def _of_folder(folder: Path, files: list[Path]) -> Iterator[Found]:
    known: dict[str, dict[str, str]] = {}
    if (table := folder / LICENCES).is_file():
        try:
            with table.open(newline="", encoding="utf-8-sig") as file:  # spreadsheets write a mark before the first column
                rows = list(csv.DictReader(file))
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"{table} cannot be read ({error}); write it as CSV in UTF-8.") from None
        if rows and "file" not in rows[0]:
            raise ValueError(f"{table} has no column 'file'; its columns are file, licence, origin.")
        known = {row.pop("file"): {name: value for name, value in row.items() if name and value} for row in rows}
    for file in files:
        name = file.relative_to(folder).as_posix()
        yield file.read_bytes(), {"origin": name, "folder": file.parent.name, **known.get(name, {})}


def _of_shard(shard: Path) -> Iterator[Found]:
    """Pictures of a WebDataset shard. Files of a sample stand together and have the same name up to its first dot."""
    try:
        with tarfile.open(shard) as tar:
            sample: tuple[str, list[bytes], dict[str, str]] = ("", [], {})
            for member in tar:
                if not member.isfile() or (file := tar.extractfile(member)) is None:
                    continue
                folder, _, base = member.name.rpartition("/")
                key = f"{folder}/{base.partition('.')[0]}"
                if key != sample[0]:
                    yield from _of_sample(shard, sample)
                    sample = key, [], {}
                suffix = os.path.splitext(member.name)[1].lower()
                if suffix in SUFFIXES:
                    sample[1].append(file.read())
                elif suffix == ".json":
                    facts = json.loads(file.read())
                    if not isinstance(facts, dict):
                        raise ValueError(f"{member.name} is no JSON object")
                    sample[2].update({k: str(v) for k, v in facts.items() if isinstance(v, (str, int, float))})
            yield from _of_sample(shard, sample)
    except (tarfile.TarError, OSError, ValueError) as error:
        raise ValueError(f"The shard {shard} cannot be read ({' '.join(str(error).split())}); write it again.") from None


def _of_sample(shard: Path, sample: tuple[str, list[bytes], dict[str, str]]) -> Iterator[Found]:
    key, images, facts = sample
    for data in images:
        yield data, {"origin": f"{shard.name}:{key.lstrip('/')}", **facts}


def _of_rows(sources: Sequence[Source]) -> Iterator[Found]:
    """Images of the rows of a data set, as training reads them (`data.files`), with the text columns of their row."""
    for source in sources:
        for number, _, row in source.rows():
            if not isinstance(row, dict):
                raise ValueError(f"{source.name}, {source.unit} {number}: {row.reason}.")
            facts = {name: value for name, value in row.items() if isinstance(value, str) and len(value) <= 200}
            for data in _images_of(row, source, number):
                yield data, {"origin": f"{source.name}#{number}", **facts}


def _images_of(row: dict[str, Any], source: Any, number: int) -> Iterator[bytes]:
    from imagent_jax.data.check import RowError, StoredImage
    from imagent_jax.data.formats import images_of

    try:
        for image in images_of(row):
            if isinstance(image, StoredImage):
                yield source.image(image.number)
            else:
                yield image if isinstance(image, bytes) else (source.path.parent / os.path.expanduser(image)).read_bytes()
    except (RowError, OSError) as error:
        reason = getattr(error, "reason", str(error))
        raise ValueError(f"{source.name}, {source.unit} {number}: an image cannot be read ({reason}).") from None
