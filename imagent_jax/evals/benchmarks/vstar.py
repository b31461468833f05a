"""V* Bench (arXiv 2312.14135): details in photographs of high resolution. The released answers are nearly all "A"."""

import re

from imagent_jax.data.check import RowError
from imagent_jax.data.fields import lettered
from imagent_jax.data.formats import Fields, Row
from imagent_jax.evals.benchmark import Benchmark, images_of, with_letter
from imagent_jax.evals.extraction import chooses
from imagent_jax.types import Task

_OPTION = re.compile(r"\(([A-D])\)\s*(.+?)\s*(?=\([A-D]\)|\Z)", re.DOTALL)
_PATTERNS = (
    r"^([A-D])",
    r"(?:ANSWER|CHOICE|OPTION)(?:\s+IS)?[\s:]+([A-D])",
    r"\(([A-D])\)",
    r"([A-D])\s*(?:\.|\)|])",
    r"(?:^|\s)([A-D])(?:\s|$)",
)


def read(row: Row) -> Fields:
    """Read a row of the hub (`text` with the options in it) or of VLMEvalKit's TSV (columns A to D)."""
    images, kind = images_of(row, "image"), row.pop("category", None)
    if "text" not in row:
        return Fields(row.pop("question"), images, row.pop("answer"), lettered(row), row.pop("index"), kind)
    text = re.sub(r"\n?Answer with the option's letter.*", "", row.pop("text"), flags=re.DOTALL).strip()
    options = _OPTION.findall(text)
    if [letter for letter, _ in options] != [*"ABCD"[: len(options)]]:
        raise RowError("bad options", "the options in the text are not (A), (B) and so on in order; mend the row")
    options = [option for _, option in options]
    return Fields(text.split("(A)")[0].strip(), images, row.pop("label"), options, row.pop("question_id", None), kind)


def published(task: Task, reply: str) -> str:
    """Return the option by the first of five patterns that fits the reply in capitals: lmms-eval.

    Known fault: the first letter of the first word counts ("Based on" is B, "Certainly" is C, "A red car" is A).
    """
    reply = reply.strip().upper()
    for pattern in _PATTERNS:
        if found := re.search(pattern, reply):
            return found[1]
    found = re.findall("[A-D]", reply)
    return found[0] if len(found) == 1 else ""


BENCHMARK = Benchmark(
    name="vstar",
    title="V* Bench (191)",
    hub="lmms-lab-encoder/vstar-bench",
    shuffle=True,
    needs=("text|question", "label|answer", "image"),
    read=read,
    metrics=chooses(published),
    template=with_letter("Answer with the option's letter from the given choices directly."),
)
