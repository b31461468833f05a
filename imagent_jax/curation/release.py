"""The data set of a run: splits by image group, as ArrayRecord, Parquet and JSON Lines, with a card and checksums.

The folder, the same to the byte when it is written again from the same questions:

    arrayrecord/    train.array_record, test.array_record, images.array_record: `data.path` names this folder
    parquet/        train.parquet, test.parquet, with the images inside
    jsonl/          train.jsonl, test.jsonl, and the pictures in images/
    tfds/           mifg_qa/<version>, for `tfds.builder_from_directory`
    README.md       the card          SHA256SUMS    checksums of all files          dataset_info.json
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from imagent_jax.curation.card import card
from imagent_jax.curation.pool import Pool
from imagent_jax.curation.question import Question
from imagent_jax.curation.settings import ReleaseSettings

SPLITS = ("train", "test")


def components(questions: Sequence[Question]) -> list[list[Question]]:
    """Return the questions in sets that share no picture and no group, directly or by way of others, in order."""
    parent: dict[str, str] = {}

    def root(name: str) -> str:
        while parent.setdefault(name, name) != name:
            name = parent[name]
        return name

    for question in questions:
        first, *others = [*(f"image {image}" for image in question.images), *([f"group {question.group}"] * bool(question.group))]
        for other in others:
            parent[root(other)] = root(first)
    sets: dict[str, list[Question]] = {}
    for question in questions:
        sets.setdefault(root(f"image {question.images[0]}"), []).append(question)
    return list(sets.values())


def split_of(questions: Sequence[Question], share: float, seed: int) -> dict[str, list[Question]]:
    """Return the questions of each split. Sets that share no picture go to the test split, in an order that the seed and their
    pictures decide, as long as it stays within its share."""
    sets = sorted(
        components(questions), key=lambda own: hashlib.sha256(f"{seed} {min(i for q in own for i in q.images)}".encode()).digest()
    )
    test: set[str] = set()
    for own in sets:
        if len(test) + len(own) <= share * len(questions):
            test |= {question.uid for question in own}
    return {
        "train": [question for question in questions if question.uid not in test],
        "test": [question for question in questions if question.uid in test],
    }


def release(
    out: Path, questions: Sequence[Question], funnel: Mapping[str, Any], cfg: ReleaseSettings, seed: int
) -> dict[str, int]:
    """Write `release/` of a run, in place of an earlier one; return the number of questions by split.

    Raises:
        ValueError: there are no questions.
    """
    if not questions:
        raise ValueError(f"No question of {out} is kept, so that there is nothing to release; see funnel.json.")
    from imagent_jax.curation.builder import write_tfds
    from imagent_jax.data.convert import new_folder

    pool, target = Pool(out), out / "release"
    splits = split_of(questions, cfg.test, seed)
    part = out / ".release"
    shutil.rmtree(part, ignore_errors=True)
    with new_folder(part) as folder:
        _write_json_lines(folder / "jsonl", splits, pool)
        _write_parquet(folder / "parquet", splits, pool)
        _write_array_record(folder / "arrayrecord", folder / "jsonl", splits)
        write_tfds(folder / "tfds", splits, pool, cfg)
        info = {
            "title": cfg.title,
            "version": cfg.version,
            "questions": {name: len(own) for name, own in splits.items()},
            "images": len({image for question in questions for image in question.images}),
            "content": hashlib.sha256((folder / "jsonl" / "train.jsonl").read_bytes()).hexdigest()[:16],
        }
        (folder / "dataset_info.json").write_text(json.dumps(info, indent=2) + "\n")
        (folder / "README.md").write_text(card(cfg, splits, pool, funnel), encoding="utf-8")
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        sums = [f"{_checksum(path)}  {path.relative_to(folder).as_posix()}" for path in files]
        (folder / "SHA256SUMS").write_text("\n".join(sums) + "\n")
    shutil.rmtree(target, ignore_errors=True)
    part.rename(target)
    return {name: len(own) for name, own in splits.items()}


def row_of(question: Question) -> dict[str, Any]:
    """Return a question as a row of our own format, without images. The history is part of it, and the measured pass rate."""
    values = asdict(question)
    rates = [event.facts["with tools"] for event in question.said("measured")]
    own = {name: values[name] for name in ("uid", "answer", "answer_type", "kind")}
    own |= {"options": list(question.options)} if question.options else {}
    own |= {"pass_rate": rates[-1]} if rates else {}
    own |= {name: values[name] for name in ("several", "evidence", "group", "history")}
    return {"question": question.text, **own}


def _write_json_lines(folder: Path, splits: Mapping[str, Sequence[Question]], pool: Pool) -> None:
    (folder / "images").mkdir(parents=True)
    for image in sorted({image for own in splits.values() for question in own for image in question.images}):
        shutil.copyfile(pool.folder / pool.pictures[image].file, folder / "images" / Path(pool.pictures[image].file).name)
    for name, own in splits.items():
        rows = [row_of(q) | {"images": [f"images/{Path(pool.pictures[i].file).name}" for i in q.images]} for q in own]
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        if rows:
            (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


def _write_parquet(folder: Path, splits: Mapping[str, Sequence[Question]], pool: Pool) -> None:
    import pyarrow
    import pyarrow.parquet

    folder.mkdir()
    for name, own in splits.items():
        rows = []
        for question in own:
            row = row_of(question)
            row |= {key: json.dumps(row[key], ensure_ascii=False) for key in ("evidence", "history")}
            rows.append(row | {"images": [{"bytes": pool.data(image), "path": image} for image in question.images]})
        if rows:
            names = dict.fromkeys(name for row in rows for name in row)  # pyarrow takes the columns of the first row
            table = pyarrow.Table.from_pylist([dict.fromkeys(names) | row for row in rows])
            pyarrow.parquet.write_table(table, folder / f"{name}.parquet", row_group_size=64)


def _write_array_record(folder: Path, source: Path, splits: Mapping[str, Sequence[Question]]) -> None:
    """Convert the JSON Lines as `imagent data` does."""
    from imagent_jax.data.convert import Writer
    from imagent_jax.data.files import open_file
    from imagent_jax.data.formats import FORMATS
    from imagent_jax.data.reader import Fault, checked

    folder.mkdir()
    writer = Writer(folder)
    for name in SPLITS:
        if splits[name]:
            for row, sizes in checked([open_file(source / f"{name}.jsonl")], FORMATS, (None, ""), None, lambda _: None, {}):
                if isinstance(row, Fault):
                    raise ValueError(f"The question cannot be used in training: {row}")
                writer.add(name, row, sizes)
    writer.close()


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
