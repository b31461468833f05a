"""Tasks from JSON Lines: what a row becomes, and one clear sentence for every fault."""

import dataclasses
import json
import re
import threading

import numpy as np
import pytest
from PIL import Image

from imagent_jax.config import DataConfig
from imagent_jax.data.jsonl import Fault, read_jsonl
from imagent_jax.data.pipeline import open_tasks, task_iterator

GOOD = {"uid": "a", "question": "Which image is darker?", "images": ["one.png", "sub/two.jpg"], "answer": "Image 1"}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "sub").mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    Image.fromarray(noise // 2).save(tmp_path / "one.png")
    Image.fromarray(noise).save(tmp_path / "sub/two.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "sub/two.jpg").read_bytes()[:-600])
    (tmp_path / "text.png").write_text("no image")
    return tmp_path


def _write(folder, *rows):
    path = folder / "train.jsonl"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")
    return path


def test_a_row_becomes_a_task(folder):
    row = GOOD | {"answer_type": "choice", "kind": "light", "source": "mine"}
    short = {"question": "How many?", "images": [str(folder / "one.png")], "answer": 3}
    tasks = read_jsonl(_write(folder, row, "", short))
    assert len(tasks) == 2 and tasks.faults == ()
    first, second = tasks
    assert first.images == ((folder / "one.png").read_bytes(), (folder / "sub/two.jpg").read_bytes())
    assert (first.uid, first.answer, first.answer_type, first.kind) == ("a", "Image 1", "choice", "light")
    assert first.meta == {"source": "mine"}
    assert (second.uid, second.answer, second.answer_type) == ("train:3", "3", "exact")
    assert tasks[-1] == second and tasks[:1] == [first]


def test_what_a_row_leaves_out_has_a_default_and_numbers_become_text(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    row = {"question": "How many?", "images": ["sub/two.jpg", "~/one.png"], "answer": 2.5}
    path = _write(folder, row, {**row, "uid": 7, "kind": 3, "answer": 0, "answer_type": "number"})
    first, second = read_jsonl("~/train.jsonl")
    assert (first.uid, first.answer, first.answer_type, first.kind, first.meta) == ("train:1", "2.5", "exact", "", {})
    assert (second.uid, second.answer, second.answer_type, second.kind) == ("7", "0", "number", "3")
    assert first.images == ((folder / "sub/two.jpg").read_bytes(), (folder / "one.png").read_bytes())
    assert [task.uid for task in read_jsonl(path)[::-1]] == ["7", "train:1"]


@pytest.mark.parametrize("workers", [1, 4])
def test_images_are_decoded_on_as_many_threads_as_asked(folder, monkeypatch, workers):
    threads, real, meet = set(), Image.open, threading.Barrier(workers)

    def recorded(path):
        threads.add(threading.current_thread().name)
        meet.wait(timeout=30)
        return real(path)

    monkeypatch.setattr(Image, "open", recorded)
    assert len(read_jsonl(_write(folder, {**GOOD, "images": ["one.png"] * 8}), workers=workers)) == 1
    assert len(threads) == workers


def test_an_image_of_more_pixels_than_pillow_opens_is_a_fault(folder, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # an image has 2400
    with pytest.raises(ValueError, match="line 1: the image .*one.png does not decode; replace the file"):
        read_jsonl(_write(folder, GOOD))


BAD = [
    ({**GOOD, "uid": "b", "images": ["one.png", "cut.jpg"]}, "cut.jpg does not decode; replace the file"),
    ({**GOOD, "uid": "b", "images": ["text.png"]}, "text.png does not decode; replace the file"),
    ({**GOOD, "uid": "b", "images": ["gone.png"]}, "gone.png does not exist; add the file or correct the path"),
    ({**GOOD, "uid": "b", "images": ["text.png", "gone.png"]}, "text.png does not decode; replace the file"),
    ({**GOOD, "uid": "b", "images": "one.png"}, 'the row has no images; add "images" as a list of one or more paths'),
    ({**GOOD, "uid": "b", "images": ["one.png", ""]}, 'the row has no images; add "images" as a list of one or more paths'),
    ({**GOOD, "uid": "b", "images": ["one.png", 3]}, 'the row has no images; add "images" as a list of one or more paths'),
    ({**GOOD, "uid": "b", "answer": True}, 'the row has no answer; add "answer" as text or number'),
    ({**GOOD, "uid": "b", "answer": ["3"]}, 'the row has no answer; add "answer" as text or number'),
    ({**GOOD, "uid": "b", "question": " \n"}, 'the row has no question; add "question" as text'),
    ({**GOOD, "uid": "b", "question": 3}, 'the row has no question; add "question" as text'),
    ({**GOOD, "uid": "b", "answer_type": None}, "the answer type None does not exist; use one of exact, choice, number, f1"),
    ({**GOOD, "uid": "b", "images": []}, 'the row has no images; add "images" as a list of one or more paths'),
    ({**GOOD, "uid": "b", "answer": " "}, 'the row has no answer; add "answer" as text or number'),
    ({**GOOD, "uid": "b", "answer": None}, 'the row has no answer; add "answer" as text or number'),
    ({**GOOD, "uid": "b", "question": ""}, 'the row has no question; add "question" as text'),
    (GOOD, "the uid 'a' occurs already on line 1; give every row its own uid"),
    ({**GOOD, "uid": "b", "answer_type": "guess"}, "the answer type 'guess' does not exist; use one of exact, choice"),
    ('{"uid": "b", ', "this is not JSON"),
    ("[1, 2]", "this is not a JSON object; write one object a line"),
]


@pytest.mark.parametrize(("row", "message"), BAD)
def test_a_bad_row_is_named_with_the_remedy(folder, row, message):
    path = _write(folder, GOOD, row)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        read_jsonl(path)
    assert str(error.value).startswith(f"{path}, line 2: ") and "\n" not in str(error.value)
    assert str(error.value).endswith("or set data.skip_bad to leave such rows out.")


def test_skipped_rows_are_counted_and_listed(folder):
    rows = [GOOD, *[row for row, _ in BAD], {**GOOD, "uid": "z"}, {**GOOD, "uid": "b"}, {**GOOD, "uid": "z"}]
    path = _write(folder, *rows)
    tasks = read_jsonl(path, skip_bad=True)
    assert [task.uid for task in tasks] == ["a", "z", "b"]  # the uid of a row left out is free
    *faults, again = tasks.faults
    assert again == Fault(str(path), len(rows), f"the uid 'z' occurs already on line {len(rows) - 2}; give every row its own uid")
    assert str(again) == f"{path}, line {len(rows)}: {again.reason}"
    assert [fault.line for fault in faults] == list(range(2, 2 + len(BAD)))
    for fault, (_, message) in zip(faults, BAD, strict=True):
        assert message in str(fault)


def test_a_file_without_usable_rows_or_no_file_is_refused(folder):
    with pytest.raises(ValueError, match=r"has no usable row, the first fault: .*line 1: the row has no answer"):
        read_jsonl(_write(folder, {**GOOD, "answer": ""}, {**GOOD, "question": ""}), skip_bad=True)
    with pytest.raises(ValueError, match="has no usable row; add rows with question, images and answer"):
        read_jsonl(_write(folder, ""))
    with pytest.raises(ValueError, match="absent.jsonl does not exist; write it or correct data.path"):
        read_jsonl(folder / "absent.jsonl")


def test_settings_open_the_file_of_the_split(folder):
    _write(folder, GOOD, {**GOOD, "uid": "b"})
    tasks = open_tasks(DataConfig(name="jsonl", path=str(folder)), "train")
    assert sorted(task.uid for task in next(task_iterator(tasks, 2, seed=0))) == ["a", "b"]


def test_settings_say_whether_bad_rows_are_left_out_and_a_split_is_a_file_of_its_own(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    cfg = DataConfig(name="jsonl", path=f"~/{folder.name}")
    (folder / "test.jsonl").write_bytes(_write(folder, {**GOOD, "uid": "held out"}).read_bytes())
    _write(folder, GOOD, {**GOOD, "uid": "b", "answer": ""})
    with pytest.raises(ValueError, match="line 2: the row has no answer"):
        open_tasks(cfg, "train")
    skipping = open_tasks(dataclasses.replace(cfg, skip_bad=True), "train")
    assert [task.uid for task in skipping] == ["a"] and [fault.line for fault in skipping.faults] == [2]
    held_out = open_tasks(cfg, "test")
    assert [task.uid for task in held_out] == ["held out"] and held_out.faults == ()
