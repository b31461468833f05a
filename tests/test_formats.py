"""Rows of every format that people bring become tasks, and a faulty one a sentence."""

import base64
import dataclasses
import json
import pathlib

import numpy as np
import pytest
import task_rows
from conftest import small_config
from task_rows import (
    B64,
    CASES,
    EASYR1,
    FAULTY,
    GOOD,
    MESSAGES,
    ONE,
    OWN,
    TWO,
    VERIFIERS,
    read,
    write,
)

from imagent_jax import train as job
from imagent_jax.cli import main as cli
from imagent_jax.config import Config, DataConfig, load_config
from imagent_jax.data.files import open_file
from imagent_jax.data.formats import FORMATS
from imagent_jax.data.pipeline import open_tasks
from imagent_jax.data.reader import read_tasks

folder = task_rows.folder


@pytest.mark.parametrize(("suffix", "row", "expected", "fields", "meta"), CASES)
def test_a_row_of_each_format_becomes_its_task(folder, suffix, row, expected, fields, meta):
    [task] = tasks = read(write(folder, suffix, row))
    assert (task.question, task.parts, task.images, task.answers, task.answer_type) == expected
    assert {name: getattr(task, name) for name in fields} == fields
    assert task.meta.items() >= meta.items() and json.dumps(task.meta)
    assert "bytes" not in str(task.meta) and tasks.faults == () and tasks[0] == task


@pytest.mark.parametrize(("suffix", "row", "expected", "fields", "meta"), CASES)
def test_a_row_reads_the_same_from_every_container(folder, suffix, row, expected, fields, meta):
    [task] = read(write(folder, suffix, row))
    for other in [".parquet"] if suffix == ".parquet" else [".parquet", ".jsonl", ".json"]:  # JSON has no bytes
        [found] = read(write(folder, other, {name: value for name, value in row.items() if value not in ("", {})}))
        assert (found.question, found.parts, found.images, found.answer) == (task.question, task.parts, task.images, task.answer)
        assert (found.options, found.answer_type, found.kind) == (task.options, task.answer_type, task.kind)


@pytest.mark.parametrize("row", [row for _, row, *_ in CASES])
def test_a_row_of_a_json_list_reads_the_same_each_time(folder, row):
    """The list is kept, so no reader may change what a row holds."""
    text = json.dumps([row], default=lambda data: base64.b64encode(data).decode())
    (folder / "train.json").write_text(text)
    tasks = read(folder / "train.json")
    assert tasks[0] == tasks[0] and json.dumps(tasks.sources[0]._list) == json.dumps(json.loads(text))


def test_the_answer_type_that_a_row_names_goes_before_the_guess(folder):
    [task] = read(write(folder, ".json", EASYR1 | {"images": ["1.png"], "answer_type": "f1"}))
    assert task.answer_type == "f1" and "answer_type" not in task.meta


@pytest.mark.parametrize("image", ["1.png", "file://{folder}/1.png", B64[0], f"data:image/png;base64,{B64[0]}", {"path": "1.png"},
                                   {"bytes": B64[0], "path": "x"}, {"image": "1.png"}])  # fmt: skip
def test_images_are_paths_or_bytes_in_any_form(folder, image):
    image = image.format(folder=folder) if isinstance(image, str) else image
    for value in (image, [image]):
        [task] = read(write(folder, ".jsonl", {"question": "?", "images": value, "answer": "1"}))
        assert task.images == (ONE,)


def test_the_rows_that_the_documentation_shows_are_tasks(folder):
    page = (pathlib.Path(__file__).parent.parent / "docs" / "data.md").read_text()
    for name in ("a.jpg", "b.png"):
        (folder / name).write_bytes(ONE)
    (folder / "train.jsonl").write_text(page.split("```json\n")[1].split("```")[0])
    tasks = read(folder / "train.jsonl")
    assert [(len(task.images), task.answers, task.answer_type) for task in tasks] == [
        (2, ("Image 2",), "choice"), (2, ("yes", "the same"), "exact"), (1, ("B",), "choice"), (0, ("21",), "number")
    ]  # fmt: skip
    assert all(
        f"| {name}" in page
        for name in ("verl", "chat", "VLMEvalKit", "PyVision", "prime verifiers", "MAT", "MuirBench", "EasyR1", "TRL")
    )


@pytest.mark.parametrize(
    ("question", "shown"),
    [
        ("What is in <image 1>?", (1, 2, 3, "What is in Image 1?")),  # images never named: all come first
        ("Is <image 1> <image_2><image3>?", ("Is", 1, 2, 3, "?")),
        ("<image 1><image 2>\n<image 3> Which?", (1, 2, 3, "Which?")),
        ("Is <image 2> <image 1> <image 3>?", (1, 2, 3, "Is Image 2 Image 1 Image 3?")),  # numbers stay those of the row
        ("<image 1> or <image 1> or <image 2>, <image 3>?", (1, "or Image 1 or", 2, ",", 3, "?")),
        ("Which tag, <img 1> or <image a>?", (1, 2, 3, "Which tag, <img 1> or <image a>?")),
    ],
)
def test_marks_with_numbers_place_images_or_name_them_and_never_renumber(folder, question, shown):
    row = {
        "question": question,
        "images": ["1.png", "2.png", B64[0]],
        "options": ["<image 3>", "<image 2>"],
        "answer": "<image 2>",
    }
    [task] = read(write(folder, ".jsonl", row))
    assert task.shown == (*shown, "A. Image 3", "B. Image 2") and task.images == (ONE, TWO, ONE) and task.answers == ("B",)
    [task] = read(write(folder, ".jsonl", {"question": question, "images": ["1.png", "2.png", "1.png"], "answer": "<image 2>"}))
    assert task.shown == shown and task.answer == "Image 2"


def test_text_without_images_keeps_its_marks_in_answers_and_options(folder):
    [task] = read(write(folder, ".jsonl", {"question": "Which tag?", "options": ["<image>", "<img>"], "answer": "<image>"}))
    assert task.options == ("<image>", "<img>") and task.answers == ("A",) and task.shown[0] == "Which tag?"


def test_a_faulty_row_of_each_kind_is_listed_once_with_its_place(folder):
    for suffix, unit in ((".jsonl", "line"), (".json", "row")):
        path = write(folder, suffix, *[row for row, *_ in FAULTY], GOOD)
        tasks = read(path, skip_bad=True)
        assert [task.uid for task in tasks] == [f"train:{len(FAULTY) + 1}"]
        assert [(fault.line, fault.kind) for fault in tasks.faults] == [(n, kind) for n, (*_, kind) in enumerate(FAULTY, 1)]
        for fault, (_, words, _) in zip(tasks.faults, FAULTY, strict=True):
            assert str(fault).startswith(f"{path}, {unit} {fault.line}: ") and words in fault.reason
    with pytest.raises(ValueError, match="the columns text, label are of no format known here; use one of verl and EasyR1"):
        read(write(folder, ".jsonl", FAULTY[0][0]))
    assert all(name in str(tasks.faults[0]) for name in {f.name for f in FORMATS[:-1]})


@pytest.mark.parametrize("answer", ["B", "b", "(B)", "B.", "y", ["y", "B"]])
def test_an_answer_is_a_letter_or_the_text_of_an_option(folder, answer):
    [task] = read(write(folder, ".jsonl", {"question": "Which?", "options": ["x", "y"], "answer": answer}))
    assert task.options == ("x", "y") and {*task.answers} == {"B"} and task.answer_type == "choice"


def test_options_are_shuffled_by_seed_and_uid_and_the_letter_follows(folder):
    options = ["north", "east", "south", "west"]
    rows = [{"uid": f"{n}", "question": "Where?", "options": options, "answer": ["east", "D"]} for n in range(64)]
    write(folder, ".jsonl", *rows)
    cfg = DataConfig(path=str(folder), cache_dir=str(folder))
    plain, again, other = (
        list(open_tasks(dataclasses.replace(cfg, **changes), "train"))
        for changes in ({"seed": 3}, {"shuffle_options": True}, {"shuffle_options": True, "seed": 3})
    )
    assert all(task.options == tuple(options) and task.answers == ("B", "D") for task in plain)
    for tasks in (again, other):
        for task in tasks:
            assert sorted(task.options) == sorted(options)
            assert [task.options["ABCD".index(letter)] for letter in task.answers] == ["east", "west"]
        assert len({task.options for task in tasks}) > 15
    assert again != other and again == list(open_tasks(dataclasses.replace(cfg, shuffle_options=True), "train"))
    assert [task.options for task in again[::-1]] == [
        task.options for task in read_tasks([open_file(write(folder, ".jsonl", *rows[::-1]))], shuffle=0)
    ]


def test_the_earlier_name_says_what_to_write(folder):
    with pytest.raises(ValueError, match="data.name 'jsonl' is now 'files'; write 'files' in its place."):
        Config().changed({"data.name": "jsonl"})
    (folder / "c.yaml").write_text("data: {name: jsonl, path: x}\n")
    with pytest.raises(ValueError, match="data.name 'jsonl' is now 'files'"):
        load_config(folder / "c.yaml")


def test_the_command_says_what_is_in_a_data_set(folder, capsys):
    write(folder, ".jsonl", OWN, VERIFIERS, MESSAGES, {"question": "?", "answer": ""}, name="train")
    assert cli(["data", str(folder)]) == 0
    out = capsys.readouterr().out
    for words in (f"train: {folder}/train.jsonl", "rows: 3", "formats: imagent-jax: 1, prime verifiers: 1, chat messages: 1",
                  "images a row: 0: 1, 1: 1, 2: 1", "answer types: choice: 1, number: 1, exact: 1", "left out: 1",
                  f"no answer: 1\n    {folder}/train.jsonl, line 4: the row has no",
                  "answer characters: least: 1, median: 1, mean: 2, most: 5"):  # fmt: skip
        assert words in out, words
    write(folder, ".jsonl", VERIFIERS, name="test")
    assert cli(["data", str(folder)]) == 0 and "test: " in capsys.readouterr().out
    assert cli(["data", str(folder / "gone")]) == 2 and "gone" in capsys.readouterr().err


@pytest.mark.slow(60)
@pytest.mark.parametrize("mixed", [False, True])
def test_tasks_without_images_train_alone_and_beside_others(folder, mixed):
    rows = [{"question": f"What is {n} + 1?", "answer": n + 1, "answer_type": "number"} for n in range(4)]
    if mixed:
        rows[::2] = [
            {"question": "Is <image> like <image>?", "images": ["1.png", "2.png"], "answer": "no"},
            EASYR1 | {"images": [B64[0]]},
        ]
    for split in ("train", "test"):
        write(folder, ".jsonl", *rows, name=split)
    cfg = small_config(
        data={"name": "files", "path": str(folder), "cache_dir": str(folder)}, eval={"tasks": 4, "every": 0},
        run={"dir": str(folder), "steps": 2, "name": "run"}, rollout={"response_tokens": 96, "group_size": 2},
        reward={"custom": ["test_formats:by_length"]}, grpo={"length_buckets": 1},
    )  # fmt: skip
    (folder / "c.yaml").write_text(cfg.to_yaml())
    assert job.main(["--config", str(folder / "c.yaml")]) == 0
    records = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if "grad_norm" in record or "optim/grad_norm" in record]
    assert len(steps) == 2 and all(record["vision/shown"] == 0 for record in steps) != mixed
    norms = [value for record in steps for key, value in record.items() if key.endswith("grad_norm")]
    assert all(np.isfinite(norms)) and max(norms) > 0
    logged = [json.loads(line) for path in (folder / "run" / "trajectories").glob("train-*.jsonl") for line in path.open()]
    assert {len([i for i in r["images"] if "parent" not in i]) for r in logged} >= ({0, 1, 2} if mixed else {0})


def by_length(trajectory):
    """A reward that spreads."""
    return len(trajectory.ids) % 7
