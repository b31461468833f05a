"""Tasks from JSON Lines: what a row becomes, and one sentence for every fault. Other formats: `test_formats`, `test_files`."""

import dataclasses
import json
import os
import pathlib
import re
import shutil
import threading
from collections import Counter
from fractions import Fraction

import numpy as np
import PIL
import pytest
from PIL import Image

from imagent_jax.config import DataConfig
from imagent_jax.data import check
from imagent_jax.data.check import Fault, left_out
from imagent_jax.data.files import open_file
from imagent_jax.data.pipeline import open_tasks, task_iterator
from imagent_jax.data.reader import read_tasks
from imagent_jax.images.prepare import smart_resize
from imagent_jax.rollout.prompt_check import check_length
from imagent_jax.scoring import score

GOOD = {"uid": "a", "question": "Which image is darker?", "images": ["one.png", "sub/two.jpg"], "answer": "Image 1"}


def read_jsonl(path, **options):
    return read_tasks([open_file(path)], **options)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "sub").mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    Image.fromarray(noise // 2).save(tmp_path / "one.png")
    Image.fromarray(noise).save(tmp_path / "sub/two.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "sub/two.jpg").read_bytes()[:-600])
    (tmp_path / "text.png").write_text("no image")
    Image.new("F", (60, 40)).save(tmp_path / "float.tif")
    Image.new("RGB", (2048, 9)).save(tmp_path / "narrow.png")
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


@pytest.mark.parametrize("name", ["uid", "answer_type", "kind", "source"])
def test_null_is_the_same_as_absent(folder, name):
    rows = [{key: value for key, value in GOOD.items() if key != "uid"} | {name: None} for _ in range(24)]
    tasks = read_jsonl(_write(folder, *rows))
    (folder / "absent").mkdir()
    shown = {"images": [str(folder / image) for image in GOOD["images"]]}
    absent = read_jsonl(_write(folder / "absent", *({k: v for k, v in row.items() if v is not None} | shown for row in rows)))
    assert len(tasks) == 24 and {task.uid for task in tasks} == {f"train:{line}" for line in range(1, 25)}
    facts = {"source": None} if name == "source" else {}
    assert [dataclasses.replace(task, meta={}) for task in tasks] == list(absent) and tasks[0].meta == facts


NUMBERS = ["0.00005", "1e-7", "5E-05", "1e3", "12345678901234567890", "1.5e16", "-2.50", "7", "0.1", "-0.0"]


@pytest.mark.parametrize("written", NUMBERS)
def test_a_json_number_is_an_answer_of_plain_digits(folder, written):
    row = json.dumps(GOOD | {"answer": 0, "answer_type": "number"})
    [task] = read_jsonl(_write(folder, row.replace('"answer": 0', f'"answer": {written}')))
    assert "e" not in task.answer.lower() and Fraction(task.answer) == Fraction(written)
    assert score(task.answer, task.answer, "number") == 1


def test_images_are_decoded_on_all_cores_and_each_file_once(folder, monkeypatch):
    threads, real, meet = Counter(), check.read_image, threading.Barrier(3)

    def recorded(data):
        threads[threading.current_thread().name] += 1
        meet.wait(timeout=30)
        return real(data)

    names = [f"{number}.png" for number in range(6)]
    for name in names:
        shutil.copy(folder / "one.png", folder / name)
    monkeypatch.setattr(check, "read_image", recorded)
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    path = _write(folder, *({**GOOD, "uid": uid, "images": names} for uid in "abc"))
    assert len(read_jsonl(path)) == 3
    assert len(threads) == 3 and sum(threads.values()) == 6


def test_the_message_about_a_path_of_any_length_is_short(folder):
    with pytest.raises(ValueError, match=r"the image .*/SUkqA.* cannot be used \(File name too long\)") as error:
        read_jsonl(_write(folder, GOOD | {"images": ["SUkqA" + "Ab/9" * 50_000]}))
    assert len(str(error.value)) < 1500


def test_a_reference_of_several_boxes_is_one_for_a_point(folder):
    row = {"question": "Where?", "answer": "[[0, 0, 10, 10], [20, 20, 30, 30]]", "answer_type": "point"}
    [task] = read_jsonl(_write(folder, row))
    assert [score(said, task.answer, "point") for said in ("[25, 25]", "[5, 5]", "[15, 15]")] == [1, 1, 0]
    with pytest.raises(ValueError, match="is no box; write the text"):
        read_jsonl(_write(folder, row | {"answer": "[[0, 0, 10, 10], [20, 20]]"}))


def test_an_image_of_more_pixels_than_pillow_opens_is_a_fault(folder, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # an image has 2400
    with pytest.raises(ValueError, match=r"line 1: the image .*one.png cannot be used \(it does not decode\); replace the file"):
        read_jsonl(_write(folder, GOOD))


def _bad(**changes):
    return {**GOOD, "uid": "b", **changes}


NO_IMAGE = "is no image; write a path, bytes, base64 text or a data URI"
MARKS = 'the question has 1 marks "<image>" and the row 2 images; write one mark for each image, or no mark'
NO_ANSWER = 'the row has no answer; add "answer" as text or number, or as a list of them'
NO_QUESTION = 'the row has no question; add "question" as text'
HALF = "the row has half a character (\\ud83d); write whole characters"
DOES_NOT_DECODE = "cannot be used (it does not decode); replace the file"
BAD = [
    (_bad(images=["one.png", "cut.jpg"]), f"cut.jpg {DOES_NOT_DECODE}", "image unusable"),
    (_bad(images=["text.png"]), f"text.png {DOES_NOT_DECODE}", "image unusable"),
    (_bad(images=["float.tif"]), "float.tif cannot be used (its pixels are 32-bit numbers (mode F)", "image unusable"),
    (_bad(images=["sub"]), "sub cannot be used (Is a directory); replace the file", "image unusable"),
    (_bad(images=["x" * 300]), "cannot be used (File name too long); replace the file", "image unusable"),
    (_bad(images=["a\0b"]), "cannot be used (embedded null byte); replace the file", "image unusable"),
    (_bad(images=["gone.png"]), "gone.png does not exist; add the file or correct the path", "image missing"),
    (_bad(images=["text.png", "gone.png"]), f"text.png {DOES_NOT_DECODE}", "image unusable"),
    (_bad(images=["one.png", ""]), f'"" {NO_IMAGE}', "bad images"),
    (_bad(images=["one.png", 3]), f"3 {NO_IMAGE}", "bad images"),
    (_bad(images=[{"bytes": None, "path": ""}]), f"None {NO_IMAGE}", "bad images"),
    (_bad(images=["https://example.com/a.png"]), "is on the web; download it and write its path", "image by address"),
    (_bad(images=["data:image/png;base64,AAA"]), "an image's base64 text is damaged", "image unusable"),
    (_bad(images=["data:image/png;base64,iVBORw0KGgo…"]), "an image's base64 text is damaged", "image unusable"),
    (_bad(images=["data:image/png;base64,AAAA"]), "an image inside the row cannot be used (it does not", "image unusable"),
    (_bad(question="Is <image> red?"), MARKS, "marks and images"),
    (_bad(question="Is <image> red?", images=[]), 'has 1 marks "<image>" and the row 0 images', "marks and images"),
    (
        _bad(options=["x", "y"]),
        'the answer "Image 1" means none of the options; write one letter of A to B',
        "answer and options",
    ),
    (_bad(options=["B", "A"], answer="A"), 'the answer "A" means A and B of the options', "answer and options"),
    (_bad(options=["x", "x"], answer="x"), 'the answer "x" means A and B of the options', "answer and options"),
    (_bad(options=["x", "y"], answer="C"), 'the answer "C" means none of the options', "answer and options"),
    (_bad(options=["x"], answer="A"), '"options" is no list of 2 to 26 texts', "bad options"),
    (_bad(options=["x", " "], answer="A"), '"options" is no list of 2 to 26 texts', "bad options"),
    (_bad(options="xy", answer="A"), '"options" is no list of 2 to 26 texts', "bad options"),
    (_bad(options=["x", "y"], answer="A", answer_type="f1"), 'a row with options has answer type "choice"', "bad options"),
    (_bad(answer=True), NO_ANSWER, "no answer"),
    (_bad(answer=[]), NO_ANSWER, "no answer"),
    (_bad(answer=["3", None]), NO_ANSWER, "no answer"),
    (_bad(answer={"a": "3"}), NO_ANSWER, "no answer"),
    (_bad(answer=["3", "."], answer_type="f1"), 'the answer "." does not score 1 against itself', "unusable answer"),
    (_bad(answer=" "), NO_ANSWER, "no answer"),
    (_bad(answer=None), NO_ANSWER, "no answer"),
    (json.dumps(_bad(answer=0)).replace('"answer": 0', '"answer": 1e999'), NO_ANSWER, "no answer"),
    (_bad(question=" \n"), NO_QUESTION, "no question"),
    (_bad(question=3), NO_QUESTION, "no question"),
    (_bad(question=""), NO_QUESTION, "no question"),
    (GOOD, "the uid 'a' occurs already on line 1; give every row its own uid", "repeated uid"),
    (_bad(answer_type="guess"), "the answer type 'guess' does not exist; use one of exact, choice", "unknown answer type"),
    (_bad(uid=["b"]), "\"uid\" is ['b']; write text, or leave it out", "bad uid"),
    (_bad(kind={"a": 1}), "\"kind\" is {'a': 1}; write text, or leave it out", "bad kind"),
    (_bad(reward={"format": 10**400}), "\"reward\" is {'format': 100000", "bad reward"),
    (_bad(answer_type=False), '"answer_type" is False; write text, or leave it out', "bad answer_type"),
    (_bad(answer="about 7", answer_type="number"), "answer 'about 7' is not a number; write one like '7'", "unusable answer"),
    (_bad(answer="dog", answer_type="choice"), "answer 'dog' names no option; write 'Image 2', '2' or 'B'", "unusable answer"),
    (_bad(answer=".", answer_type="f1"), 'the answer "." does not score 1 against itself; correct it', "unusable answer"),
    (_bad(answer="a</answer>b"), 'the answer "a</answer>b" does not score 1 against itself', "unusable answer"),
    (_bad(question="\ud83d?"), HALF, "broken text"),
    (_bad(answer="\ud83d"), HALF, "broken text"),
    (_bad(uid="\ud83d"), HALF, "broken text"),
    (_bad(note=["\ud83d"]), HALF, "broken text"),
    (_bad(images=["\ud83d.png"]), HALF, "broken text"),
    ('{"uid": "b", ', "this is not JSON", "not JSON"),
    ('{"uid": "b", "answer": NaN}', "this is not JSON (NaN is no JSON number)", "not JSON"),
    ("[" * 100_000, "this is not JSON", "not JSON"),
    ("[1, 2]", "this is not a JSON object; write one object a line", "not JSON"),
    (_bad(images=["narrow.png"]), "Image 1 cannot be used (An image of 2048 x 9 pixels is too narrow", "unusable prompt"),
    (_bad(question="Which? " * 500), "needs 1000 tokens, more than rollout.prompt_tokens=512; raise it", "unusable prompt"),
]


class Words:
    """A check of prompts without a model: at most 256 words, and the aspect ratio of `smart_resize`."""

    fingerprint = "words"

    def __call__(self, task, sizes):
        for number, size in enumerate(sizes, 1):
            try:
                smart_resize(*size)
            except ValueError as error:
                raise ValueError(f"Image {number} cannot be used ({error})") from error
        check_length(2 * len(task.question.split()), 512)


@pytest.mark.parametrize(("row", "message", "kind"), BAD)
def test_a_bad_row_is_named_with_the_remedy(folder, row, message, kind):
    path = _write(folder, GOOD, row)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        read_jsonl(path, check=Words())
    assert str(error.value).startswith(f"{path}, line 2: ") and "\n" not in str(error.value)
    assert str(error.value).endswith(", or set data.skip_bad to leave such rows out.") and "faults" not in str(error.value)


def test_skipped_rows_are_counted_and_listed_once_each(folder):
    rows = [GOOD, *[row for row, *_ in BAD], {**GOOD, "uid": "z"}, {**GOOD, "uid": "b"}, {**GOOD, "uid": "z"}]
    path = _write(folder, *rows)
    tasks = read_jsonl(path, skip_bad=True, check=Words())
    assert [task.uid for task in tasks] == ["a", "z", "b"]  # the uid of a row left out is free
    *faults, again = tasks.faults
    reason = f"the uid 'z' occurs already on line {len(rows) - 2}; give every row its own uid"
    assert again == Fault(str(path), len(rows), reason, "repeated uid")
    assert str(again) == f"{path}, line {len(rows)}: {again.reason}"
    assert [fault.line for fault in faults] == list(range(2, 2 + len(BAD)))
    for fault, (_, message, kind) in zip(faults, BAD, strict=True):
        assert message in str(fault) and fault.kind == kind
    with pytest.raises(ValueError, match=rf"line 2: .* \({len(BAD)} more rows have faults\), or set data.skip_bad"):
        read_jsonl(path, check=Words())


def test_a_sentence_says_how_many_rows_are_left_out_and_why(folder):
    assert left_out(read_jsonl(_write(folder, GOOD))) == ""
    rows = [GOOD, _bad(answer=""), GOOD, _bad(answer=None), _bad(images=["gone.png"])]
    tasks = read_jsonl(path := _write(folder, *rows), skip_bad=True)
    assert left_out(tasks) == (
        "train.jsonl: 4 of 5 rows are left out (2 no answer, 1 repeated uid, 1 image missing). "
        f"The first: {path}, line 2: {NO_ANSWER}."
    )


def test_a_verdict_is_remembered_until_what_it_depends_on_changes(folder, monkeypatch):
    decoded, asked = [], []

    class Recorded(Words):
        def __call__(self, task, sizes):
            asked.append((task.uid, sizes))
            super().__call__(task, sizes)

    def read():
        decoded.clear(), asked.clear()
        tasks = read_jsonl(path, skip_bad=True, check=Recorded(), memory=folder / "memory")
        return tasks, len(decoded), len(asked)

    real = check.read_image
    monkeypatch.setattr(check, "read_image", lambda data: decoded.append(data) or real(data))
    path = _write(folder, GOOD, _bad(images=["text.png"]), _bad(question="Which? " * 500), {**GOOD, "answer": 3}, _bad())
    first, *work = read()
    assert work == [3, 4] and asked[0] == ("a", [(40, 60), (40, 60)])
    again, *work = read()
    assert work == [0, 0] and list(again) == list(first) and again.faults == first.faults
    assert [task.uid for task in again] == ["a", "b"] and [fault.line for fault in again.faults] == [2, 3, 4]
    with pytest.raises(ValueError, match="line 2: .*text.png"):
        read_jsonl(path, check=Recorded(), memory=folder / "memory")
    for change in (
        lambda: path.write_text(path.read_text() + "\n"),
        lambda: os.utime(folder / "one.png", (1, 1)),
        lambda: (folder / "text.png").unlink(),
        lambda: monkeypatch.setattr(Recorded, "fingerprint", "other words"),
        lambda: monkeypatch.setattr(check, "VERSION", -1),
        lambda: monkeypatch.setattr(PIL, "__version__", "0"),
        lambda: [file.write_text("{") for file in (folder / "memory").iterdir()],
    ):
        change()
        tasks, *work = read()
        assert min(work) >= 2 and [task.uid for task in tasks] == ["a", "b"]
        assert read()[1:] == (0, 0)
    shutil.copy(folder / "one.png", folder / "text.png")
    assert [task.uid for task in read()[0]] == ["a", "b"] and [fault.line for fault in read()[0].faults] == [3, 4, 5]


def test_without_a_place_to_remember_the_check_works_all_the_same(folder):
    assert len(read_jsonl(_write(folder, GOOD), memory=pathlib.Path("/dev/null/x"))) == 1


def test_the_check_says_how_far_it_is(folder):
    said = []
    rows = [{**GOOD, "uid": str(number)} for number in range(250)]
    read_jsonl(_write(folder, *rows), progress=said.append)
    assert said[0] == "Checking train.jsonl: 3 of 250 rows checked" and len(said) == 83


def test_a_file_without_usable_rows_or_no_file_is_refused(folder):
    with pytest.raises(ValueError, match=r"has no usable row, the first fault: .*line 1: the row has no answer"):
        read_jsonl(_write(folder, {**GOOD, "answer": ""}, {**GOOD, "question": ""}), skip_bad=True)
    with pytest.raises(ValueError, match="has no usable row; add rows with question and answer"):
        read_jsonl(_write(folder, ""))
    with pytest.raises(ValueError, match="absent.jsonl does not exist; write it or correct data.path"):
        read_jsonl(folder / "absent.jsonl")


def test_settings_open_the_file_of_the_split(folder):
    _write(folder, GOOD, {**GOOD, "uid": "b"})
    tasks = open_tasks(DataConfig(name="files", path=str(folder), cache_dir=str(folder)), "train")
    assert sorted(task.uid for task in next(task_iterator(tasks, 2, seed=0))) == ["a", "b"]


def test_settings_say_whether_bad_rows_are_left_out_and_a_split_is_a_file_of_its_own(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    cfg = DataConfig(name="files", path=f"~/{folder.name}", cache_dir="~/cache")
    (folder / "test.jsonl").write_bytes(_write(folder, {**GOOD, "uid": "held out"}).read_bytes())
    _write(folder, GOOD, {**GOOD, "uid": "b", "answer": ""})
    with pytest.raises(ValueError, match="line 2: the row has no answer"):
        open_tasks(cfg, "train")
    skipping = open_tasks(dataclasses.replace(cfg, skip_bad=True), "train")
    assert [task.uid for task in skipping] == ["a"] and [fault.line for fault in skipping.faults] == [2]
    held_out = open_tasks(cfg, "test")
    assert [task.uid for task in held_out] == ["held out"] and held_out.faults == ()
    assert len(list((folder.parent / "cache" / "checked").glob("*.npz"))) == 2
