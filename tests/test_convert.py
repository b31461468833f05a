"""`imagent data INPUT OUT`: any data set as ArrayRecord, its summary, and training on it in a shuffled order that resumes."""

import base64
import html.parser
import io
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
import tracemalloc

import numpy as np
import pytest
from PIL import Image
from task_rows import BLINK, CASES, FAULTY, GOOD, MMBENCH, ONE, OWN, TWO, png, write

from imagent_jax.cli import main as cli
from imagent_jax.config import DataConfig
from imagent_jax.data import convert
from imagent_jax.data.files import ArrayRecord, open_file
from imagent_jax.data.pipeline import open_tasks, task_iterator
from imagent_jax.data.reader import read_tasks
from imagent_jax.images.decode import data_uri, read_image
from imagent_jax.model.checkpoint import resolve
from imagent_jax.model.processor import Processor


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "1.png").write_bytes(ONE)
    (tmp_path / "2.png").write_bytes(TWO)
    (tmp_path / "3_proc.png").write_bytes(TWO)
    return tmp_path


def converted(source, out, *flags):
    assert cli(["data", str(source), str(out), *flags]) == 0
    return read_tasks([open_file(out / "train.array_record")])


@pytest.mark.parametrize(("suffix", "row"), [case[:2] for case in CASES])
def test_tasks_of_every_format_are_the_same_after_conversion(folder, suffix, row):
    path = write(folder, suffix, row)
    for shuffle in (None, 3):
        tasks = read_tasks([open_file(path)], shuffle=shuffle)
        if shuffle is None:
            converted(path, folder / "out")
        again = read_tasks([open_file(folder / "out" / "train.array_record")], shuffle=shuffle)
        assert list(again) == list(tasks) and again[0].images == tasks[0].images


def test_meta_of_any_name_own_settings_and_letters_that_are_options_survive(folder):
    rows = [
        OWN | {"question": "<image> or <image>?", "tools": [], "reward": {"format": 0.5}, "mine": {"images": [1], "uid": None}},
        {"question": "Which?", "options": ["B", "C"], "answer": ["A"], "uid": "x", "meta": {"answer": "no"}, "parts": [1]},
        {"problem": "?", "answer": "3", "uid": "y", "tools": ["q"], "kind": {"answer_type": 1}, "images": ["2.png"]},
        {"question": "é<|im_end|>\u2028 1?", "answer": "\u0000x", "uid": "红"},
    ]
    path = write(folder, ".jsonl", *rows)
    assert list(converted(path, folder / "out")) == list(tasks := read_tasks([open_file(path)]))
    assert list(converted(folder / "out", folder / "again")) == list(tasks)  # and a converted data set is one to convert
    assert tasks[0].tools == () and tasks[1].answers == ("A",) and tasks[2].meta["uid"] == "y"


def test_an_image_is_stored_once_as_the_bytes_that_it_had(folder):
    """Also by another path, inside a row, and of the other split."""
    (folder / "copy.png").write_bytes(ONE)
    rows = [{"question": "?", "answer": "1", "images": names} for names in (["1.png", "2.png"], ["copy.png"], ["2.png", "1.png"])]
    inside = {"question": "?", "answer": "1", "images": f"data:image/png;base64,{base64.b64encode(ONE).decode()}"}
    write(folder, ".jsonl", *rows)
    write(folder, ".jsonl", inside, name="test")
    converted(folder, out := folder / "out")
    train, test = (open_tasks(DataConfig(path=str(out), cache_dir=str(folder)), split) for split in ("train", "test"))
    assert [task.images for task in train] == [(ONE, TWO), (ONE,), (TWO, ONE)] and test[0].images == (ONE,)
    stored = ArrayRecord(out / ArrayRecord.IMAGES)._tasks
    assert [stored[n] for n in range(len(stored))] == [ONE, TWO]
    assert sorted(os.listdir(out)) == [
        ArrayRecord.IMAGES,
        "summary.html",
        "summary.json",
        "test.array_record",
        "train.array_record",
    ]


def test_each_fault_of_a_file_is_listed_once_with_its_line(folder, capsys):
    (folder / "cut.png").write_bytes(ONE[:-900])
    more = [GOOD | {"images": ["cut.png"]}, GOOD | {"images": ["gone.png"]}, GOOD | {"answer": "x", "answer_type": "number"}]
    path = write(folder, ".jsonl", GOOD, *[row for row, *_ in FAULTY], *more, GOOD)
    known = read_tasks([open_file(path)], skip_bad=True).faults
    tasks = converted(path, out := folder / "out")
    assert [task.uid for task in tasks] == ["train:1", f"train:{len(FAULTY) + len(more) + 2}"]
    listed = (out / "faults.txt").read_text().splitlines()
    assert listed == [str(fault) for fault in known] and len(listed) == len(FAULTY) + len(more)
    assert [int(re.match(rf"{re.escape(str(path))}, line (\d+): ", line)[1]) for line in listed] == [*range(2, len(listed) + 2)]
    figures = json.loads((out / "summary.json").read_text())["train"]
    assert figures["rows"] == 2 and figures["left out"] == len(listed)
    assert sum(one["rows"] for one in figures["faults"].values()) == len(listed)
    assert figures["faults"]["no answer"]["where"] == [f"{path}, line {f.line}" for f in known if f.kind == "no answer"]
    assert f"{len(listed)} rows are left out; see faults.txt" in capsys.readouterr().out


def test_the_summary_counts_rows_images_and_text(folder):
    text = "Which image is darker? " * 30
    rows = [{"question": text[:n], "answer": "12", "answer_type": "number", "images": ["1.png"] * (n % 3)} for n in range(1, 31)]
    tasks = converted(write(folder, ".jsonl", *rows), out := folder / "out")
    figures = json.loads((out / "summary.json").read_text())["train"]
    assert figures["images a row"] == {"0": 10, "1": 10, "2": 10} and figures["answer types"] == {"number": 30}
    assert figures["question characters"] == {"least": 1, "median": 15.5, "mean": 15.5, "most": 30}
    assert figures["image height"]["most"] == 40 and figures["image width"]["least"] == 60 and "faults" in figures
    converted(folder / "train.jsonl", tokens := folder / "tokens", "--tokenizer=tiny", "--answer_type=f1")
    counted = json.loads((tokens / "summary.json").read_text())["train"]
    processor = Processor.from_pretrained(resolve("tiny"))
    assert counted["question tokens"]["mean"] == np.mean([len(processor.encode(text[:n])) for n in range(1, 31)]) < 15
    assert read_tasks([open_file(folder / "train.jsonl")])[0].answer_type == tasks[0].answer_type == "number"


class Page(html.parser.HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.images, self.text, self.tags = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag == "img":
            self.images.append(base64.b64decode(dict(attrs)["src"].partition(",")[2]))

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_shows_a_sample_of_rows_with_their_images_and_no_markup_of_theirs(folder):
    rows = [
        {"question": f"<script>alert({n})</script> <image> {n}?", "answer": f"<b>{n}", "images": ["1.png"]} for n in range(60)
    ]
    converted(write(folder, ".jsonl", *rows), out := folder / "out")
    page = Page((out / "summary.html").read_text())
    assert page.tags.count("section") == 24 and "script" not in page.tags and "b" in page.tags
    shown = {int(n) for n in re.findall(r"alert\((\d+)\)", "".join(page.text))}
    assert len(shown) == 24 and max(shown) > 40 and min(shown) < 20  # of all rows, not the first
    assert len(page.images) == 24
    assert all(np.array_equal(read_image(data), read_image(ONE)) for data in page.images)


def test_an_image_on_a_page_is_turned_as_its_file_says_and_no_larger_than_asked(folder):
    pixels = np.random.default_rng(0).integers(0, 256, (300, 600, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    for kind in ("JPEG", "TIFF"):
        Image.fromarray(pixels).save(file := io.BytesIO(), kind, exif=exif)
        uri = data_uri(file.getvalue(), 100, 20_000)
        small = Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))
        assert uri.startswith("data:image/jpeg;base64,") and small.size == (50, 100) and "exif" not in small.info
    assert data_uri(ONE, 10, 10**6) == f"data:image/png;base64,{base64.b64encode(ONE).decode()}"


# ---- what goes wrong --------------------------------------------------------------------------------------------------


def test_nothing_is_overwritten(folder, capsys):
    path = write(folder, ".jsonl", GOOD)
    (folder / "out").mkdir()
    (folder / "out" / "mine").write_text("x")
    assert cli(["data", str(path), str(folder / "out")]) == 2
    assert f"{folder}/out exists already; delete it or name another folder." in capsys.readouterr().err
    assert os.listdir(folder / "out") == ["mine"]


def test_an_error_leaves_nothing_behind(folder, capsys, monkeypatch):
    assert cli(["data", str(write(folder, ".jsonl", {"a": 1})), str(folder / "out")]) == 2
    assert "has no row that can be used" in capsys.readouterr().err
    write(folder, ".jsonl", GOOD | {"images": ["1.png"]})
    real = convert.ArrayRecordWriter.close

    def cut(writer):
        real(writer)
        for path in folder.glob(".out-*/images.array_record"):  # as on a full disk
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    monkeypatch.setattr(convert, "ArrayRecordWriter", type("Cut", (convert.ArrayRecordWriter,), {"close": cut}))
    assert cli(["data", str(folder), str(folder / "out")]) == 2
    assert "images.array_record could not be written; is the disk full?" in capsys.readouterr().err
    assert not [name for name in os.listdir(folder) if "out" in name]


@pytest.mark.slow(8)
def test_an_interrupt_is_one_sentence_and_leaves_nothing_behind(folder):
    """SIGINT, sent to a real process in the midst of a file that takes it minutes."""
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (1500, 1500, 3), np.uint8)).save(folder / "big.png")
    for n in range(200):
        os.link(folder / "big.png", folder / f"big-{n}.png")
    write(folder, ".jsonl", *[GOOD | {"images": [f"big-{n}.png"], "uid": str(n)} for n in range(200)])
    command = [sys.executable, "-m", "imagent_jax.data", str(folder), str(folder / "out")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    while not [*folder.glob(".out-*/*")]:
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and err.strip() == f"Interrupted. Nothing was written to {folder}/out."
    assert not [name for name in os.listdir(folder) if "out" in name]


@pytest.mark.parametrize("kind", ["tasks", "images", "other"])
def test_a_damaged_file_is_one_sentence(folder, kind):
    converted(write(folder, ".jsonl", GOOD | {"images": ["1.png"]}), out := folder / "out")
    path = out / ("images.array_record" if kind == "images" else "train.array_record")
    if kind == "other":
        writer = convert.ArrayRecordWriter(str(path), "group_size:1")
        writer.write(b"[1]")
        writer.close()
    else:
        path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(
        ValueError, match="holds no tasks that" if kind == "other" else "cannot be read .* convert the data again"
    ):
        read_tasks([open_file(out / "train.array_record")])[0]


# ---- large data sets --------------------------------------------------------------------------------------------------


def test_conversion_holds_few_images_at_one_time(folder, monkeypatch):
    """120 images inside one row group, on two cores."""
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    big = png(0, (400, 400))
    rows = [{"problem": f"{n}?", "answer": "1", "images": [{"bytes": big + bytes([n]), "path": None}]} for n in range(120)]
    path = write(folder, ".parquet", *rows)
    del rows
    tracemalloc.start()
    tasks = converted(path, folder / "out")
    assert tasks[37].images[0] == big + bytes([37])
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 40 * len(big)  # twice 16 rows as pyarrow gives them, and 9 that wait


def test_a_shuffled_order_resumes_and_reads_only_the_rows_that_it_draws(folder, monkeypatch):
    rows = [{"question": f"{n} <image>?", "answer": n, "images": [f"{1 + n % 2}.png"]} for n in range(300)]
    path = write(folder, ".jsonl", *rows)
    converted(path, out := folder / "out")
    cfg = DataConfig(path=str(out), cache_dir=str(folder / "cache"))
    open_tasks(cfg, "train")  # the check
    read, real = [], ArrayRecord.read
    monkeypatch.setattr(ArrayRecord, "rows", None)  # a second start asks for no row
    monkeypatch.setattr(ArrayRecord, "read", lambda source, place: read.append(place) or real(source, place))
    iterator = task_iterator(open_tasks(cfg, "train"), 4, seed=5, prefetch=1)
    series = [next(iterator) for _ in range(10)]
    state = json.loads(json.dumps(iterator.get_state()))
    following = [next(iterator) for _ in range(80)]  # into the second epoch
    assert len(read) <= 4 * (90 + 1)
    resumed = task_iterator(open_tasks(cfg, "train"), 4, seed=5, prefetch=3)
    resumed.set_state(state)
    assert [next(resumed) for _ in range(80)] == following
    of_lines = task_iterator(open_tasks(DataConfig(path=str(path), cache_dir=str(folder)), "train"), 4, seed=5)
    assert [next(of_lines) for _ in range(90)] == series + following  # the order of the rows, whatever holds them
    assert sorted(task.uid for batch in (series + following)[:75] for task in batch) == sorted(
        f"train:{n}" for n in range(1, 301)
    )


def test_tasks_take_little_memory_whatever_they_say(folder):
    rows = [{"question": f"{n} {'a' * 4000}", "answer": "1"} for n in range(400)]
    for source in (write(folder, ".jsonl", *rows), write(folder, ".parquet", *rows)):
        tracemalloc.start()
        tasks = read_tasks([open_file(source)], memory=folder / "memory")
        kept, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert len(tasks) == 400 and tasks[123].question.startswith("123 ") and kept < 300_000 < 400 * 4000


@pytest.mark.parametrize("suffix", [".jsonl", ".tsv"])
def test_a_row_that_changes_during_a_run_is_named(folder, suffix):
    first, second = (MMBENCH, BLINK) if suffix == ".tsv" else (GOOD, GOOD | {"question": "?"})
    write(folder, suffix, first | {"uid": "a"} if suffix != ".tsv" else first)
    tasks = read_tasks([open_file(path := folder / f"train{suffix}")])
    path.write_bytes(path.read_bytes() + b"\n")
    assert len(tasks[0].answers) == 1  # rows behind it change nothing
    write(folder, suffix, second if suffix != ".tsv" else second | {"hint": "", "C": "", "category": ""})
    with pytest.raises(ValueError, match=rf"train{suffix} has changed since it was checked: line 2|line 1 cannot be read again"):
        tasks[0]


def test_an_image_of_an_earlier_row_is_found_again_at_a_second_start(folder):
    rows = [MMBENCH, MMBENCH | {"index": "1000005", "image": "5", "question": "Or?"}]
    path = write(folder, ".tsv", *rows)
    for _ in range(2):
        tasks = read_tasks([open_file(path)], memory=folder / "memory")
        assert tasks[1].images == (ONE,)


def test_the_interface_of_the_command_is_in_the_documentation():
    page = (pathlib.Path(__file__).parent.parent / "docs" / "data.md").read_text()
    assert "imagent data my_tasks my_records" in page and "--tokenizer" in page and "faults.txt" in page
