"""The release as a TFDS data set: ArrayRecord, written and read without TensorFlow."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from imagent_jax.curation.pool import Pool
from imagent_jax.curation.question import Question
from imagent_jax.curation.settings import ReleaseSettings

TEXTS = ("uid", "question", "answer", "answer_type", "kind", "group", "evidence", "history")
"""Text features; evidence and history are JSON."""


class MifgQa(tfds.core.GeneratorBasedBuilder):
    """Questions of a run's splits, in order. An example holds the encoded bytes of its images.

    Args:
        splits: questions by split; splits without questions are left out.
        title: of the data set.
    """

    VERSION = tfds.core.Version("1.0.0")
    code_path = None  # nothing is downloaded; see `tiny.builder`

    def __init__(self, *, splits: Mapping[str, Sequence[Question]], pool: Pool, title: str, **kwargs):
        self._splits, self._pool, self._title = splits, pool, title
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text
        lists = {name: tfds.features.Sequence(text()) for name in ("images", "options")}
        features = {name: text() for name in TEXTS} | lists | {"several": tfds.features.Scalar(np.bool_)}
        return tfds.core.DatasetInfo(
            builder=self,
            description=f"{self._title}: questions about groups of images.",
            features=tfds.features.FeaturesDict(features),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager) -> dict[str, Iterator]:
        return {split: self._generate_examples(split) for split, own in self._splits.items() if own}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
        for index, question in enumerate(self._splits[split]):
            yield index, example_of(question, self._pool)


def example_of(question: Question, pool: Pool) -> dict[str, Any]:
    """Return a question as a TFDS example."""
    values = json.loads(question.to_json())
    texts = values | {"question": question.text} | {name: json.dumps(values[name]) for name in ("evidence", "history")}
    return {name: texts[name] for name in TEXTS} | {
        "images": [pool.data(image) for image in question.images],
        "options": list(question.options),
        "several": question.several,
    }


def write_tfds(folder: Path, splits: Mapping[str, Sequence[Question]], pool: Pool, cfg: ReleaseSettings) -> None:
    """Write `<folder>/mifg_qa/<version>/`, which `tfds.builder_from_directory` opens."""
    own = {"VERSION": tfds.core.Version(cfg.version), "__module__": __name__}
    kind = types.new_class("MifgQa", (MifgQa,), {"skip_registration": True}, lambda body: body.update(own))
    tfds.disable_progress_bar()
    with contextlib.redirect_stdout(io.StringIO()):  # TFDS prints a banner about downloads
        builder = kind(splits=splits, pool=pool, title=cfg.title, data_dir=folder, file_format="array_record")
        builder.download_and_prepare()
    shutil.rmtree(folder / "downloads", ignore_errors=True)
    for file in sorted(folder.rglob("*.array_record*")):
        _in_one_order(file)


def _in_one_order(file: Path) -> None:
    """Write a file of examples again, each with its features in order: TFDS writes them in another one in each process."""
    import grain
    from array_record.python.array_record_module import ArrayRecordWriter
    from tensorflow_datasets.proto import tf_example_pb2

    records, part = grain.sources.ArrayRecordDataSource([str(file)]), file.with_name(f".{file.name}")
    writer = ArrayRecordWriter(str(part), "group_size:1,zstd")
    for number in range(len(records)):
        example = tf_example_pb2.Example.FromString(records[number])  # ty: ignore[missing-attribute] - made at run time
        writer.write(example.SerializeToString(deterministic=True))
    writer.close()
    part.rename(file)
