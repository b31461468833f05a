"""TreeBench (arXiv 2507.07999): perception and reasoning on dense photographs, with the boxes of what a question is about."""

import json
import re

import numpy as np

from imagent_jax.data.fields import lettered
from imagent_jax.data.formats import Fields, Row
from imagent_jax.evals.benchmark import QUESTION, Benchmark, images_of, option_lines
from imagent_jax.evals.extraction import chooses, first_capital
from imagent_jax.evals.rules import Metric
from imagent_jax.scoring.boxes import iou as box_iou
from imagent_jax.types import Task

_BOX = re.compile(r"<box>\s*\[(\d+),(\d+),(\d+),(\d+)\]\s*</box>")


def read(row: Row) -> Fields:
    images = images_of(row, "image")
    return Fields(row.pop("question"), images, row.pop("answer"), lettered(row), row.pop("index"), row.pop("category"))


def template(task: Task) -> str:
    return f"Question: {QUESTION}\nOptions:\n{option_lines(task)}\nAnswer with the correct option's letter directly. "


def iou(task: Task, reply: str) -> float:
    """Return the mean, over target boxes, of the best IoU of a box `<box>[x1,y1,x2,y2]</box>` in a text, in pixels."""
    targets = task.meta.get("target_instances") or "[]"
    targets = np.asarray(json.loads(targets) if isinstance(targets, str) else targets, float).reshape(-1, 4)
    boxes = np.asarray(_BOX.findall(reply), float).reshape(-1, 4)
    boxes = boxes[np.all(boxes[:, :2] < boxes[:, 2:], axis=1)]
    if not len(boxes) or not len(targets):
        return 0.0
    return float(box_iou(targets, boxes).max(1).mean())


def groups(task: Task) -> dict[str, str]:
    protocol, _, subtask = task.kind.partition("/")
    return {"protocol": protocol, "subtask": subtask or protocol}


BENCHMARK = Benchmark(
    name="treebench",
    title="TreeBench (405)",
    hub="",
    needs=("question", "A", "answer", "image", "category"),
    read=read,
    metrics=chooses(first_capital) | {"mIoU": Metric(iou, iou, whole=True)},
    template=template,
    groups=groups,
)
