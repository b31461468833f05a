"""Benchmarks: rows in the form in which each is released become tasks, and replies score as published and strictly."""

import base64
import csv
import importlib
import io
import json
import re
import shlex
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image
from scripted_run import finished

from imagent_jax.config import Config, DataConfig
from imagent_jax.evals.benchmarks import TABLE, named
from imagent_jax.evals.harness import Opened, open_benchmark, sample_of
from imagent_jax.evals.result import scored, summary
from imagent_jax.types import Task


def picture(colour="red", size=(40, 30)) -> bytes:
    Image.new("RGB", size, colour).save(out := io.BytesIO(), "PNG")
    return out.getvalue()


RED, BLUE, GREEN = ({"bytes": picture(colour), "path": None} for colour in ("red", "blue", "green"))
BASE64 = base64.b64encode(picture()).decode()


def parquet(folder, rows, name="test-00000-of-00001.parquet"):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / name)


def tsv(folder, rows, name="set.tsv"):
    with open(folder / name, "w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0]], delimiter="\t")
        writer.writeheader()
        writer.writerows(rows)


def json_list(folder, rows, name="set.json"):
    (folder / name).write_text(json.dumps(rows))
    for image in ("a_proc.png", "a_ori.png", "a.png"):
        (folder / image).write_bytes(picture())


MUIR = {"idx": "1", "task": "Ordering", "image_relation": "Temporal", "image_type": "Photo", "answer": "B",
        "question": "Which comes after <image>?", "options": ["<image>", "<image>", "none of these"],
        "image_list": [RED, BLUE, GREEN]}  # fmt: skip
BLINK = {"idx": "val_1", "sub_task": "Counting", "question": "How many?", "choices": ["one", "two"], "answer": "(B)",
         "prompt": "How many?\nSelect from the following choices.\n(A) one\n(B) two", "image_1": RED, "image_2": BLUE,
         "image_3": None, "image_4": None}  # fmt: skip
MANTIS = {"id": "m1", "question_type": "multi-choice", "question": "<image><image> Which is red?", "answer": "B",
          "options": ["(A) the first", "(B) the second"], "images": [RED, BLUE]}  # fmt: skip
MANTIS_SHORT = MANTIS | {"question_type": "short-answer", "answer": "Yes", "options": []}
MIRB = {"question_id": "7", "subset": "codeu", "questions": "Which?\nA. one\nB. two", "answers": "B", "image_list": [RED]}
MIRB_OPEN = MIRB | {"subset": "attribute", "questions": "What is common?", "answers": "car"}
MMIU = {"task": "person_reid", "visual_input_component": "natural", "source": "x", "options": "A: yes\nB: no", "output": "B",
        "question": "Same?", "context": "Two people.", "input_image_path": ["a.png"]}  # fmt: skip
REMI = {"question": "Is <image2> like <image1>?", "label": "3.5", "task": "Charts", "image_1": RED, "image_2": BLUE}
VSTAR = {"question_id": 1, "image": RED, "label": "A", "category": "direct_attributes",
         "text": "What colour is it? (A) red (B) blue (C) green (D) grey\nAnswer with the option's letter from the given choices "
                 "directly."}  # fmt: skip
FOUR = {
    "index": 1,
    "question": "What colour?",
    "image": BASE64,
    "A": "red",
    "B": "blue",
    "C": "green",
    "D": "grey",
    "answer": "B",
}
HR = FOUR | {"category": "single", "cycle_category": "single_cycle0"}
TREE = FOUR | {"category": "Perception/Attributes", "target_instances": "[[0, 0, 10, 10], [20, 20, 30, 30]]"}
MME = {"index": "1", "bytes": BASE64, "question": "What colour?", "answer": "C", "category": "Perception/OCR",
       "l2-category": "sign attribute",
       "multi-choice options": ["(A) red", "(B) blue", "(C) green", "(D) grey", "(E) none"]}  # fmt: skip
O3 = {"file_name": "a.png", "subset": "chart", "question": "Which?", "options": "A. red\nB. blue", "answer": "B"}
PROBE = {"problem": "Which?", "solution": "a red bus", "images": ["a.png"]}
MMBENCH = {"index": 3, "question": "What colour?", "hint": "", "A": "red", "B": "blue", "answer": "B", "category": "colour",
           "l2-category": "perception", "image": BASE64}  # fmt: skip
CODING = {"id": 7, "question": "How many?", "answers": ["A"], "ori_image_path": "a_ori.png", "processed_image_path": "a_proc.png",
          "type": ["dark"], "split": "simple"}  # fmt: skip
SEARCH = {"id": 1, "question": "Who is it?", "answer": "Marie Curie", "image_path": "a.png"}
WIKI = {"id": "dev_0", "question": "Who?", "golden_answers": ["Curie", "Marie Curie"]}
MMSEARCH = {"sample_id": "1", "query": "Who won?", "query_image": RED, "area": "news", "subfield": "sport", "answer": "New York"}
MI = {"index": 1, "question": "Are Image 1 and Image 2 by one painter?", "answer": "yes", "num_images": 2, "image": BASE64,
      "img_2": BASE64, "img_3": None}  # fmt: skip
TIR = {"prompt": "Which colour?\nA. red\nB. blue", "image_1": RED, "image_2": None, "answer": "B", "task": "color",
       "meta_data": {"difficulty": 2}}  # fmt: skip
TIR_OCR = TIR | {"task": "ocr", "answer": "x"}


def opened(tmp_path, name, write, rows, **how):
    """A benchmark and its tasks, from files in `tmp_path/data`."""
    (tmp_path / "data").mkdir(exist_ok=True)
    write(tmp_path / "data", rows)
    benchmark, _ = named(name)
    return benchmark, again(benchmark, tmp_path, **how)


def again(benchmark, tmp_path, seed=0, **how):
    return benchmark.open(str(tmp_path / "data"), DataConfig(cache_dir=str(tmp_path), seed=seed), **how)


RIGHT_BY_STRICT_ONLY, RIGHT_BY_PUBLISHED_ONLY, BOTH, NEITHER = (0, 1), (1, 0), (1, 1), (0, 0)

GOLDEN = [  # benchmark, container, row, reply, (published, strict)
    ("muirbench", parquet, MUIR, "B", BOTH),
    ("muirbench", parquet, MUIR, "B. Image 3", BOTH),
    ("muirbench", parquet, MUIR, "(B)", RIGHT_BY_STRICT_ONLY),
    ("muirbench", parquet, MUIR, "The answer is B", RIGHT_BY_STRICT_ONLY),
    ("muirbench", parquet, MUIR, "Image 3", RIGHT_BY_STRICT_ONLY),
    ("muirbench", parquet, MUIR, "B. none of these", RIGHT_BY_PUBLISHED_ONLY),  # the letter of one option, the text of another
    ("blink", parquet, BLINK, "(B)", BOTH),
    ("blink", parquet, BLINK, "The answer is B", RIGHT_BY_STRICT_ONLY),
    ("blink", parquet, BLINK, "Because there is one", RIGHT_BY_PUBLISHED_ONLY),
    ("mantis", parquet, MANTIS, "B", BOTH),
    ("mantis", parquet, MANTIS, "Final answer: B", BOTH),
    ("mantis", parquet, MANTIS, "Both of them", RIGHT_BY_PUBLISHED_ONLY),
    ("mantis", parquet, MANTIS, "It is option B", RIGHT_BY_STRICT_ONLY),
    ("mantis", parquet, MANTIS_SHORT, "I see two. Final Answer: yes", BOTH),
    ("mantis", parquet, MANTIS_SHORT, "Final Answer: Yes.", RIGHT_BY_STRICT_ONLY),
    ("mantis", parquet, MANTIS_SHORT | {"answer": "Yes "}, "yes", BOTH),
    ("muirbench", parquet, MUIR, " b", BOTH),
    ("mirb", parquet, MIRB, "B.", BOTH),
    ("mirb", parquet, MIRB, "(B)", RIGHT_BY_STRICT_ONLY),
    ("mirb", parquet, MIRB, "b", RIGHT_BY_STRICT_ONLY),
    ("mirb", parquet, MIRB_OPEN | {"subset": "count", "answers": "234"}, "1,234", RIGHT_BY_PUBLISHED_ONLY),
    ("mirb", parquet, MIRB_OPEN, "The answer is car", RIGHT_BY_PUBLISHED_ONLY),  # a sentence in place of a single word
    ("mirb", parquet, MIRB_OPEN, "scarf", RIGHT_BY_PUBLISHED_ONLY),
    ("mirb", parquet, MIRB_OPEN, "A car", BOTH),
    ("mirb", parquet, MIRB_OPEN | {"subset": "count", "answers": "7"}, "7.00", BOTH),
    ("mirb", parquet, MIRB_OPEN | {"subset": "count", "answers": "7"}, "so 7.001", RIGHT_BY_PUBLISHED_ONLY),
    ("mmiu", json_list, MMIU, "B", BOTH),
    ("mmiu", json_list, MMIU, "", RIGHT_BY_PUBLISHED_ONLY),
    ("mmiu", json_list, MMIU, "no", RIGHT_BY_STRICT_ONLY),
    ("remi", parquet, REMI, "3.50", (None, 1)),
    ("remi", parquet, REMI, "35", (None, 0)),
    ("vstar", parquet, VSTAR, "A", BOTH),
    ("vstar", parquet, VSTAR, "A blue car is there", RIGHT_BY_PUBLISHED_ONLY),
    ("vstar", parquet, VSTAR, "The colour is (A)", RIGHT_BY_PUBLISHED_ONLY),
    ("vstar", parquet, VSTAR | {"label": "B"}, "Based on the image, it is red", RIGHT_BY_PUBLISHED_ONLY),
    ("vstar", parquet, VSTAR | {"label": "C"}, "Certainly red", RIGHT_BY_PUBLISHED_ONLY),
    ("vstar", parquet, VSTAR | {"label": "D"}, "grey", RIGHT_BY_STRICT_ONLY),
    ("hrbench-4k", tsv, HR, "B", BOTH),
    ("hrbench-4k", tsv, HR, "blue", BOTH),
    ("hrbench-4k", tsv, HR, "It is not red. B or so", RIGHT_BY_PUBLISHED_ONLY),
    ("hrbench-4k", tsv, HR, "The answer is B, not A", RIGHT_BY_STRICT_ONLY),  # two letters: a judge would be asked
    ("treebench", tsv, TREE, "B", BOTH),
    ("treebench", tsv, TREE, "Best seen as red", RIGHT_BY_PUBLISHED_ONLY),
    ("treebench", tsv, TREE, "blue", RIGHT_BY_STRICT_ONLY),
    ("mme-realworld-lite", parquet, MME, "C", BOTH),
    ("mme-realworld-lite", parquet, MME, "The best answer is (C)", BOTH),
    ("mme-realworld-lite", parquet, MME, "Best answer: C", RIGHT_BY_STRICT_ONLY),  # B: the phrase is never deleted
    ("mme-realworld-lite", parquet, MME, "The best option is C", BOTH),
    ("mme-realworld-lite", parquet, MME, "Could be red", RIGHT_BY_PUBLISHED_ONLY),
    ("mme-realworld-lite", parquet, MME | {"answer": "B"}, "Based on the image, C.", RIGHT_BY_PUBLISHED_ONLY),
    ("o3-bench", json_list, O3, r"\boxed{B}", BOTH),
    ("o3-bench", json_list, O3, "B.", RIGHT_BY_STRICT_ONLY),  # verbatim, or a judge
    ("insight-o3", json_list, O3, "B", BOTH),
    ("visualprobe", json_list, PROBE, "red bus", RIGHT_BY_STRICT_ONLY),
    ("seedbench", tsv, MMBENCH, "Answer: B", BOTH),
    ("seedbench", tsv, MMBENCH | {"answer": "A"}, "It is a deep blue. A", RIGHT_BY_PUBLISHED_ONLY),
    ("seedbench", tsv, MMBENCH, "It is blue", RIGHT_BY_PUBLISHED_ONLY),  # an option's text in a short reply
    ("seedbench", tsv, MMBENCH, "It is blue, B is what I take here now and then", NEITHER),
    ("seedbench", tsv, MMBENCH, "The correct answer is **B**. Red is elsewhere, as one can see", BOTH),
    ("tsv", tsv, MMBENCH, "Neither red nor blue", NEITHER),
    ("mat-coding", json_list, CODING, "the", RIGHT_BY_PUBLISHED_ONLY),
    ("mat-search", json_list, SEARCH, "Marie Curie", BOTH),
    ("2wiki", json_list, WIKI, "curie", BOTH),
    ("mmsearch", parquet, MMSEARCH, "New York", BOTH),
    ("mmsearch", parquet, MMSEARCH | {"answer": "3.5"}, "35", RIGHT_BY_PUBLISHED_ONLY),
    ("mi-mmsearch", tsv, MI, "Yes.", (None, 1)),
    ("tir-bench", parquet, TIR, "B", BOTH),
    ("tir-bench", parquet, TIR | {"answer": "A"}, "", RIGHT_BY_PUBLISHED_ONLY),  # an empty answer is option A
    ("tir-bench", parquet, TIR | {"answer": "A", "prompt": "Which?"}, "none", RIGHT_BY_PUBLISHED_ONLY),  # the nearest letter
    ("tir-bench", parquet, TIR, "blue", RIGHT_BY_PUBLISHED_ONLY),  # options stand in the prompt alone
    ("tir-bench", parquet, TIR | {"answer": "0.1"}, "0.10000000001", RIGHT_BY_STRICT_ONLY),
    ("tir-bench", parquet, TIR | {"answer": "12"}, "12 cm", RIGHT_BY_PUBLISHED_ONLY),
    ("tir-bench", parquet, TIR_OCR, "six", RIGHT_BY_PUBLISHED_ONLY),
    ("tir-bench", parquet, TIR_OCR | {"image_1": RED | {"path": "60.jpg"}}, "mobi", RIGHT_BY_PUBLISHED_ONLY),
    ("tir-bench", parquet, TIR | {"task": "word_search", "answer": "3, 4"}, "(3, 4)", BOTH),
    ("tir-bench", parquet, TIR | {"task": "word_search", "answer": "3, 4"}, "row 3, 4 or 5, 6", RIGHT_BY_PUBLISHED_ONLY),
    ("tir-bench", parquet, TIR | {"task": "spot_difference", "answer": "1, 2, 3"}, "2, 3", (2 / 3, 2 / 3)),
    ("tir-bench", parquet, TIR | {"task": "spot_difference", "answer": "1, 2, 3"}, "2 and 3", (2 / 3, 0)),
    ("tir-bench", parquet, TIR | {"task": "jigsaw", "answer": "[1, 2, 3, 4]"}, "1, 2, 4, 3", (1 / 2, 1 / 2)),
    ("tir-bench", parquet, TIR | {"task": "jigsaw", "answer": "[1, 2, 3, 4]"}, "It is 1, 2, 3, 4", (1, 0)),
    ("own", json_list, {"question": "How many?", "images": ["a.png"], "answer": 7, "answer_type": "number"}, "7.0", (None, 1)),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "write", "row", "reply", "scores"), GOLDEN, ids=lambda value: str(value)[:24] if isinstance(value, str) else ""
)
def test_a_reply_scores_as_published_and_strictly(tmp_path, name, write, row, reply, scores):
    benchmark, tasks = opened(tmp_path, name, write, [row], shuffle=False)
    metric = next(iter(benchmark.metrics.values()))
    found = tuple(rule and rule(tasks.facts[0], reply) for rule in (metric.published, metric.strict))
    assert found == pytest.approx(scores) if None not in scores else found == scores


@pytest.mark.parametrize(("name", "row"), {name: row for name, _, row, *_ in GOLDEN}.items())
def test_a_row_that_lacks_a_column_is_a_fault_of_its_line(tmp_path, name, row):
    """Whichever column is absent or null: no reader stops the command with a traceback."""
    without = [{key: value for key, value in row.items() if key != column} for column in row]
    rows = [row, *without, *(row | {column: None} for column in row)]
    text = "".join(json.dumps(one, default=lambda data: base64.b64encode(data).decode()) + "\n" for one in rows)
    for image in ("a.png", "a_proc.png", "a_ori.png"):
        (tmp_path / image).write_bytes(picture())
    (tmp_path / "set.jsonl").write_text(text)
    benchmark, _ = named(name)
    tasks = benchmark.open(str(tmp_path / "set.jsonl"), DataConfig(cache_dir=str(tmp_path), skip_bad=True))
    assert tasks.faults and all(re.match(rf"{tmp_path}/set.jsonl, line \d+: ", str(fault)) for fault in tasks.faults)


@pytest.mark.parametrize(
    ("name", "row", "words"),
    [
        ("vstar", {key: value for key, value in FOUR.items() if key != "index"}, "the row has no column 'index'; add it"),
        ("hrbench-4k", HR | {"question": None}, "the row is not one of hrbench-4k (AttributeError: 'NoneType' object has no"),
        ("mantis", MANTIS_SHORT | {"answer": None, "images": ["a.png"] * 2}, "the row has no answer"),
        ("mme-realworld-lite", MME | {"multi-choice options": None}, "(TypeError: 'NoneType' object is not iterable); correct"),
    ],
)
def test_the_fault_of_a_row_says_which_column_is_missing_or_what_is_wrong(tmp_path, name, row, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        opened(tmp_path, name, json_list, [row])


PAGE = (Path(__file__).parent.parent / "docs" / "benchmarks.md").read_text()
COMMANDS = [
    shlex.split(line, comments=True)
    for block in re.findall(r"^```bash\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    for line in block.replace("\\\n", "").splitlines()
]


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_command_of_the_page_is_one_that_the_program_takes(tmp_path, monkeypatch, words):
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    for file in ("mine.yaml", "CONFIG", "runs/mine/config.yaml"):
        (tmp_path / file).write_text("")
    monkeypatch.chdir(tmp_path)
    assert words[0] == "imagent" and ("--config" in words) == (words[1] == "evaluate")  # else the sizes are the tiny run's
    chosen = importlib.import_module(f"imagent_jax.{words[1]}").parse(words[2:])
    if words[1] == "evaluate":
        specs = [named(spec) for spec in chosen[0].benchmark.split(",") if spec]
        assert all(path or benchmark.hub for benchmark, path in specs)


def test_the_page_has_a_command_for_every_benchmark():
    asked = [words[words.index("--benchmark") + 1] for words in COMMANDS if words[1] == "evaluate" and "--out" in words]
    assert {*TABLE} <= {spec.partition("=")[0] for spec in asked}


def test_every_benchmark_has_a_golden_row():
    shared = {"hrbench-8k": "hrbench-4k", "mmbench": "seedbench", "hotpotqa": "2wiki", "musique": "2wiki", "bamboogle": "2wiki"}
    assert {shared.get(name, name) for name in TABLE} == {name for name, *_ in GOLDEN}


PROMPTS = [
    ("muirbench", parquet, MUIR,
     ["Which comes after", 1, "?", 2, 3, "A. Image 2\nB. Image 3\nC. none of these\n"
      "Answer with the option's letter from the given choices directly."]),
    ("blink", parquet, BLINK, [1, 2, "Note: You only need to respond with A, B without providing any additional information.\n"
                                     "How many?\nSelect from the following choices.\n(A) one\n(B) two"]),
    ("mantis", parquet, MANTIS, [1, 2, "Which is red?\nAnswer with the option's letter from the given choices directly."
                                       "['(A) the first', '(B) the second']"]),
    ("mantis", parquet, MANTIS_SHORT, [1, 2, "Given the images, answer the following short answer vqa question:\nQ: Which is "
                                             'red?\nYou can first give your analysis, and then give your final answer as "Final '
                                             'Answer:"']),
    ("mirb", parquet, MIRB, [1, "Answer with the option symbol.Which?\nA. one\nB. two"]),
    ("remi", parquet, REMI, ["Is", 1, "like", 2, "?"]),
    ("vstar", parquet, VSTAR, [1, "What colour is it?\nA. red\nB. blue\nC. green\nD. grey\n"
                                  "Answer with the option's letter from the given choices directly."]),
    ("hrbench-4k", tsv, HR, [1, "What colour?\nA. red\nB. blue\nC. green\nD. grey\nAnswer the option letter directly."]),
    ("treebench", tsv, TREE, [1, "Question: What colour?\nOptions:\nA. red\nB. blue\nC. green\nD. grey\n"
                                 "Answer with the correct option's letter directly. "]),
    ("mme-realworld-lite", parquet, MME,
     [1, "What colour? The choices are listed below:\n(A) red\n(B) blue\n(C) green\n(D) grey\n(E) none\nSelect the best answer "
         "to the above multiple-choice question based on the image. Respond with only the letter (A, B, C, D, or E) of the "
         "correct option.\nThe best answer is: "]),
    ("mmbench", tsv, MMBENCH, [1, "Question: What colour?\nOptions:\nA. red\nB. blue\n"
                                  "Please select the correct answer from the options above. "]),
    ("mat-coding", json_list, CODING, [1, "How many?\nAnswer the question directly. The answer should be very brief."]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "write", "row", "shown"), PROMPTS, ids=[f"{name}{i}" for i, (name, *_) in enumerate(PROMPTS)])
def test_the_prompt_of_a_benchmark(tmp_path, name, write, row, shown):
    benchmark, tasks = opened(tmp_path, name, write, [row], shuffle=False)
    assert [*benchmark.prompted(tasks[0]).shown] == shown


@pytest.mark.parametrize("name", ["hrbench-4k", "treebench", "vstar", "tsv"])
def test_options_with_a_gap_are_a_fault_not_other_letters(tmp_path, name):
    row = {"hrbench-4k": HR, "treebench": TREE, "vstar": FOUR, "tsv": FOUR}[name]
    with pytest.raises(ValueError, match="the row has options A, B, D and none for the letters between; write the options from"):
        opened(tmp_path, name, tsv, [row | {"C": ""}])
    _, tasks = opened(tmp_path, name, tsv, [row | {"D": ""}])
    assert tasks.facts[0].options[:1] != () and len(tasks.facts[0].options) == 3


@pytest.mark.parametrize("name", ["hrbench-4k", "treebench", "tsv", "own"])
def test_the_reference_of_a_benchmark_is_a_letter_also_where_options_are_letters(tmp_path, name):
    row = (TREE if name == "treebench" else HR) | {"A": "C", "B": "A", "C": "B", "D": "E", "answer": "B"}
    if name == "own":
        with pytest.raises(ValueError, match='the answer "B" means B and C of the options; write one letter of A to D'):
            opened(tmp_path, name, tsv, [row])
        return
    benchmark, tasks = opened(tmp_path, name, tsv, [row], shuffle=False)
    [fact] = tasks.facts
    assert (fact.answers, fact.options) == (("B",), ("C", "A", "B", "E"))
    assert [benchmark.metrics[""].strict(fact, reply) for reply in ("B", "(B)", "The answer is B", "C")] == [1, 1, 1, 0]
    [moved] = again(benchmark, tmp_path, seed=1, shuffle=True).facts
    assert moved.options[moved.letters.index(moved.answer)] == "A" and moved.options != fact.options
    _, tasks = opened(tmp_path, name, tsv, [row | {"answer": "E"}])
    assert tasks.facts[0].answer == "D"  # no letter of the row


def test_own_tasks_with_a_column_that_would_be_lost_are_refused_too(tmp_path):
    with pytest.raises(ValueError, match='the column "choices" is none of imagent-jax and would be lost'):
        opened(tmp_path, "own", json_list, [{"question": "?", "images": ["a.png"], "answer": "A", "choices": ["x", "y"]}])


def test_a_reference_on_another_place_of_the_question_is_the_image_of_that_number(tmp_path):
    _, tasks = opened(tmp_path, "remi", parquet, [REMI])
    assert tasks[0].images == (BLUE["bytes"], RED["bytes"])  # <image2> stands first


def test_mat_coding_starts_from_the_corrupted_picture_unless_a_box_is_asked_for(tmp_path):
    benchmark, tasks = opened(tmp_path, "mat-coding", json_list, [CODING, CODING | {"id": 8, "type": ["crop"]}])
    (tmp_path / "data" / "a_proc.png").write_bytes(picture("blue"))
    assert [task.images[0] for task in tasks] == [picture("blue"), picture("red")]
    assert [benchmark.groups(task) for task in tasks.facts][1] == {"split": "simple", "type": "crop"}


def test_options_of_vstar_are_shuffled_by_seed_and_unshuffled_on_request(tmp_path):
    rows = [VSTAR | {"question_id": i} for i in range(40)]
    benchmark, tasks = opened(tmp_path, "vstar", parquet, rows)
    answers = [task.answer for task in tasks.facts]
    assert {*answers} == {*"ABCD"} and all(task.options["ABCD".index(task.answer)] == "red" for task in tasks.facts)
    assert {task.answer for task in again(benchmark, tmp_path, shuffle=False).facts} == {"A"}
    assert [task.answer for task in again(benchmark, tmp_path, seed=1).facts] != answers


def test_rows_of_one_question_are_one_question(tmp_path):
    options = ["red", "blue", "green", "grey"]
    cycles = [dict(zip("ABCD", options[k:] + options[:k], strict=True)) for k in range(4)]
    rows = [
        HR | cycle | {"index": k, "answer": "BADC"[k], "cycle_category": f"single_cycle{k}"} for k, cycle in enumerate(cycles)
    ]
    benchmark, tasks = opened(tmp_path, "hrbench-4k", tsv, rows)
    assert len({benchmark.question(task) for task in tasks.facts}) == 1
    assert [task.options["ABCD".index(task.answer)] for task in tasks.facts] == ["blue"] * 4


def test_a_circular_question_is_asked_in_every_order(tmp_path):
    rows = [MMBENCH | {"C": "green", "D": "grey"}, MMBENCH | {"index": 4, "C": "", "D": ""}]
    benchmark, tasks = opened(tmp_path, "mmbench", tsv, rows)
    assert [task.uid for task in tasks.facts] == ["3", "1000003", "2000003", "3000003", "4", "1000004"]
    assert [task.options["ABCD".index(task.answer)] for task in tasks] == ["blue"] * 6 and len({*tasks.facts[1].options}) == 4
    assert [benchmark.question(task) for task in tasks.facts] == ["3"] * 4 + ["4"] * 2
    second = MMBENCH | {"index": 1000003, "image": "3", "A": "blue", "B": "red", "answer": "A", "C": "", "D": ""}
    tsv(tmp_path / "data", [*rows, second])
    tasks = again(benchmark, tmp_path)
    assert [task.uid for task in tasks.facts] == ["3", "1000003", "4"]  # the file has orders of its own
    assert [Opened(benchmark, tasks, False).count(limit) for limit in (1, 2, 3, None)] == [2, 2, 3, 3]  # whole questions


def test_boxes_of_treebench_are_those_of_the_reply():
    benchmark, _ = named("treebench")
    task = Task("t", "?", (), "B", "choice", meta={"target_instances": "[[0, 0, 10, 10], [20, 20, 30, 30]]"})
    iou = benchmark.metrics["mIoU"].published
    assert iou(task, "<box>[0,0,10,10]</box> and <box>[20,20,30,25]</box>") == pytest.approx((1 + 0.5) / 2)
    assert iou(task, "B") == 0 and iou(task, "<box>[10,10,0,0]</box>") == 0
    assert iou(replace(task, meta={"target_instances": "[]"}), "<box>[0,0,10,10]</box>") == 0


def test_boxes_of_treebench_may_stand_before_the_answer():
    """The reply is what stands in the answer markup; boxes are looked for in all that was written."""
    benchmark, _ = named("treebench")
    task = Task("t", "?", (), "B", "choice", options=("red", "blue"), meta={"target_instances": "[[0, 0, 10, 10]]"})
    text = "It is <box>[0,0,10,10]</box>.<answer>B</answer><|im_end|>"
    trajectory = finished(task, [text], "B")
    (row,) = scored(benchmark, [task], [{"uid": "t", "samples": [sample_of(trajectory, True, whole=True)]}])
    assert row["scores"] == {"": {"published": [1], "strict": [1]}, "mIoU": {"published": [1], "strict": [1]}}


def test_long_numbers_are_wrong_and_stop_nothing():
    metric, many = named("tir-bench")[0].metrics[""], "9" * 5000
    for kind, gold in (
        ("math", "12"),
        ("jigsaw", "1, 2, 3, 4"),
        ("spot_difference", "1, 2"),
        ("word_search", "1, 2"),
        ("math", "0.5"),
    ):
        task = Task("t", "?", (), gold, kind=kind, meta={"names": "a.jpg", "facts": {"difficulty": 2}})
        for reply in (many, many[:400], f"{many}, {many}"):
            assert metric.published(task, reply) == metric.strict(task, reply) == 0


def test_options_in_the_text_of_a_vstar_row_may_have_brackets(tmp_path):
    text = VSTAR["text"].replace("(A) red", "(A) red (dark)")
    _, tasks = opened(tmp_path, "vstar", parquet, [VSTAR | {"text": text}], shuffle=False)
    assert tasks.facts[0].options == ("red (dark)", "blue", "green", "grey")
    with pytest.raises(ValueError, match="not \\(A\\), \\(B\\) and so on"):
        opened(tmp_path, "vstar", parquet, [VSTAR | {"text": text.replace("(B)", "(C)", 1)}])


def test_a_dimension_of_mirb_is_the_mean_of_its_subsets():
    benchmark = named("mirb")[0]
    rows = [{"question": str(i), "uid": str(i), "groups": {"group": "Knowledge", "subset": "food" if i < 9 else "sightseeing"},
             "scores": {"": {"published": [float(i < 9)]}}} for i in range(12)]  # fmt: skip
    found = summary(rows, "", "published", benchmark)
    assert found["groups"]["group"]["Knowledge"]["mean"] == 0.5 and found["micro"]["mean"] == 0.75
    assert found["groups"]["group"]["Knowledge"]["count"] == 12


def test_own_options_are_shown_and_fixed_ones_are_not_shuffled(tmp_path):
    shown = named("own=x")[0].prompted(Task("o", "Which colour?", (b"x",), "B", "choice", options=("red", "blue"))).shown
    assert shown == (1, "Which colour?\nA. red\nB. blue")
    assert [name for name in TABLE if named(f"{name}=x")[0].fixed] == ["blink", "mantis", "mmiu"]
    cfg = Config().changed({"eval.prompt": "benchmark", "eval.shuffle_options": "on"})
    with pytest.raises(ValueError, match="set eval.shuffle_options to off"):
        open_benchmark(f"blink={tmp_path}", cfg, SimpleNamespace())


def test_groups_are_those_that_are_published(tmp_path):
    found = {}
    for name, write, row in (("muirbench", parquet, MUIR), ("mirb", parquet, MIRB), ("mme-realworld-lite", parquet, MME),
                             ("treebench", tsv, TREE), ("mmsearch", parquet, MMSEARCH)):  # fmt: skip
        (tmp_path / name).mkdir()
        benchmark, tasks = opened(tmp_path / name, name, write, [row])
        found[name] = benchmark.groups(tasks.facts[0])
    assert found == {
        "muirbench": {"task": "Ordering", "relation": "Temporal"}, "mirb": {"group": "Reasoning", "subset": "codeu"},
        "mme-realworld-lite": {"task": "Perception", "subtask": "Perception/OCR",
                               "category": "Perception/OCR/sign attribute/attribute"},
        "treebench": {"protocol": "Perception", "subtask": "Attributes"}, "mmsearch": {"area": "news", "subfield": "news/sport"},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("spec", "words"),
    [("vqa", "There is no benchmark 'vqa'"), ("tsv", "name its files as tsv=PATH"), ("vstar=/nowhere", "does not exist"),
     ("muirbench={}", "has no files of muirbench"), ("blink={}/x.tsv", "are not those of blink; it has question, choices")],
)  # fmt: skip
def test_what_is_no_benchmark_is_told_in_one_sentence(tmp_path, spec, words):
    (tmp_path / "empty").mkdir()
    tsv(tmp_path, [MMBENCH], "x.tsv")
    with pytest.raises(ValueError, match=words):
        benchmark, path = named(spec.format(tmp_path / "empty" if spec.startswith("muir") else tmp_path))
        benchmark.open(path, DataConfig(cache_dir=str(tmp_path)))
