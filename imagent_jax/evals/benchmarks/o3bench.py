"""O3-Bench and VisualProbe, and the common row in which InSight-o3 ships five sets: questions on large images, some with options.

Row: `image` or `file_name`, `question`, `options` as lines "A. ..." (may be absent), `answer`, `subset` or `category`.
"""

import re

from imagent_jax.data.formats import Fields, Row
from imagent_jax.evals.benchmark import QUESTION, Benchmark, images_of, option_lines
from imagent_jax.evals.extraction import bare_option
from imagent_jax.evals.rules import Metric, open_answer
from imagent_jax.types import Task

_OPTION = re.compile(r"^\s*\(?[A-Z]\)?[.:)]\s*(.+?)\s*$", re.MULTILINE)


def read(row: Row) -> Fields:
    images, options = images_of(row, "image", "file_name", "images"), row.pop("options", None)
    options = _OPTION.findall(options) if isinstance(options, str) else [*map(bare_option, options or ())]
    kind = row.pop("subset", None) or row.pop("category", None)
    answer = row.pop("answer") if "answer" in row else row.pop("solution")
    question = row.pop("question") if "question" in row else row.pop("problem")
    return Fields(question, images, answer, options or None, row.pop("id", None), kind)


def template(task: Task) -> str:
    return f"{QUESTION}\n{option_lines(task)}" if task.options else QUESTION


def published(task: Task, reply: str) -> float:
    """Return 1 if the last boxed text, or the reply without one, is the reference to the letter; else a judge is asked.

    Known fault: an open answer is right if "correct" stands in the judge's verdict, so that "incorrect" is right too.
    """
    boxed = re.findall(r"\\boxed\{([^{}]*)\}", reply)
    return float((boxed[-1] if boxed else reply).strip() in task.answers)


def benchmark(name: str, title: str, hub: str = "", **how) -> Benchmark:
    return Benchmark(
        name=name,
        title=title,
        hub=hub,
        needs=("question|problem", "answer|solution", "image|file_name|images"),
        read=read,
        metrics={"": Metric(published, open_answer)},
        template=template,
        judged=True,
        **how,
    )


O3 = benchmark("o3-bench", "O3-Bench", "m-Just/O3-Bench")
VISUALPROBE = benchmark("visualprobe", "VisualProbe (of Mini-o3)", split="val")
COMMON = benchmark("insight-o3", "InSight-o3's common row (V*, HR-Bench 4K, TreeBench, VisualProbe-Hard, MME-RealWorld-Lite)")
