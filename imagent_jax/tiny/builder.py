"""The tiny world as a TFDS builder: tasks written once to ArrayRecord, with TFDS and without TensorFlow."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.resources
import io
import json
import logging
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator

import tensorflow_datasets as tfds

from imagent_jax.tiny import world as tiny_world
from imagent_jax.types import Task

LOG = logging.getLogger(__name__)


class TinyWorld(tfds.core.GeneratorBasedBuilder):
    """Writes tasks 0, 1, ... of a seed, in that order, as splits "train" and "test".

    An example holds the fields of `Task`: images as their encoded bytes, `meta` as JSON. Splits are lists that never
    share a photograph or a digit.
    """

    VERSION = tfds.core.Version("1.0.0")
    # Nothing is downloaded, so TFDS need not look for checksums beside this file; its search (4.9.10) imports
    # importlib_resources, which it does not install.
    code_path = None

    def __init__(self, *, sizes: dict[str, int], seed: int, **kwargs):
        self._sizes, self._seed = dict(sizes), seed
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text
        names = ("uid", "question", "answer", "answer_type", "kind", "meta")
        features = {"images": tfds.features.Sequence(text())} | {name: text() for name in names}
        return tfds.core.DatasetInfo(
            builder=self,
            description="Questions about photographs with small coloured tags that bear handwritten digits.",
            features=tfds.features.FeaturesDict(features),
            disable_shuffling=True,  # record i is task i
        )

    def _split_generators(self, dl_manager) -> dict[str, Iterator]:
        return {split: self._generate_examples(split) for split in self._sizes}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict]]:
        for index in range(self._sizes[split]):
            yield index, to_example(tiny_world.task_at(self._seed, split, index))


def to_example(task: Task) -> dict:
    """The task as a TFDS example."""
    fields = {name: getattr(task, name) for name in ("uid", "question", "answer", "answer_type", "kind")}
    return fields | {"images": list(task.images), "meta": json.dumps(task.meta)}


def from_example(example: dict) -> Task:
    """The task of a TFDS example."""
    fields = {name: example[name].decode() for name in ("uid", "question", "answer", "answer_type", "kind")}
    return Task(images=tuple(example["images"]), meta=json.loads(example["meta"]), **fields)


def version_hash(sizes: dict[str, int], seed: int) -> str:
    """Names what a cache folder holds: the settings, this format, the generator's code and its assets."""
    digest = hashlib.sha256(json.dumps([sorted(sizes.items()), seed, str(TinyWorld.VERSION)]).encode())
    here = importlib.resources.files("imagent_jax.tiny")
    photos = sorted(here.joinpath("assets/world/photos").iterdir(), key=lambda file: file.name)
    for file in (here / "world.py", here / "builder.py", here / "assets/world/digits.npz", *photos):
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def prepare(cache_dir: str | os.PathLike, sizes: dict[str, int], seed: int) -> pathlib.Path:
    """The folder of the written tasks below `cache_dir`; writes it first if it is not there.

    Writing goes to a temporary folder that is renamed when complete, so a folder of the final name is always whole,
    also when several processes start at once or one is killed.

    Args:
        cache_dir: folder of all caches; "~" is expanded.
        sizes: tasks per split.
        seed: names the series of tasks (`tiny_world.task_at`).

    Raises:
        ValueError: a size below 1, or a folder that cannot be written.
    """
    for split, size in sizes.items():
        if size < 1:
            raise ValueError(f"The tiny world's split {split!r} needs a task at least; set data.{split}_size above 0.")
    root = pathlib.Path(cache_dir).expanduser() / "tiny_world"
    final = root / version_hash(sizes, seed)
    if final.is_dir():
        return _version_folder(final)
    try:
        root.mkdir(parents=True, exist_ok=True)
        partial = pathlib.Path(tempfile.mkdtemp(prefix=f".{final.name}-", dir=root))
    except OSError as error:
        raise ValueError(f"The task cache {root} cannot be written ({error.strerror}); set data.cache_dir.") from error
    try:
        LOG.info("Writing %d tasks of the tiny world to %s.", sum(sizes.values()), final)
        _write(partial, sizes, seed)
        try:
            partial.rename(final)
        except OSError:
            if not final.is_dir():  # otherwise another process was first, with the same content
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return _version_folder(final)


def _write(folder: pathlib.Path, sizes: dict[str, int], seed: int) -> None:
    tfds.disable_progress_bar()
    with contextlib.redirect_stdout(io.StringIO()):  # TFDS prints a banner about downloads
        builder = TinyWorld(sizes=sizes, seed=seed, data_dir=folder, file_format="array_record")
        builder.download_and_prepare()
    shutil.rmtree(folder / "downloads", ignore_errors=True)


def _version_folder(folder: pathlib.Path) -> pathlib.Path:
    return folder / TinyWorld.name / str(TinyWorld.VERSION)
