"""MMSearch (arXiv 2409.12959), end to end, and MI-MMSearch: questions that need a search, short answers."""

from imagent_jax.data.formats import Fields, Row
from imagent_jax.evals.benchmark import QUESTION, Benchmark, images_of
from imagent_jax.evals.rules import Metric, best, strict_exact, strict_f1
from imagent_jax.scoring.text import f1
from imagent_jax.types import Task


def _references(row: Row) -> list[str]:
    others = row.pop("alternative_gt_answers", None) or []
    answer = row.pop("answer", None) or row.pop("gt_answer", None)
    return [*(answer if isinstance(answer, list) else [answer]), *(others if isinstance(others, list) else [others])]


def _read_mmsearch(row: Row) -> Fields:
    images = images_of(row, "query_image")
    return Fields(row.pop("query"), images, _references(row), None, row.pop("sample_id"), row.pop("area", None))


def _read_mi(row: Row) -> Fields:
    images = images_of(row, "image", "img_2", "img_3")
    kind = f"{len(images)} images" if len(images) != 1 else "1 image"
    return Fields(row.pop("question"), images, _references(row), None, row.pop("index"), kind)


def groups(task: Task) -> dict[str, str]:
    subfield = task.meta.get("subfield")
    return {"area": task.kind} | ({"subfield": f"{task.kind}/{subfield}"} if subfield else {})


MMSEARCH = Benchmark(
    name="mmsearch",
    title="MMSearch, end to end (300)",
    hub="CaraJ/MMSearch",
    split="end2end",
    configs=("end2end",),
    needs=("query", "answer|gt_answer"),
    read=_read_mmsearch,
    metrics={"F1": Metric(best(f1), best(strict_f1))},
    template=lambda task: QUESTION,
    answer_type="f1",
    groups=groups,
)
MI_MMSEARCH = Benchmark(
    name="mi-mmsearch",
    title="MI-MMSearch (339)",
    hub="kartiknarayan/MI-MMSearch",
    split="train",
    needs=("question", "answer", "image"),
    read=_read_mi,
    template=lambda task: QUESTION,
    answer_type="f1",
    judged=True,
    metrics={"EM": Metric(None, best(strict_exact)), "F1": Metric(None, best(strict_f1))},
)
