"""The published evaluation loop of Visual-ARFT: its messages turn by turn, real programs and searches, and none of its faults."""

import io
import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from conftest import small_config
from PIL import Image
from scripted_run import finished, scripted_collector

from imagent_jax.evals.harness import Pieces, fingerprint, open_benchmark, sample
from imagent_jax.evals.published import (
    FORMS,
    SYSTEM,
    TEXTS,
    PublishedLoop,
    crop_slices,
    inside,
    plain_collector,
    problems_of,
    read_texts,
)
from imagent_jax.index import main as build_index
from imagent_jax.rollout.collect import Collector, Stopped
from imagent_jax.rollout.environment import ToolEnvironment
from imagent_jax.tools import tools_by_name
from imagent_jax.types import CallStatus, EndReason, Task

MINE = {"coding": {"prompt": "Steps:\n", "crop": "<tips> Crop. </tips>", "none": "<tips> Sound. </tips>",
                   "other": "<tips> Mend {problems}. </tips>"}, "search": {"prompt": "Search."}}  # fmt: skip
READ = "import cv2\nimage = cv2.imread('path_to_input_image.jpg')\n"


def code(lines: str) -> str:
    return f"<think> so </think>\n<code>\n```python\n{READ}{lines}\n```\n</code>"


TURN = code("cv2.imwrite('path_to_output_image.jpg', cv2.rotate(image, cv2.ROTATE_90_CLOCKWISE))")
NOTHING, FAILS = code("image = image"), code("cv2.imwrite('path_to_output_image.jpg', 255 - image)\nraise OSError('full')")


def problem(*names: str) -> str:
    return f"<think> see </think>\n<problem> {{{', '.join(map(repr, names))}}} </problem>"


def answer(text: str) -> str:
    return f"<think> done </think> <answer> {text} </answer>"


def picture(height=40, width=84) -> np.ndarray:
    """Smooth, and different at its four corners."""
    rows, columns = np.mgrid[:height, :width]
    return np.stack([rows * 255 // height, columns * 255 // width, np.full_like(rows, 90)], -1).astype(np.uint8)


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("published")
    (path / "texts.yaml").write_text(yaml.safe_dump(MINE))
    rows = [{"id": "s", "title": "ship Bakelo", "text": "captain Tovira, port Kelamo"},
            {"id": "p", "title": "person Tovira", "text": "home\nZarune"}]  # fmt: skip
    (path / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert build_index([str(path / "corpus.jsonl"), str(path / "index")]) == 0
    return path


@pytest.fixture(scope="module")
def cfg(folder):
    return small_config(
        tools={"workers": 2}, search={"path": str(folder / "index")}, rollout={"prompt_tokens": 600},
        eval={"prompt": "published", "published_texts": str(folder / "texts.yaml"), "groups": 2},
    )  # fmt: skip


@pytest.fixture
def talk(cfg, monkeypatch):
    """Runs a loop on tasks with a policy that says its next line; returns the dialogues and the messages it was shown."""

    def run(name, tasks, *scripts, loop=None, samples=1, config=cfg):
        shown, lines = [], [list(lines) for lines in scripts]

        def collect(self, params, messages, *, group_size, seed, temperature, slots):
            assert group_size == 1 and (temperature, slots) == (0.5, 2)
            shown.append((seed, messages))
            going = [said for said in lines if said]
            return SimpleNamespace(
                trajectories=[[finished(task, [said.pop(0)], None)] for task, said in zip(messages, going, strict=True)]
            )

        monkeypatch.setattr(Collector, "collect", collect)
        loop = loop or PublishedLoop(name, config)
        groups = loop.converse(scripted_collector(config), None, tasks, samples=samples, seed=7, temperature=0.5, slots=2)
        return groups, shown

    return run


def task(question="How much?", pixels=None, uid="1", **facts) -> Task:
    return Task(uid, question, (png(picture() if pixels is None else pixels),), "81", "set_f1", **facts)


def pixels_of(message: Task) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(message.images[0])))


def test_a_spoilt_picture_is_mended_by_a_real_program_and_shown_in_the_same_message(talk):
    turned = np.rot90(picture())  # counter-clockwise
    said = [problem("rotation90") + "<|im_end|>", TURN, answer("81")]
    ((one,),), shown = talk("coding", [task(pixels=turned)], said)
    first = "Steps:\n<query> How much? <query>"
    second = f"{first}\n{problem('rotation90')}\n<tips> Mend ['rotation90']. </tips>\n"
    assert [messages[0].question for _, messages in shown] == [first, second, f"{second}\n{TURN}"]
    assert [seed for seed, _ in shown] == [7, 8, 9]
    assert all(messages[0].tools == () and len(messages[0].images) == 1 for _, messages in shown)
    np.testing.assert_array_equal(pixels_of(shown[1][1][0]), turned)
    mended = pixels_of(shown[2][1][0]).astype(int)  # a JPEG
    assert mended.shape == (40, 84, 3) and np.abs(mended - picture()).mean() < 2
    assert (one.answer, one.end, one.calls, one.invalid, one.fault) == ("81", EndReason.ANSWERED, 1, 0, None)
    assert len(one.replies) == 3


def test_tips_follow_the_first_problem_in_the_order_of_the_alphabet(talk):
    told = {"none": "<tips> Sound. </tips>", "crop": "<tips> Crop. </tips>\n", "dark": "<tips> Mend ['dark']. </tips>\n"}
    for name, tip in told.items():
        _, shown = talk("coding", [task()], [problem(name), answer("1")])
        assert shown[1][1][0].question == f"Steps:\n<query> How much? <query>\n{problem(name)}\n{tip}"
    _, shown = talk("coding", [task()], [problem("rotation90", "dark"), answer("1")])
    assert shown[1][1][0].question.endswith("\n<tips> Mend ['dark', 'rotation90']. </tips>\n")
    assert problems_of("<problem>{'b', \n'a'}</problem>") == ["a", "b"] and problems_of("<problem> a </problem>") == []


def test_a_crop_takes_the_box_of_the_question_whatever_the_program_says(talk):
    crop = code("cv2.imwrite('path_to_output_image.jpg', image[3:9, 1:2])")
    asked = task("Read [250, 500, 750, 1000] of it.")
    _, shown = talk("coding", [asked], [problem("crop"), crop, crop, answer("1")])
    part = pixels_of(shown[2][1][0]).astype(int)
    assert part.shape == (20, 42, 3) and np.abs(part - picture()[20:40, 21:63]).mean() < 3
    assert pixels_of(shown[3][1][0]).shape == (10, 21, 3)  # the box of the picture as it is now
    assert crop_slices("x[ a[0] : b , c:d ] + y[1:2] + z[p[1, 2]:4, 5:6]", (0, 100, 500, 900), (100, 200)) == (
        "x[10:90, 0:100] + y[1:2] + z[10:90, 0:100]"
    )
    _, shown = talk("coding", [task("No box.")], [problem("crop"), crop, answer("1")])
    assert pixels_of(shown[2][1][0]).shape == (6, 1, 3)


def test_none_of_the_published_evaluators_faults(talk):
    """Each of what it did wrong, beside a second item that answers at once."""
    other = task(uid="2", pixels=np.zeros((30, 60, 3), np.uint8))
    # a program that writes nothing, or fails after it wrote, leaves the picture as it was
    for program, invalid in ((NOTHING, 0), (FAILS, 1)):
        (one, two), shown = talk("coding", [task(), other], [TURN, program, answer("81")], [TURN, TURN, answer("5")])
        assert pixels_of(shown[1][1][0]).shape == (84, 40, 3) and pixels_of(shown[2][1][0]).shape == (84, 40, 3)
        assert pixels_of(shown[2][1][1]).shape == (30, 60, 3) and (one[0].invalid, two[0].invalid) == (invalid, 0)
    # an answer that does not end is no answer, and not that of the item before it
    (one, two), _ = talk("coding", [task(), other], [answer("81")], ["<answer> 12"])
    assert (one[0].answer, two[0].answer, two[0].end) == ("81", None, EndReason.VOID)
    # an item that never answers keeps its place, and sees the same message again
    (one, two), shown = talk("coding", [task(), other], ["Hm."] * 5, [answer("3")])
    assert (one[0].answer, one[0].end, two[0].answer) == (None, EndReason.OVER_TURNS, "3") and len(shown) == 5
    assert {messages[0].question for _, messages in shown} == {"Steps:\n<query> How much? <query>"}
    # problems that cannot be read, and code before any problem, end nothing and take nothing from another item
    (one, two), shown = talk(
        "coding", [other, task()], [problem("crop"), answer("1")], ["<problem> dark </problem>", TURN, answer("2")]
    )
    assert two[0].answer == "2" and shown[1][1][1].question.endswith("<tips> Mend []. </tips>\n")
    # a program is not in the evaluator's process, and reads no other item's picture
    files = "assert os.listdir('.') == ['path_to_input_image.jpg']"
    reach = code(f"import os, sys\nassert 'jax' not in sys.modules\n{files}")
    ((one,),), _ = talk("coding", [task()], [reach, answer("1")])
    assert (one.calls, one.invalid) == (1, 0)


def test_code_that_cannot_be_read_is_counted(talk):
    ((one,),), shown = talk("coding", [task()], ["<code> x = 1 </code>", answer("1")])
    assert (one.calls, one.invalid) == (0, 1) and shown[1][1][0].question.endswith("<query>\n<code> x = 1 </code>")


def test_a_search_is_answered_in_the_message(talk):
    asked = Task("1", "Name the home of its captain.", (), "Zarune", "set_f1")
    ((one,),), shown = talk(
        "search", [asked], ["<search> ship Bakelo </search>", "<search> person Tovira </search>", answer("Zarune")]
    )
    first = "Search.\n<query> Name the home of its captain. </query>"
    assert [m[0].question for _, m in shown][:2] == [first, (
        f"{first}\n<search> ship Bakelo </search>\n<information> 1. Content:captain Tovira, port Kelamo </information> "
    )]  # fmt: skip
    both = "1. Content:home Zarune2. Content:captain Tovira, port Kelamo"  # nothing stands between them, as published
    assert shown[2][1][0].question.endswith(f"\n<information> {both} </information> ") and shown[0][1][0].images == ()
    assert (one.answer, one.calls, one.invalid) == ("Zarune", 2, 0)
    ((one,),), shown = talk("search", [asked], ["<search> cut", answer("x")])
    assert one.invalid == 1 and shown[1][1][0].question == first
    both = f"<search> ship Bakelo </search> {answer('y')}"
    assert talk("search", [asked], [both])[0][0][0].calls == 0  # an answer goes first
    assert inside("<answer> a\nb </answer>", "answer") is None  # a line only, as published


def test_a_tool_that_fails_is_a_fault_and_a_message_that_grew_too_long_ends(talk, cfg):
    loop = PublishedLoop("search", cfg)
    loop.tools = SimpleNamespace(execute=lambda *_: SimpleNamespace(status=CallStatus.FAULT, error="Traceback\nOSError: gone\n"))
    asked = Task("1", "Who?", (), "x", "set_f1")
    ((one,),), _ = talk("search", [asked], ["<search> a </search>"], loop=loop)
    assert (one.end, one.fault, one.answer) == (EndReason.FAULT, "OSError: gone", None)
    ((one,),), shown = talk("coding", [task()], [problem("dark") + "very " * 800, answer("1")])
    assert (one.end, one.answer) == (EndReason.TRUNCATED, None) and len(shown) == 1


def test_dialogues_that_are_given_up_leave_no_worker(talk, cfg, monkeypatch):
    closed, close = [], ToolEnvironment.close
    monkeypatch.setattr(ToolEnvironment, "close", lambda self: (closed.append(self), close(self))[1])
    talk("coding", [task(), task(uid="2")], [answer("1")], [answer("2")])
    assert len(closed) == 2
    monkeypatch.setattr(Collector, "collect", lambda *_, **__: (_ for _ in ()).throw(Stopped))
    with pytest.raises(Stopped):
        PublishedLoop("coding", cfg).converse(
            scripted_collector(cfg), None, [task(), task(uid="2")], samples=1, seed=7, temperature=0.5, slots=2
        )
    assert len({*map(id, closed)}) == 4


def test_the_prompt_is_that_of_qwens_own_template(cfg):
    """What the tokenizer's template writes for one user message of a picture and a text."""
    plain = plain_collector(scripted_collector(cfg))
    message = PublishedLoop("coding", cfg).first(task())
    _, prompt, *_ = plain.open_task(message)
    text = plain.processor.tokenizer.apply_chat_template(
        [{"role": "system", "content": SYSTEM},
         {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": message.question}]}],
        tokenize=False, add_generation_prompt=True,
    )  # fmt: skip
    decoded = re.sub(r"(<\|image_pad\|>)+", "<|image_pad|>", plain.processor.decode(prompt.ids))
    assert decoded == text


def test_samples_of_a_question_are_dialogues_of_their_own(talk):
    groups, shown = talk(
        "coding", [task(), task(uid="2")], [answer("1")], ["Hm.", answer("2")], ["Hm.", answer("3")], [answer("4")], samples=2
    )
    assert [[one.answer for one in group] for group in groups] == [["1", "2"], ["3", "4"]]
    assert [len(messages) for _, messages in shown] == [4, 2]


# ---- in an evaluation -----------------------------------------------------------------------------------------------


@pytest.fixture
def rows(folder):
    (folder / "a.png").write_bytes(png(np.rot90(picture())))
    file = str(folder / "a.png")
    row = {"answers": ["81"], "ori_image_path": file, "processed_image_path": file, "type": ["rotation90"], "split": "simple"}
    found = [row | {"id": f"{i}", "question": f"How much? {i}"} for i in range(3)]
    (folder / "MAT-Coding.json").write_text(json.dumps(found))
    return folder / "MAT-Coding.json"


def test_an_evaluation_asks_in_the_loop_and_keeps_what_was_said(rows, cfg, monkeypatch, tmp_path):
    collector = scripted_collector(cfg)
    opened = open_benchmark(f"mat-coding={rows}", cfg, collector)
    lines = {"0": [problem("rotation90"), TURN, answer("81")], "1": [answer("7")], "2": ["Hm."] * 5}

    def collect(self, params, messages, **_):
        return SimpleNamespace(trajectories=[[finished(one, [lines[one.uid].pop(0)], None)] for one in messages])

    monkeypatch.setattr(Collector, "collect", collect)
    kept = []
    pieces = Pieces(tmp_path / "s.jsonl", fingerprint(cfg, opened, 3, tmp_path))
    records, _ = sample(collector, None, opened, 3, pieces, keep=kept.extend)
    samples = [record["samples"][0] for record in records]
    assert [(one["reply"], one["end"], one["calls"], one["tokens"]) for one in samples] == [
        ("81", "ANSWERED", 1, 6), ("7", "ANSWERED", 0, 2), (None, "OVER_TURNS", 0, 10),
    ]  # fmt: skip
    assert [len(replies) for replies in kept] == [3, 1, 5]
    other = cfg.changed({"eval.published_texts": ""})
    assert fingerprint(cfg, open_benchmark(f"mat-coding={rows}", other, collector), 3, tmp_path) != pieces.lines.values[0]["key"]


def test_bad_input_is_one_sentence(rows, cfg, tmp_path):
    collector, path = scripted_collector(cfg), tmp_path / "t.yaml"

    def fails(spec, config):
        with pytest.raises(ValueError) as error:
            open_benchmark(spec, config, collector)
        return str(error.value)

    said = fails("vstar", cfg)
    assert said == "The benchmark vstar has no published loop; set eval.prompt to agent or benchmark."
    gone = cfg.changed({"eval.published_texts": "nowhere.yaml"})
    assert fails(f"mat-coding={rows}", gone) == "There is no file of texts (eval.published_texts) nowhere.yaml."
    for text, words in (
        ("a: [", "is not YAML"),
        ("- 1", "must hold sections"),
        ("coding: {}", "has no text coding.prompt"),
        (yaml.safe_dump(MINE | {"search": {}}), "search.prompt"),
    ):
        path.write_text(text)
        assert words in fails(f"mat-coding={rows}", cfg.changed({"eval.published_texts": str(path)}))
    path.write_text(yaml.safe_dump(MINE | {"coding": MINE["coding"] | {"prompt": "very " * 700}}))
    long = fails(f"mat-coding={rows}", cfg.changed({"eval.published_texts": str(path)}))
    assert "row 1: the prompt needs " in long and "rollout.prompt_tokens=600" in long


def test_every_loop_has_texts_of_our_own_and_a_benchmark():
    texts = read_texts()
    assert set(texts) == set(FORMS) == set(TEXTS) and "{problems}" in texts["coding"]["other"]
    for name, form in FORMS.items():
        assert form.opening(texts[name]["prompt"], "Q?").startswith(texts[name]["prompt"]) and texts[name]["prompt"].endswith(
            "\n"
        )
        assert form.tool in ("python", "search") and (form.tool != "python" or tools_by_name([form.tool]).names == ("python",))
