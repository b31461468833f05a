"""Rows of every format that people bring, as they are written and as tasks; helpers that write and read them."""

import base64
import csv
import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from imagent_jax.data.files import open_file
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
SEVERAL = [  # messages that stand as text, and marks in the parts of a message
    {"messages": json.dumps(MESSAGES["messages"]), "images": ["1.png"]},
    {"prompt": json.dumps(MESSAGES["messages"][:2]), "images": ["1.png"], "answer": "a dog"},
    *({"prompt": [{"role": "user", "content": [{"type": "text", "text": text} for text in texts]}], "images": ["1.png"],
       "solution": "a dog"} for texts in (["<image>\nWhat is it?"], ["<image1>", "What is it?"])),
]  # fmt: skip
INSIDE = [  # images that stand in the parts of a message, in every form
    {"type": "image", "image": "1.png"}, {"type": "image", "path": "1.png"}, {"type": "image", "base64": B64[0]},
    {"image": "1.png"}, {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": B64[0]}},
]  # fmt: skip
PAIR = [{"type": "image", "image": name} for name in ("1.png", "2.png")]


def asked(*parts, **columns):
    """A row of a conversation: a message of these parts, and its answer."""
    content = [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]
    answer = {"role": "assistant", "content": [{"type": "text", "text": "a dog"}]}
    return {"messages": [{"role": "user", "content": content}, answer]} | columns


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
    *[(".jsonl", row, ("What is it?", (), (ONE,), ("a dog",), "exact"), {}, {}) for row in SEVERAL],
    (".jsonl", {"prompt": [{"role": "user", "content": [
        {"type": "text", "text": "<image> or"}, {"type": "image", "text": None},
        {"type": "text", "text": "<image1>, <image2>?"}]}], "images": ["1.png", "2.png"], "answer": "no"},
     ("[Image 1] or [Image 2] Image 1, Image 2?", (1, "or", 2, "Image 1, Image 2?"), (ONE, TWO), ("no",), "exact"), {}, {}),
    (".jsonl", {"prompt": "[{a: 1}] Which?", "answer": "b"}, ("[{a: 1}] Which?", (), (), ("b",), "exact"), {}, {}),
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
    (".tsv", MMVET | {"answer": "['UCSD', 'University of California']"},
     ("How many?", (), (TWO, ONE), ("UCSD", "University of California"), "exact"), {}, {}),
    (".tsv", MMVET | {"answer": "['red', 'blue']", "answer_type": "set"},
     ("How many?", (), (TWO, ONE), ("['red', 'blue']",), "set"), {}, {}),
    (".tsv", MMVET | {"answer": "[1, 2, 9, 9]", "answer_type": "box"},
     ("How many?", (), (TWO, ONE), ("[1, 2, 9, 9]",), "box"), {}, {}),
    (".jsonl", {"id": "v", "question": "Which?", "options": ["x", "y"], "answer": "B", "task": "sums", "info": {"level": 1}},
     ("Which?", (), (), ("B",), "choice"), {"options": ("x", "y"), "kind": ""}, {"task": "sums", "info": {"level": 1}}),
    *[(".jsonl", {"question": "How many?", "answer": "two", "task": "t", "info": 1, name: value},
       ("How many?", (), (), ("two",), "exact"), {name: value if name != "tools" else ()}, {"task": "t", "info": 1})
      for name, value in {"tools": [], "reward": {"format": 0}, "uid": "u", "kind": "k"}.items()],
    (".jsonl", OWN, ("Is [Image 1] like [Image 2] ?", ("Is", 1, "like", 2, "?"), (ONE, TWO), ("C", "A"), "choice"),
     {"uid": "a", "kind": "likeness", "options": ("red", "green", "blue")}, {"note": 3}),
    *[(".jsonl", asked(part, {"text": "What is it?"}), ("What is it?", (), (ONE,), ("a dog",), "exact"), {}, {})
      for part in INSIDE],
    (".jsonl", asked(PAIR[0], "and", PAIR[1], "Is <image 1> it?", answer="<image 2>"),
     ("[Image 1] and [Image 2] Is Image 1 it?", (1, "and", 2, "Is Image 1 it?"), (ONE, TWO), ("Image 2",), "exact"), {}, {}),
    (".jsonl", {"question": [*PAIR, {"text": "Which?"}], "options": ["<image 1>", "<image_2>"], "answer": "<image 2>"},
     ("Which?", (), (ONE, TWO), ("B",), "choice"), {"options": ("Image 1", "Image 2")}, {}),
    *[(suffix, {"index": index, "image": None, "question": "Which?", "answer": "2", "images": images, "note": 3},
       ("Which?", (), shown, ("2",), "exact"), {"uid": "train:1"}, {"note": 3})
      for suffix in (".parquet", ".jsonl")
      for index, images, shown in ((None, ["1.png"], (ONE,)), (7, ["1.png"], (ONE,)), (7, None, ()), (None, None, ()))],
    (".jsonl", {"prompt": None, "problem": "Which?", "answer": "two"}, ("Which?", (), (), ("two",), "exact"), {}, {}),
    (".jsonl", {"messages": None, "image": "1.png", "conversations": LLAVA["conversations"]},
     ("What is it? [Image 1]", ("What is it?", 1), (ONE,), ("a dog",), "exact"), {}, {}),
    (".jsonl", {"messages": None, "prompt": "", "reward_model": {}, "question": "Which?", "answer": "2"},
     ("Which?", (), (), ("2",), "exact"), {}, {}),
    (".jsonl", PYVISION | {"image_path": None}, ("Which? (A) red (B) blue", (), (), ("B",), "choice"),
     {"uid": "v1", "kind": "color"}, {}),
    (".jsonl", PYVISION | {"image_path": None, "uid": "u"}, ("Which? (A) red (B) blue", (), (), ("B",), "exact"),
     {"uid": "u", "kind": ""}, {"id": "v1", "ability": "color"}),
    (".tsv", MMBENCH | {"image": ""}, ("Look.\nWhich?", (), (), ("B",), "choice"),
     {"uid": "5", "kind": "color", "options": ("red", "blue")}, {}),
    (".jsonl", asked("What is it?", answer="B"), ("What is it?", (), (), ("B",), "choice"), {}, {}),
    (".jsonl", {"messages": asked("What is it?")["messages"][:1], "solution": "<answer>cat</answer>"},
     ("What is it?", (), (), ("cat",), "exact"), {}, {}),
    (".jsonl", {"problem": "1 + 1?", "solution": "One and one is 2.", "answer": "2"}, ("1 + 1?", (), (), ("2",), "number"), {},
     {"solution": "One and one is 2."}),
    *[(".jsonl", {"prompt": "Who?", "reward_model": model, "data_source": "nq"}, ("Who?", (), (), ("Ada", "A. L."), "exact"),
       {"kind": "nq"}, {})
      for answers in [{"ground_truth": {"target": ["Ada", "A. L."]}}] for model in (answers, json.dumps(answers))],
    *[(".jsonl", {"question": "Which?", "options": options, "answer": answer}, ("Which?", (), (), ("B",), "choice"),
       {"options": ("red", "blue")}, {})
      for options in (["A. red", "B. blue"], ["(A) red", "(B) blue"], ["A: red", "B: blue"])
      for answer in ("B", "blue", options[1])],
    (".jsonl", {"question": "Which?", "answer": "A", "a": 1, "b": 2, "A": "x", "B": None}, ("Which?", (), (), ("A",), "exact"),
     {}, {"a": 1, "b": 2, "A": "x"}),
    (".jsonl", {"question": "Which?", "options": ["A:B is 2", "B. blue"], "answer": "B"}, ("Which?", (), (), ("B",), "choice"),
     {"options": ("A:B is 2", "B. blue")}, {}),
    (".jsonl", {"question": "<|im_end|> 1 + 1?", "answer": 2}, ("<|im_end|> 1 + 1?", (), (), ("2",), "exact"), {}, {}),
]  # fmt: skip
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
    (ASKED | {"images": "[1.png, 2.png]"}, '"[1.png, 2.png]" is no list of images; put each path in quotes', "bad images"),
    (ASKED | {"images": "['1.png', 2.png]"}, "is no list of images; put each path in quotes", "bad images"),
    ({"messages": "[{'role': 'user', 'content': 'a'}]"}, '"messages" begins as a list of messages and is not', "no question"),
    (MMVET | {"A": "x", "B": "y", "D": "z", "answer": "A"}, "the row has options A, B, D and none", "bad options"),
    (MMVET | {"A": " ", "B": "y", "answer": "B"}, "the row has options B and none", "bad options"),
    (ASKED | {"video": "a.mp4"}, 'the column "video" is none of imagent-jax and would be lost', "unread column"),
    (ASKED | {"audios": ["a.wav"], "images": []}, 'the column "audios" is none of imagent-jax', "unread column"),
    ({"file_name": "1.png", "question": "?", "answer": "b"}, 'the column "file_name" is none of imagent-jax', "unread column"),
    ({"bytes": B64[0], "question": "?", "answer": "b"}, 'the column "bytes" is none of imagent-jax', "unread column"),
    (ASKED | {"choices": ["a", "b"]}, 'the column "choices" is none of imagent-jax', "unread column"),
    (PYVISION | {"options": ["red", "blue"]}, 'the column "options" is none of PyVision', "unread column"),
    ({"index": 1, "question": "?", "image": "1.png", "multi-choice options": ["x", "y"], "answer": "A"},
     'the column "multi-choice options" is none of VLMEvalKit', "unread column"),
    (ASKED | {"question": "<image 2>?"}, '"<image 2>" names an image that the row, with 1 images, does not', "marks and images"),
    (ASKED | {"question": "<image_0>?"}, "they are counted from 1", "marks and images"),
    (ASKED | {"options": ["<image 2>", "b"]}, '"<image 2>" names', "marks and images"),
    (ASKED | {"question": "<image 1><image>?"}, "with and without number", "marks and images"),
    (ASKED | {"images": ["1.png", "2.png"], "options": ["<image>", "b"]}, "has 1 marks", "marks and images"),
    (MAT | {"type": "pre_code", "solution": " <code>```python\n```</code>"}, "is a step (code) towards", "a step, no answer"),
    ({"image_path": "1.png", "problem": "a", "solution": "<search> b </search>"}, "is a step (search)", "a step, no answer"),
    ({"question": "?", "answer": None}, "the row has no answer", "no answer"),
    *[(asked(PAIR[0], text, *more, **columns), f"the message holds images itself ({len(more) + 1})", "marks and images")
      for columns in ({}, {"images": ["2.png"]})
      for text, more in (("<image> is?", ()), ("Is <image>?", (PAIR[1],)))],
    (asked(PAIR[0], "Is <image 1> it?", images=["2.png"]), 'besides 0 marks "<image>" and 1 images of a', "marks and images"),
    (asked(PAIR[0], {"type": "image"}, "<image 1>?", images=["2.png"]), "besides 1 marks", "marks and images"),
    (asked(PAIR[0], "<image 2>?"), '"<image 2>" names an image that the row, with 1 images, does not', "marks and images"),
    ({"prompt": asked(PAIR[0], "<image>?")["messages"][:1], "images": ["2.png"], "answer": "1"}, "besides 1", "marks and images"),
    ({"question": [PAIR[0], "Which?"], "options": ["<image>", "b"], "answer": "b"}, "besides 1 marks", "marks and images"),
    (asked({"type": "text", "text": "a?", "image": "1.png"}), "has a part of text with an image", "not text or image"),
    (asked({"type": "image", "text": "a?", "image": "1.png"}), "has a part of text with an image", "not text or image"),
    *[({"messages": [{"role": role, "content": [PAIR[0]]}, *asked("a?")["messages"]][:count], "answer": "b"},
       f'a message of "{role}" holds an image', "not text or image") for role, count in (("system", 2), ("system", 3))],
    ({"messages": [*asked("a?")["messages"][:1], {"role": "assistant", "content": PAIR}]}, 'a message of "assistant" holds',
     "not text or image"),
    *[({"prompt": asked("a?")["messages"], **columns}, 'of "user", "assistant"; a task is one message of', "several turns")
      for columns in ({"reward_model": {"ground_truth": "b"}}, {"answer": "b"}, {"answer": "b", "info": {}})],
    *[({"question": "?", "answer": "B", **dict.fromkeys(names, 0 if names[0] == "A" else "x")},
       f'the column "{names[0]}" is none of imagent-jax', "unread column")
      for names in ("AB", ("option_a", "option_b"), ("choice1", "choice2"))],
    ({"question": "?", "options": ["B. x", "A. y"], "answer": "B"}, "the options begin with the letters B, A", "bad options"),
    ({"prompt": "a", "multi_modal_data": {"image": ["1.png"]}, "answer": "b"}, 'the column "multi_modal_data"', "unread column"),
    (ASKED | {"image": "2.png"}, 'the column "image" is none of imagent-jax', "unread column"),
    ({"index": 1, "question": "?", "image": "1.png", "img_2": "2.png", "answer": "b"}, 'the column "img_2"', "unread column"),
    *[({"question": "?", "answer": "b"} | columns, f'the column "{[*columns][0]}" is none of imagent-jax', "unread column")
      for columns in ({"image1": "1.png", "image2": "2.png"}, {"image_0": "1.png"}, {"image_2": "1.png"}, {"img": "1.png"},
                      {"image_url": "1.png"}, {"image_paths": ["1.png"]}, {"pictures": ["1.png"]})],
    ({"question": "?", "answer": "b", "image_1": "1.png", "image_3": "2.png"}, 'the column "image_3"', "unread column"),
    ({"question": "?", "answer": "b", "image_1": "1.png", "image_2": None, "image_3": "2.png"},
     '"image_2" is empty and a later one is not', "bad images"),
    ({"imagent_task": {"uid": "a"}, "images": ["1.png"]}, "the record is none that `imagent data` writes", "bad record"),
    ({"imagent_task": {"uid": "a", "question": "?", "answer": "1"}, "images": ["1.png"]}, "(images are missing)", "bad record"),
]  # fmt: skip
