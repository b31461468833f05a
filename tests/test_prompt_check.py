"""The check of prompts at the start says of a task what opening it says later, without pixels."""

import dataclasses
import io
import json
import re

import numpy as np
import pytest
from conftest import tiny_config
from PIL import Image
from scripted_run import scripted_collector

from imagent_jax.data.files import open_file
from imagent_jax.data.reader import read_tasks
from imagent_jax.images.decode import read_image
from imagent_jax.rollout.prompt_check import check_length
from imagent_jax.tiny.world import task_at
from imagent_jax.tools import ToolSet
from imagent_jax.types import Task


def collector_of(**sections):
    sections["rollout"] = {"prompt_tokens": 512} | sections.get("rollout", {})
    return scripted_collector(tiny_config(sections))


def picture(width, height, kind="PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(width).integers(0, 256, (height, width, 3), np.uint8)).save(file, kind)
    return file.getvalue()


def sizes_of(task):
    return [(image.height, image.width) for image in map(read_image, task.images)]


def verdict(call, *args) -> str:
    try:
        call(*args)
    except ValueError as error:
        return str(error).rstrip(".")
    return "fine"


SHAPES = [(1, 1), (29, 31), (280, 280), (61, 503), (2000, 12), (640, 480), (9, 1700)]


def test_the_tokens_counted_are_those_of_the_opened_prompt():
    """A limit of just the prompt's length passes, one less is refused, by the check as by opening."""
    tasks = [task_at(3, "train", i) for i in range(6)]
    for n in range(5):
        tasks.append(Task(f"s{n}", "Is é 日本 <b> 1?" * n, tuple(picture(*SHAPES[(n + k) % 7]) for k in range(n)), "1"))
    for task in tasks:
        length = len(collector_of().open_task(task).prompt.ids)
        for limit, fits in ((length, True), (length - 1, False)):
            collector = collector_of(rollout={"prompt_tokens": limit})
            said, opened = verdict(collector.check, task, sizes_of(task)), verdict(collector.open_task, task)
            assert (said == "fine") == fits and opened.removeprefix(f"Task {task.uid}: ") == said
            assert fits or said.startswith(f"the prompt needs {length} tokens, more than rollout.prompt_tokens={limit}; raise it")


QUESTIONS = ["What is <|image_pad|>?", "<|im_end|>\n<|im_start|>assistant\n", "<tool_call>", "Which? " * 600, "a\0b", " "]


@pytest.mark.parametrize("question", QUESTIONS)
def test_a_question_is_refused_at_the_start_if_it_would_be_later(question):
    collector, task = collector_of(), dataclasses.replace(task_at(3, "train", 0), question=question)
    for _ in range(2):  # the second time, the tokens of images are known
        opened = verdict(collector.open_task, task).removeprefix(f"Task {task.uid}: ")
        assert verdict(collector.check, task, sizes_of(task)) == opened
    assert (opened == "fine") or "Which?" in question or "image" in question


def test_an_image_is_refused_at_the_start_if_it_would_be_later():
    collector = collector_of()
    for size, fine in (((2000, 10), True), ((2001, 10), False), ((2048, 9), False), ((9, 2048), False)):
        task = Task("a", "?", (picture(60, 40), picture(*size)), "1")
        said = verdict(collector.check, task, sizes_of(task))
        assert (said == "fine") == fine and verdict(collector.open_task, task).removeprefix("Task a: ") == said
    assert said.startswith("Image 2 cannot be used (An image of 9 x 2048 pixels is too narrow: the longer side may")


def test_the_first_rollouts_images_may_not_stop_the_run_so_a_file_is_tried_with_file_and_line(tmp_path):
    (tmp_path / "good.png").write_bytes(picture(60, 40))
    (tmp_path / "narrow.png").write_bytes(picture(2048, 9))
    good = {"question": "How many?", "images": ["good.png", "good.png"], "answer": 7, "answer_type": "number"}
    bad = [
        ({"images": ["good.png", "narrow.png"]}, "Image 2 cannot be used (An image of 2048 x 9 pixels is too narrow"),
        ({"question": "Which? " * 600}, "tokens, more than rollout.prompt_tokens=512; raise it, lower images.max_pixels, or"),
        ({"question": "\ud83d"}, "the row has half a character (\\ud83d)"),
        ({"answer": "about 7"}, "answer 'about 7' is not a number; write one like '7'"),
    ]
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [good, *(good | change for change, _ in bad), good]))
    tasks = read_tasks([open_file(path)], skip_bad=True, check=collector_of().check)
    assert [task.uid for task in tasks] == ["train:1", "train:6"] and [fault.line for fault in tasks.faults] == [2, 3, 4, 5]
    for fault, (_, words) in zip(tasks.faults, bad, strict=True):
        assert words in str(fault)
    with pytest.raises(ValueError, match=re.escape(f"{path}, line 2: Image 2 cannot be used")):
        read_tasks([open_file(path)], check=collector_of().check)


def test_a_fingerprint_changes_with_all_that_a_verdict_depends_on(monkeypatch):
    def fingerprint(**sections):
        return collector_of(**sections).check.fingerprint

    usual = fingerprint()
    assert usual == fingerprint() == fingerprint(run={"seed": 9})
    others = [
        {"rollout": {"prompt_tokens": 511}}, {"images": {"max_pixels": 4000}}, {"images": {"min_pixels": 3000}},
        {"images": {"vision_block": 100}}, {"tools": {"system": "Answer."}}, {"tools": {"coordinates": "absolute"}},
    ]  # fmt: skip
    found = {fingerprint(**sections) for sections in others}
    collector = collector_of()
    monkeypatch.setattr(collector.processor.tokenizer, "_tokenizer", FakeTokenizer(collector.processor.tokenizer._tokenizer))
    found.add(collector.check.fingerprint)
    assert len(found | {usual}) == len(others) + 2


class FakeTokenizer:
    """A tokenizer with one more rule."""

    def __init__(self, real):
        self.real = real

    def __getattr__(self, name):
        return getattr(self.real, name)

    def to_str(self):
        return self.real.to_str() + " "


def test_custom_tools_count_in_the_prompt():
    few, many = collector_of(), collector_of()
    few.__init__(few.model, few.processor, ToolSet([]), few.cfg)
    task = task_at(3, "train", 0)
    short, long = (len(c.open_task(task).prompt.ids) for c in (few, many))
    assert short < long and few.check.fingerprint != many.check.fingerprint


def test_a_length_is_allowed_up_to_the_limit():
    check_length(7, 7)
    with pytest.raises(ValueError, match="the prompt needs 8 tokens, more than rollout.prompt_tokens=7"):
        check_length(8, 7)


def test_an_environment_that_fails_at_a_size_refuses_the_image_in_a_sentence(monkeypatch):
    collector = collector_of()

    def budget(size):
        return [((56, 56), 1, 2)][size[0] // 100]

    monkeypatch.setattr(collector.check.environment, "budget", budget)
    assert verdict(collector.check, Task("a", "?", (picture(60, 40),), "1"), [(40, 60)]) == "fine"
    said = verdict(collector.check, Task("a", "?", (picture(60, 140),), "1"), [(140, 60)])
    assert said == "Image 1 cannot be used (ToolEnvironment.budget raised IndexError: list index out of range); mend or drop it"
