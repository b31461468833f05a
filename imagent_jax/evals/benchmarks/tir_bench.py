"""TIR-Bench (arXiv 2511.01833): thirteen tasks that need tools on images; some answers are scored in part."""

import json
import math
import re

from imagent_jax.data.formats import Fields, Row
from imagent_jax.evals.benchmark import QUESTION, Benchmark, images_of
from imagent_jax.evals.rules import Metric, strict_choice, strict_exact
from imagent_jax.scoring import number
from imagent_jax.types import Task

_OCR = {"60.jpg": "mobi", "62.jpg": "aires"}
"""References that the published scorer replaces, by the name of the image."""
_LETTERS = "ABCDEFGHIJ"


def read(row: Row) -> Fields:
    image = row["image_1"]
    row["names"] = str(image.get("path") if isinstance(image, dict) else image)[-80:]
    facts = row.pop("meta_data", None) or row.pop("metadata", None) or {}
    row["facts"] = json.loads(facts) if isinstance(facts, str) else facts
    kind, images = row.pop("task", None) or row.pop("category", None), images_of(row, "image_1", "image_2")
    return Fields(row.pop("prompt"), images, row.pop("answer"), None, row.pop("id", None), kind)


def _integers(text: str) -> list[int]:
    return [int(word) for word in re.findall(r"\d{1,18}", text)]  # longer ones: Python refuses to read them from 4,300 digits on


def _overlap(a: list[int], b: list[int]) -> float:
    return len({*a} & {*b}) / len({*a} | {*b}) if {*a} | {*b} else 1.0


def _pair(text: str) -> list[int]:
    """Return the first two numbers with a comma between them; [] without any."""
    found = re.search(r"\b(\d{1,18})\s*,\s*(\d{1,18})\b", text)
    return [*map(int, found.groups())] if found else []


def _jigsaw(task: Task, reply: str) -> float:
    """Return the share of places that are right, of the first run of n x n numbers; 0 without one."""
    count = int(task.meta["facts"].get("difficulty", 0)) ** 2
    runs = [_integers(run) for run in re.findall(r"[\d\s,，]+", reply)]
    found = next((run for run in runs if len(run) == count), None)
    wanted = _integers(task.answer)
    return 0.0 if not found else sum(a == b for a, b in zip(found, wanted, strict=False)) / count


def _is(kind: type, text: str) -> bool:
    try:
        return math.isfinite(kind(text))
    except (ValueError, OverflowError):  # Python reads no integer of more than 4,300 digits
        return False


def _letter(task: Task, said: str) -> str:
    """Return the option letter by the published rule: the option whose text the prompt has after its letter, else the nearest.

    Known fault: an answer of no words is an option too.
    """
    if said not in [*_LETTERS]:
        for letter in _LETTERS:
            if any(f"{letter}{mark}{said}" in task.question for mark in (". ", ".", " ", "")):
                said = letter
        if said not in [*_LETTERS]:  # the edit distance to a letter is one less where it stands in the text
            said = next((letter for letter in _LETTERS if letter in said), "A")
    return said


def published(task: Task, reply: str) -> float:
    """Return the score by task and type of reference. A judge reads the answer out of the reply; here the reply is what it read.

    Known faults: an empty answer is an option; a decimal number must be equal to the last bit; a letter in an OCR answer is right
    if the reply has it anywhere. math-verify, which the published code asks last about numbers, is not.
    """
    said, gold = reply.replace("*", "").strip(), task.answer
    if task.kind == "ocr":
        gold = next((text for name, text in _OCR.items() if name in task.meta["names"]), gold)
        return float(gold in reply)
    if task.kind == "jigsaw":
        return _jigsaw(task, said)
    if task.kind == "word_search" and not _is(int, gold):
        return float(bool(_pair(said)) and _pair(said) == _pair(gold))
    if task.kind == "spot_difference" and not _is(int, gold):
        return _overlap(_integers(said), _integers(gold))
    if gold.isalpha():
        return float(_letter(task, said) == gold if len(gold) == 1 else sorted(gold) == sorted(said))
    bare = re.sub(r"[A-Za-z*:\s]+", "", said)
    kind = int if _is(int, gold) else float
    return float(_is(kind, gold) and _is(kind, bare) and kind(bare) == kind(gold))


def strict(task: Task, reply: str) -> float:
    """Return the score of what the reply says and nothing else: options by name, numbers as numbers, texts as texts."""
    said, gold = reply.strip(), task.answer
    if task.kind == "jigsaw":
        return _jigsaw(task, said) if re.fullmatch(r"[\d\s,，\[\]]+", said) else 0.0
    if task.kind == "spot_difference" and not _is(int, gold):
        return _overlap(_integers(said), _integers(gold)) if re.fullmatch(r"[\d\s,，\[\]]+", said) else 0.0
    if task.kind == "word_search" and not _is(int, gold):
        return float(re.sub(r"[()\[\]\s]", "", said) == re.sub(r"[()\[\]\s]", "", gold))
    if _is(float, gold):
        return number(said, gold)
    if task.kind != "ocr" and gold.isalpha() and gold.isupper():
        return strict_choice(task, said) if len(gold) == 1 else float(sorted(gold) == sorted(re.sub(r"[\s,]", "", said)))
    return strict_exact(said, gold)


BENCHMARK = Benchmark(
    name="tir-bench",
    title="TIR-Bench (1,215)",
    hub="Agents-X/TIR-Bench",
    needs=("prompt", "answer", "image_1", "task|category"),
    read=read,
    metrics={"": Metric(published, strict)},
    template=lambda task: QUESTION,
    judged=True,
)
