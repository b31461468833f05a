"""Tasks from JSON Lines: what a row becomes, and one clear sentence for every fault."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from imagent_jax.config import DataConfig
from imagent_jax.data.jsonl import read_jsonl
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


BAD = [
    ({**GOOD, "uid": "b", "images": ["one.png", "cut.jpg"]}, "cut.jpg does not decode; replace the file"),
    ({**GOOD, "uid": "b", "images": ["text.png"]}, "text.png does not decode; replace the file"),
    ({**GOOD, "uid": "b", "images": ["gone.png"]}, "gone.png does not exist; add the file or correct the path"),
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
    path = _write(folder, GOOD, *[row for row, _ in BAD], {**GOOD, "uid": "z"})
    tasks = read_jsonl(path, skip_bad=True)
    assert [task.uid for task in tasks] == ["a", "z"]
    assert [fault.line for fault in tasks.faults] == list(range(2, 2 + len(BAD)))
    for fault, (_, message) in zip(tasks.faults, BAD, strict=True):
        assert message in str(fault)


def test_a_file_without_usable_rows_or_no_file_is_refused(folder):
    with pytest.raises(ValueError, match=r"has no usable row, the first fault: .*line 1: the row has no answer"):
        read_jsonl(_write(folder, {**GOOD, "answer": ""}), skip_bad=True)
    with pytest.raises(ValueError, match="absent.jsonl does not exist; write it or correct data.path"):
        read_jsonl(folder / "absent.jsonl")


def test_settings_open_the_file_of_the_split(folder):
    _write(folder, GOOD, {**GOOD, "uid": "b"})
    tasks = open_tasks(DataConfig(name="jsonl", path=str(folder)), "train")
    assert sorted(task.uid for task in next(task_iterator(tasks, 2, seed=0))) == ["a", "b"]
