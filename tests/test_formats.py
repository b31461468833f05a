"""Rows of every format that people bring, in every container, as tasks."""

import base64
import csv
import dataclasses
import importlib
import io
import json
import pathlib
import re
import tracemalloc

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import small_config
from PIL import Image

from imagent_jax import train as job
from imagent_jax.cli import main as cli
from imagent_jax.config import Config, DataConfig, load_config
from imagent_jax.data import files
from imagent_jax.data.check import Fault
from imagent_jax.data.files import open_file
from imagent_jax.data.formats import FORMATS
from imagent_jax.data.pipeline import open_tasks
from imagent_jax.data.reader import read_tasks


def png(seed, size=(60, 40)) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), np.uint8)).save(out, "PNG")
    return out.getvalue()


ONE, TWO = png(1), png(2)
B64 = [base64.b64encode(data).decode() for data in (ONE, TWO)]
SYSTEM = {"role": "system", "content": "You are helpful."}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "1.png").write_bytes(ONE)
    (tmp_path / "2.png").write_bytes(TWO)
    (tmp_path / "3_proc.png").write_bytes(TWO)
    return tmp_path


def write(folder, suffix, *rows, name="train", **options):
    path = folder / f"{name}{suffix}"
    if suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif suffix == ".json":
        path.write_text(json.dumps(rows))
    elif suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(list(rows)), path, **options)
    else:
        with path.open("w", newline="") as file:
            table = csv.DictWriter(file, list(rows[0]), delimiter="\t")
            table.writeheader()
            table.writerows(rows)
    return path


def read(path, **options):
    return read_tasks([open_file(path)], **options)


# ---- a row of each format ---------------------------------------------------------------------------------------------

VERL = {
    "data_source": "hiyouga/geometry3k",
    "prompt": [SYSTEM, {"role": "user", "content": "<image>Find x in <image>."}],
    "images": [{"bytes": ONE, "path": None}, {"bytes": TWO, "path": "2.png"}],
    "ability": "math",
    "reward_model": {"style": "rule", "ground_truth": "3"},
    "extra_info": {"split": "train", "index": 7},
    "agent_name": "tool_agent",
}
DEEPEYES = VERL | {
    "prompt": [SYSTEM, {"role": "user", "content": "<image>\nIs it red? Think first."}], "images": [{"bytes": ONE}],
    "reward_model": {"style": "model", "ground_truth": "The dog is red."}, "env_name": "visual_toolbox_v2",
}  # fmt: skip
EASYR1 = {"images": [{"bytes": ONE, "path": None}], "problem": "<image>What is x?", "answer": "2 \\sqrt { 3 }"}
TRL = {
    "prompt": [{"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "How many?"}]}],
    "images": [{"bytes": ONE, "path": None}],
    "solution": "<think> two </think><answer> 2 </answer>",
}
PYVISION = {
    "id": "v1", "question": "Which? (A) red (B) blue", "answer": "B", "ability": "color", "data_source": "vstar",
    "image_path": ["1.png", "2.png"],
}  # fmt: skip
VERIFIERS = {"question": "1 + 1?", "answer": "2", "info": {"level": 1}, "task": "sums"}
MESSAGES = {
    "messages": [SYSTEM, {"role": "user", "content": "<image>\nWhat is it?"}, {"role": "assistant", "content": "a dog"}],
    "images": ["1.png"],
}
LLAVA = {
    "id": "000", "image": "1.png",
    "conversations": [{"from": "human", "value": "What is it?\n<image>"}, {"from": "gpt", "value": "a dog"}],
}  # fmt: skip
OPENAI = {
    "prompt": [{"role": "user", "content": [
        {"type": "text", "text": "Is this"}, {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{B64[1]}"}},
        {"type": "text", "text": "like"}, {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{B64[0]}"}}]}],
    "answer": "no", "task": "same",
}  # fmt: skip
MMBENCH = {"index": "5", "image": B64[0], "question": "Which?", "hint": "Look.", "A": "red", "B": "blue", "C": "", "answer": "B",
           "category": "color"}  # fmt: skip
BLINK = {"index": "6", "image": str(B64), "question": "Which?", "A": "first", "B": "second", "answer": "A"}
MMVET = {"index": "7", "image_path": "['2.png', '1.png']", "question": "How many?", "answer": "12"}
MUIRBENCH = {
    "idx": "m1", "task": "Counting", "image_relation": "Independent", "image_type": "Photo", "answer": "B",
    "question": "Which is like <image>?", "options": ["<image>", "<image>", "None"],
    "image_list": [{"bytes": data} for data in (ONE, TWO, ONE)],
}  # fmt: skip
BLINK_HF = {
    "idx": "b1", "sub_task": "Jigsaw", "question": "Which fits?", "prompt": "Which fits? (A) ...", "choices": ["first", "second"],
    "answer": "(B)", "image_1": {"bytes": TWO}, "image_2": {"bytes": ONE}, "image_3": None, "image_4": None,
}  # fmt: skip
REMI = {
    "question": "Is <image1> like <image2>? See <image1>.", "label": "2.5", "task": "Clocks", "image_1": {"bytes": ONE},
    "image_2": {"bytes": TWO}, "image_3": None,
}  # fmt: skip
MAT = {
    "type": "pre_answer", "image_path": "3_ori.png", "problem": "<query> What number? <query>", "context": "<problem> {'dark'}",
    "solution": "<answer> 81 </answer>", "gt": "<think>so</think><answer> 81 </answer>",
}  # fmt: skip
OWN = {
    "uid": "a", "question": "Is <image> like <image>?", "images": ["1.png", "2.png"], "answer": ["blue", "A"],
    "options": ["red", "green", "blue"], "kind": "likeness", "note": 3,
}  # fmt: skip
CASES = [
    (".parquet", VERL, ("[Image 1] Find x in [Image 2] .", (1, "Find x in", 2, "."), (ONE, TWO), ("3",), "number"),
     {"kind": "hiyouga/geometry3k", "uid": "train:1"}, {"system": "You are helpful.", "agent_name": "tool_agent"}),
    (".parquet", DEEPEYES, ("Is it red? Think first.", (), (ONE,), ("The dog is red.",), "exact"), {},
     {"env_name": "visual_toolbox_v2", "ability": "math"}),
    (".parquet", EASYR1, ("What is x?", (), (ONE,), ("2 \\sqrt { 3 }",), "exact"), {"kind": ""}, {}),
    (".parquet", TRL, ("How many?", (), (ONE,), ("2",), "number"), {}, {}),
    (".json", PYVISION, ("Which? (A) red (B) blue", (), (ONE, TWO), ("B",), "choice"), {"uid": "v1", "kind": "color"},
     {"data_source": "vstar"}),
    (".jsonl", VERIFIERS, ("1 + 1?", (), (), ("2",), "number"), {"kind": "sums"}, {"info": {"level": 1}}),
    (".jsonl", {"prompt": "1 + 1?", "answer": "two", "info": {}}, ("1 + 1?", (), (), ("two",), "exact"), {}, {"info": {}}),
    (".jsonl", OPENAI, ("Is this [Image 1] like [Image 2]", ("Is this", 1, "like", 2), (TWO, ONE), ("no",), "exact"),
     {"kind": "same"}, {}),
    (".jsonl", MESSAGES, ("What is it?", (), (ONE,), ("a dog",), "exact"), {}, {"system": "You are helpful."}),
    (".json", LLAVA, ("What is it? [Image 1]", ("What is it?", 1), (ONE,), ("a dog",), "exact"), {"uid": "000"}, {}),
    (".parquet", MUIRBENCH,
     ("Which is like [Image 1] ? [Image 2] [Image 3]", ("Which is like", 1, "?", 2, 3), (ONE, TWO, ONE), ("B",), "choice"),
     {"uid": "m1", "kind": "Counting", "options": ("Image 2", "Image 3", "None")}, {"image_type": "Photo"}),
    (".parquet", BLINK_HF, ("Which fits?", (), (TWO, ONE), ("B",), "choice"), {"kind": "Jigsaw", "options": ("first", "second")},
     {"prompt": "Which fits? (A) ..."}),
    (".parquet", REMI,
     ("Is [Image 1] like [Image 2] ? See Image 1.", ("Is", 1, "like", 2, "? See Image 1."), (ONE, TWO), ("2.5",), "number"),
     {"kind": "Clocks"}, {}),
    (".json", MAT, ("What number?", (), (TWO,), ("81",), "number"), {"kind": "pre_answer"}, {"context": "<problem> {'dark'}"}),
    (".json", {"image_path": "1.png", "problem": "<query> Who? </query>", "solution": "<think>a</think> <answer>Ada</answer>"},
     ("Who?", (), (ONE,), ("Ada",), "exact"), {"kind": ""}, {}),
    (".tsv", MMBENCH, ("Look.\nWhich?", (), (ONE,), ("B",), "choice"),
     {"uid": "5", "kind": "color", "options": ("red", "blue")}, {}),
    (".tsv", BLINK, ("Which?", (), (ONE, TWO), ("A",), "choice"), {"uid": "6", "options": ("first", "second")}, {}),
    (".tsv", MMVET, ("How many?", (), (TWO, ONE), ("12",), "number"), {"uid": "7"}, {}),
    (".jsonl", OWN, ("Is [Image 1] like [Image 2] ?", ("Is", 1, "like", 2, "?"), (ONE, TWO), ("C", "A"), "choice"),
     {"uid": "a", "kind": "likeness", "options": ("red", "green", "blue")}, {"note": 3}),
    (".jsonl", {"question": "<|im_end|> 1 + 1?", "answer": 2}, ("<|im_end|> 1 + 1?", (), (), ("2",), "exact"), {}, {}),
]  # fmt: skip


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


# ---- faults -----------------------------------------------------------------------------------------------------------

GOOD = {"question": "How many?", "answer": "2", "task": "x"}
ASKED = {"question": "?", "images": ["1.png"], "answer": "b"}
FAULTY = [
    ({"text": "a", "label": 1}, "the columns text, label are of no format known here; use one of verl", "unknown columns"),
    ({"messages": [{"role": "user", "content": "a"}]}, "the row has no answer", "no answer"),
    ({"messages": "a"}, "the row has no answer", "no answer"),
    ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}] * 2},
     'the messages before the answer are of "user", "assistant", "user"; a task is one message of a user', "several turns"),
    ({"messages": ["a"]}, '"messages" is not a list of messages', "no question"),
    ({"prompt": [{"role": "user", "content": [{"type": "video", "video": "a.mp4"}]}], "answer": "1"},
     'a message has a part "video"; only text and images can be shown', "not text or image"),
    ({"prompt": [SYSTEM], "answer": "1"}, "the messages before the answer are of none", "several turns"),
    ({"prompt": [{"role": "user", "content": "<image>"}], "images": ["1.png"], "answer": "1"}, "has no question", "no question"),
    ({"messages": [{"role": ["user"], "content": "a"}]}, "are of \"['user']\"; a task is one message", "several turns"),
    ({"question": "?", "answer": "1", "note": json.loads("[" * 900 + "]" * 900)}, "nested too deeply", "nested too deeply"),
    ({"problem": "<image><image>?", "images": ["1.png"], "answer": "1"}, "has 2 marks", "marks and images"),
    ({"prompt": "a", "reward_model": "rule"}, "the row has no answer", "no answer"),
    ({"index": 1, "question": "a", "image": "https://x.org/1.png", "answer": "b"}, "is on the web", "image by address"),
    (ASKED | {"question": "<image 2>?"}, '"<image 2>" names an image that the row, with 1 images, does not', "marks and images"),
    (ASKED | {"question": "<image_0>?"}, "they are counted from 1", "marks and images"),
    (ASKED | {"options": ["<image 2>", "b"]}, '"<image 2>" names', "marks and images"),
    (ASKED | {"question": "<image 1><image>?"}, "with and without number", "marks and images"),
    (ASKED | {"images": ["1.png", "2.png"], "options": ["<image>", "b"]}, "has 1 marks", "marks and images"),
    (MAT | {"type": "pre_code", "solution": " <code>```python\n```</code>"}, "is a step (code) towards", "a step, no answer"),
    ({"image_path": "1.png", "problem": "a", "solution": "<search> b </search>"}, "is a step (search)", "a step, no answer"),
    ({"imagent_task": {"uid": "a"}, "images": ["1.png"]}, "the record is none that `imagent data` writes", "bad record"),
    ({"imagent_task": {"uid": "a", "question": "?", "answer": "1"}, "images": ["1.png"]}, "(images are missing)", "bad record"),
]  # fmt: skip


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


def test_rows_inside_a_parquet_file_are_decoded_once_and_faults_name_their_row(folder, tmp_path):
    rows = [EASYR1 | {"images": [{"bytes": data, "path": None}]} for data in (ONE, TWO[:-300], TWO)]
    path = write(folder, ".parquet", *rows)
    memory = tmp_path / "memory"
    for _ in range(2):  # the second time the verdict is remembered
        tasks = read(path, skip_bad=True, memory=memory)
        assert [task.images for task in tasks] == [(ONE,), (TWO,)]
        reason = "an image inside the row cannot be used (it does not decode); replace the file"
        assert tasks.faults == (Fault(str(path), 2, reason, "image unusable", "row"),)
    assert str(tasks.faults[0]) == f"{path}, row 2: {reason}" and len(list(memory.iterdir())) == 1


def test_rows_of_every_row_group_are_found(folder):
    rows = [EASYR1 | {"problem": f"{n}?", "images": [{"bytes": png(n), "path": None}]} for n in range(50)]
    tasks = read(path := write(folder, ".parquet", *rows, row_group_size=21))
    assert pq.ParquetFile(path).num_row_groups == 3
    for n in (0, 15, 16, 20, 21, 41, 42, 49):
        assert (tasks[n].uid, tasks[n].question, tasks[n].images) == (f"train:{n + 1}", f"{n}?", (png(n),))


def test_lines_of_a_tsv_file_are_those_of_an_editor(folder):
    path = write(folder, ".tsv", MMBENCH | {"question": "Which\nof\nthem?"}, BLINK | {"hint": "", "C": "", "category": ""})
    with path.open("a") as file:
        file.write("8\tx\n\n")
    with path.open("ab") as file:
        file.write(b"9\t" + B64[0].encode() + b"\t\xff?\t\ta\tb\t\tA\t\n")
    tasks = read(path, skip_bad=True)
    assert tasks[0].question == "Look.\nWhich\nof\nthem?" and tasks[1].images == (ONE, TWO)
    assert [(fault.line, fault.kind) for fault in tasks.faults] == [(6, "not TSV"), (8, "broken text")]
    assert "the row has 2 cells and the header 9" in str(tasks.faults[0])


def test_a_tsv_file_that_changed_after_its_check_is_told_in_a_sentence(folder):
    tasks = read(path := write(folder, ".tsv", MMBENCH))
    path.write_text(path.read_text().rpartition("\t")[0])
    with pytest.raises(ValueError, match=r"\.tsv has changed since it was checked: line 2 cannot be .*the row has 8 cells"):
        tasks[0]


def test_an_image_of_a_tsv_file_may_be_that_of_an_earlier_row(folder):
    rows = [MMBENCH, MMBENCH | {"index": "1000005", "image": "5", "question": "Or?"}, MMBENCH | {"index": "6", "image": "7"}]
    tasks = read(path := write(folder, ".tsv", *rows), skip_bad=True)
    assert [task.images for task in tasks] == [(ONE,), (ONE,)] and tasks[1].question == "Look.\nOr?"
    assert str(tasks.faults[0]).startswith(f"{path}, line 4: the image {folder}/7 does not exist")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("train.csv", "a", "ends in '.csv'; use one of .jsonl, .json, .parquet, .tsv"),
        ("train.json", "{", "is not JSON"),
        ("train.json", "{}", "holds no list; write a list of objects, or one object a line in a .jsonl file"),
        ("train.json", "[NaN]", "is not JSON (NaN is no JSON number)"),
        ("train.parquet", "text", "cannot be read"),
        ("train.tsv", "", "has no usable row"),
    ],
)
def test_a_file_that_is_not_what_its_name_says_is_one_sentence(folder, name, content, words):
    (folder / name).write_text(content)
    with pytest.raises(ValueError, match=re.escape(words)) as error:
        read(folder / name)
    assert "\n" not in str(error.value) and str(folder / name) in str(error.value)


def test_a_missing_extra_is_named(folder, monkeypatch):
    path = write(folder, ".parquet", EASYR1)

    def refuse(name):
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", refuse)
    with pytest.raises(ValueError, match=re.escape('pyarrow.parquet is not installed; run pip install "imagent-jax[data]".')):
        read(path)
    with pytest.raises(ValueError, match=re.escape('datasets is not installed; run pip install "imagent-jax[data]".')):
        files.open_sources(DataConfig(path="owner/name"), "train")


# ---- options ----------------------------------------------------------------------------------------------------------


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


# ---- where the rows are -----------------------------------------------------------------------------------------------


def opened(split="train", **settings):
    return [(task.uid, task.answer) for task in open_tasks(DataConfig(cache_dir=settings["path"], **settings), split)]


def numbered(*answers):
    return [{"question": "?", "answer": str(answer), "info": {"a": 1}} for answer in answers]


def test_a_path_is_a_folder_a_file_or_a_pattern(folder):
    part = folder / "data"
    part.mkdir()
    for n in (1, 0):
        write(part, ".parquet", *numbered(n), name=f"train-0000{n}-of-00002")
    write(part, ".parquet", *numbered(9), name="test-00000-of-00001")
    shards = [("train-00000-of-00002:1", "0"), ("train-00001-of-00002:1", "1")]
    assert opened(path=str(folder)) == opened(path=f"{part}/train-*.parquet") == shards
    assert opened("test", path=str(folder)) == [("test-00000-of-00001:1", "9")]
    single = write(folder, ".tsv", {"index": "1", "question": "?", "image_path": "1.png", "answer": "x"}, name="mine")
    assert opened(path=str(single)) == [("1", "x")]
    with pytest.raises(ValueError, match="names training tasks only; set data.test_path to held-out tasks, or eval.tasks"):
        opened("test", path=str(single))
    assert opened("test", path=str(single), test_path=f"{part}/test-*") == [("test-00000-of-00001:1", "9")]
    assert opened("test", path=str(single), test_path=str(folder)) == [("test-00000-of-00001:1", "9")]


def test_a_path_without_rows_is_one_sentence(folder):
    with pytest.raises(ValueError, match=r"has no train split; write train.jsonl \(or .json, .parquet, .tsv, .array_record\)"):
        opened(path=str(folder))
    write(folder, ".jsonl", *numbered(1))
    write(folder, ".json", *numbered(1))
    with pytest.raises(ValueError, match="has .json and .jsonl files of the train split; name one file in data.path"):
        opened(path=str(folder))
    with pytest.raises(ValueError, match="gone.jsonl does not exist"):
        opened(path=str(folder / "gone.jsonl"))


def test_a_uid_of_two_files_names_both(folder):
    for name in ("train-1", "train-2"):
        write(folder, ".jsonl", {"uid": "a", "question": "?", "answer": "1"}, name=name)
    with pytest.raises(ValueError, match=r"train-2.jsonl, line 1: the uid 'a' occurs already on line 1 of .*train-1.jsonl"):
        opened(path=str(folder))


def test_data_sets_of_the_hub_and_saved_ones_are_read_row_by_row(folder, monkeypatch):
    data = datasets.Dataset.from_list([EASYR1, EASYR1 | {"images": [{"bytes": TWO, "path": None}]}])
    data = data.cast_column("images", datasets.Sequence(datasets.Image()))
    datasets.DatasetDict({"train": data}).save_to_disk(folder / "saved")
    data.to_parquet(folder / "hub" / "train.parquet")
    real = datasets.load_dataset
    local = lambda name, split: real("parquet", data_files={"train": str(folder / "hub" / "train.parquet")}, split=split)  # noqa: E731
    monkeypatch.setattr(datasets, "load_dataset", local)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(folder / "cache"))
    for path in (str(folder / "saved"), "owner/name", str(folder / "hub")):
        tasks = open_tasks(DataConfig(path=path, cache_dir=str(folder)), "train")
        assert [task.images for task in tasks] == [(ONE,), (TWO,)] and tasks[1].uid == "train:2"
    with pytest.raises(ValueError, match=r"There is no file or folder owner/name, and no data set owner/name \(test\)"):
        open_tasks(DataConfig(path="owner/name", cache_dir=str(folder)), "test")


def test_images_inside_a_file_stay_on_disk(folder):
    """40 images of 3 MB in one row group: neither the check nor the tasks hold them."""
    big = png(0, (1000, 1000))
    rows = [{"problem": f"{n}?", "answer": "1", "images": [{"bytes": big + bytes([n]), "path": None}]} for n in range(40)]
    path = write(folder, ".parquet", *rows)
    assert pq.ParquetFile(path).num_row_groups == 1
    tracemalloc.start()
    held = pa.total_allocated_bytes()
    tasks = read(path)
    assert tasks[37].images[0] == big + bytes([37]) and tasks[3].question == "3?"
    used, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert used < len(big) and pa.total_allocated_bytes() - held < len(big)


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


# ---- training ---------------------------------------------------------------------------------------------------------


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
