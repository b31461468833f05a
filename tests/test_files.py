"""Files that hold rows: every container, shards, folders, the hub; a file that is broken is one sentence."""

import importlib
import re
import time
import tracemalloc

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import task_rows
from task_rows import (
    B64,
    BLINK,
    EASYR1,
    MMBENCH,
    ONE,
    TWO,
    png,
    read,
    write,
)

from imagent_jax.cli import main as cli
from imagent_jax.config import DataConfig
from imagent_jax.data import files
from imagent_jax.data.check import Fault
from imagent_jax.data.files import open_file
from imagent_jax.data.pipeline import open_tasks
from imagent_jax.data.reader import read_tasks

folder = task_rows.folder


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


@pytest.mark.parametrize("cell", ['"yes', '"yes" or no', "yes\rno"])
def test_a_tsv_row_with_an_open_quote_or_a_lone_carriage_return_is_one_fault(folder, cell):
    """The lines that an open quote takes are rows all the same."""
    lines = [f"{n}\t{n}?\t1.png\t{cell if n == 2 else 'yes'}\n" for n in range(1, 5)]
    text = "index\tquestion\timage_path\tanswer\n" + "".join(lines)
    (folder / "train.tsv").write_text(text, newline="")
    tasks = read(folder / "train.tsv", skip_bad=True)
    assert [(task.uid, task.question, task.answer) for task in tasks] == [(f"{n}", f"{n}?", "yes") for n in (1, 3, 4)]
    assert [(fault.line, fault.kind) for fault in tasks.faults] == [(3, "not TSV")]
    assert "mend its quotes and line breaks" in tasks.faults[0].reason
    (folder / "train.tsv").write_text(text + '5\t5?\t1.png\tno"\n', newline="")
    assert [fault.line for fault in read(folder / "train.tsv", skip_bad=True).faults] == [3]  # a later quote closes it
    (folder / "train.tsv").write_text('index\t"question\n')
    with pytest.raises(ValueError, match=r"The header of .*train.tsv is not TSV \(unexpected end of data\); mend its quotes"):
        read(folder / "train.tsv")


def test_white_space_around_the_names_of_a_tsv_header_is_left_out(folder):
    (folder / "train.tsv").write_text("index \t question\timage_path \tanswer\n1\t?\t1.png\tyes\n")
    [task] = read(folder / "train.tsv")
    assert (task.uid, task.images, task.answer) == ("1", (ONE,), "yes")


def test_a_column_named_twice_is_one_sentence(folder):
    """Both columns would be one, in silence. Columns without a name are left alone, as spreadsheets write them."""
    text = "index\tquestion\timage_path\tanswer\t\t\n1\t?\t1.png\tyes\t\t\n"
    (folder / "blank.tsv").write_text(text)
    assert read(folder / "blank.tsv")[0].answer == "yes"
    (folder / "train.tsv").write_text(text.replace("yes\t", "yes\tno").replace("answer\t", "answer\t answer"))
    table = pa.Table.from_arrays([pa.array(["?"]), pa.array(["yes"]), pa.array(["no"])], ["question", "answer", "answer"])
    pq.write_table(table, folder / "train.parquet")
    for name in ("train.tsv", "train.parquet"):
        words = f'{folder / name} has 2 columns named "answer"; remove or rename all but one.'
        with pytest.raises(ValueError, match=f"^{re.escape(words)}$"):
            read(folder / name, skip_bad=True)


def test_an_object_with_a_key_twice_is_a_fault_of_its_row(folder):
    rows = [
        '{"question": "?", "answer": "1"}',
        '{"question": "?", "answer": "1", "\\u0061nswer": "2"}',
        '{"problem": "?", "answer": "1", "note": [{"a": {"b": 1, "b": 1}}]}',
        '{"question": "?", "answer": "2", "note": [{"a": 1}, {"a": 1}]}',
    ]
    (folder / "train.jsonl").write_text("\n".join(rows))
    (folder / "train.json").write_text(f"[{','.join(rows)}]")
    for name in ("train.jsonl", "train.json"):
        tasks = read(folder / name, skip_bad=True)
        assert [(task.uid, task.answer) for task in tasks] == [("train:1", "1"), ("train:4", "2")]
        assert [(fault.line, fault.kind) for fault in tasks.faults] == [(2, "repeated key"), (3, "repeated key")]
        assert tasks.faults[0].reason == 'an object of the row has the key "answer" twice; keep one of them'
        assert 'the key "b" twice' in tasks.faults[1].reason


@pytest.mark.parametrize("coding", ["utf-16", "latin-1"])
def test_a_tsv_header_of_another_encoding_is_one_sentence(folder, coding):
    (folder / "train.tsv").write_bytes("index\tquestion\timage_path\tréponse\n1\t?\t1.png\tyes\n".encode(coding))
    with pytest.raises(ValueError, match=r"^The header of .*train.tsv is not UTF-8; write the file in UTF-8\.$"):
        read(folder / "train.tsv")


def latin():
    """Three texts, of which the second is not UTF-8, as some writers leave them in a column of texts."""
    return pa.Array.from_buffers(pa.string(), 3, pa.array([b"a?", b"caf\xe9?", b"c?"]).buffers())


@pytest.mark.parametrize(
    ("name", "column", "words"),
    [("problem", latin(), "can't decode byte 0xe9"), ("made", pa.array([0, 4 * 10**17, 0], pa.timestamp("us")), "")],
)
@pytest.mark.parametrize("saved", [False, True])
def test_a_value_that_cannot_be_read_is_a_fault_of_its_row(folder, name, column, words, saved):
    table = pa.table({"problem": ["a?", "b?", "c?"], "answer": ["1", "2", "3"]} | {name: column})
    if saved:
        datasets.DatasetDict({"train": datasets.Dataset(table)}).save_to_disk(folder / "saved")
        sources = files.open_sources(DataConfig(path=str(folder / "saved")), "train")
    else:
        pq.write_table(table, folder / "train.parquet")
        sources = [open_file(folder / "train.parquet")]
    tasks = read_tasks(sources, skip_bad=True)
    assert [(task.uid, task.question, task.answer) for task in tasks] == [("train:1", "a?", "1"), ("train:3", "c?", "3")]
    assert [(fault.line, fault.kind) for fault in tasks.faults] == [(2, "unreadable value")]
    assert f'the value of "{name}" cannot be read (' in str(tasks.faults[0]) and words in str(tasks.faults[0])


def test_a_damaged_row_group_is_one_sentence(folder):
    rows = [{"problem": f"{n}? {n**40}", "answer": "1"} for n in range(3000)]
    path = write(folder, ".parquet", *rows, row_group_size=1500)
    start = pq.ParquetFile(path).metadata.row_group(1).column(0).data_page_offset
    data = bytearray(path.read_bytes())
    data[start : start + 400] = bytes(400)
    path.write_bytes(data)
    for skip_bad in (False, True):
        with pytest.raises(ValueError, match=r"^Row group 2 of 2 of .*train.parquet cannot be read \(.*\); write it again\.$"):
            read(path, skip_bad=skip_bad)


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


def test_a_json_list_is_read_in_linear_time(folder):
    path = write(folder, ".json", *[{"question": "q" * 1000, "answer": "x"}] * 8000)
    began = time.process_time()
    assert len([*open_file(path).rows()]) == 8000
    assert time.process_time() - began < 5  # many times what it takes; a look through the whole file for each row needs a minute


def test_a_missing_extra_is_named(folder, monkeypatch):
    path = write(folder, ".parquet", EASYR1)

    def refuse(name):
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", refuse)
    with pytest.raises(ValueError, match=re.escape('pyarrow.parquet is not installed; run pip install "imagent-jax[data]".')):
        read(path)
    with pytest.raises(ValueError, match=re.escape('datasets is not installed; run pip install "imagent-jax[data]".')):
        files.open_sources(DataConfig(path="owner/name"), "train")


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


def test_files_of_one_name_have_uids_of_their_own(folder):
    """And files whose names differ keep the short ones."""
    for name in ("a", "b"):
        (folder / name).mkdir()
        write(folder / name, ".jsonl", *numbered(name, 2))
    write(folder / "b", ".jsonl", *numbered(3), name="more")
    found = opened(path=f"{folder}/*/*.jsonl")
    assert found == [("a/train.jsonl:1", "a"), ("a/train.jsonl:2", "2"), ("more:1", "3"), ("b/train.jsonl:1", "b"),
                     ("b/train.jsonl:2", "2")]  # fmt: skip
    assert opened(path=f"{folder}/b/*.jsonl") == [("more:1", "3"), ("train:1", "b"), ("train:2", "2")]


def test_only_the_absence_of_a_test_split_is_passed_over(folder, capsys):
    write(folder, ".jsonl", *numbered(1))
    assert cli(["data", str(folder)]) == 0 and cli(["data", str(folder / "train.jsonl")]) == 0
    datasets.DatasetDict({"train": datasets.Dataset.from_list(numbered(1))}).save_to_disk(folder / "saved")
    assert cli(["data", str(folder / "saved")]) == 0
    for suffix in (".jsonl", ".json"):
        write(folder, suffix, *numbered(1), name="test")
    capsys.readouterr()
    assert cli(["data", str(folder)]) == 2
    assert "has .json and .jsonl files of the test split; name one file in data.path" in capsys.readouterr().err


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
