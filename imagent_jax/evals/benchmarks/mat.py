"""MAT and the text benchmarks of Visual-ARFT (arXiv 2505.14246): F1 and exact match of short answers.

The published rule is that of the notebooks in Liuziyu77/Visual-RFT, commit 94866331. Its known faults: an option "A" is an
article, so that any answer of no words is right; decimal points and signs are deleted; a group is a position in the file, so that
a missing row moves others to another group; divisors are fixed for MAT-Coding and the row count for text benchmarks.
"""

import re
import string
from dataclasses import replace
from functools import partial

from imagent_jax.data.formats import Fields, Row
from imagent_jax.evals.benchmark import QUESTION, Benchmark, images_of
from imagent_jax.evals.rules import Metric, best, strict_exact, strict_f1

_CHINESE_MARKS = "！？｡＂＃＄％＆＇（）＊＋，－．／：；＜＝＞＠［＼］＾＿｀｛｜｝～“”‘’、。：《》【】"
_CHINESE = re.compile("[\u4e00-\u9fff]")
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def normalise(text: str, chinese: bool = False) -> str:
    """Return a text as the published rule compares it: lower case, without punctuation and articles, single spaces.

    Args:
        chinese: as for MAT-Coding: Chinese punctuation goes too, and a text with a Chinese character only loses its spaces.
    """
    marks = string.punctuation + (_CHINESE_MARKS if chinese else "")
    text = "".join(char for char in text.lower() if char not in marks)
    if chinese and _CHINESE.search(text):
        return text.replace(" ", "")
    return " ".join(_ARTICLES.sub(" ", text).split())


def exact_match(reply: str, answer: str, chinese: bool = False) -> float:
    """Return 1 if both texts are equal after `normalise`, else 0."""
    return float(normalise(reply, chinese) == normalise(answer, chinese))


def f1(reply: str, answer: str, chinese: bool = False) -> float:
    """Return the published F1: distinct common tokens, over token counts in which repetitions count. Equal texts score 1.

    Tokens are words. With `chinese`, they are characters, spaces included, if either text has a Chinese one.
    """
    a, b = (normalise(text, chinese) for text in (reply, answer))
    if a == b:
        return 1.0
    by_character = chinese and _CHINESE.search(a + b)
    a, b = (list(text) if by_character else text.split() for text in (a, b))
    return 2 * len({*a} & {*b}) / max(len(a) + len(b), 1)


TEXT = {"F1": Metric(best(f1), best(strict_f1)), "EM": Metric(best(exact_match), best(strict_exact))}
CODING = {
    "F1": Metric(best(partial(f1, chinese=True)), best(strict_f1)),
    "EM": Metric(best(partial(exact_match, chinese=True)), best(strict_exact)),
}
"""The metrics of text benchmarks and MAT-Search, and those of MAT-Coding."""


# ---- the benchmarks ---------------------------------------------------------------------------------------------------

SIMPLE = 75
"""Questions of MAT-Search that are simple: the first. The others are hard."""
DIRECT = f"{QUESTION}\nAnswer the question directly. The answer should be very brief."
"""The published prompt of models that answer without tools."""


def _read_coding(row: Row) -> Fields:
    """Take the corrupted picture; of a question that names a box, the picture itself."""
    types = row.get("type") or []
    image = "ori_image_path" if "crop" in (types if isinstance(types, list) else [types]) else "processed_image_path"
    images, kind = [row[image]], row.pop("split", None)
    return Fields(row.pop("question"), images, row.pop("answers"), None, row.pop("id"), kind)


def _read_search(row: Row) -> Fields:
    """Take the fields out of a row; its group follows from its id, a number from 1 to 150."""
    uid = row.pop("id", None)
    kind = ("simple" if uid <= SIMPLE else "hard") if isinstance(uid, int) else None
    return Fields(row.pop("question"), images_of(row, "image_path"), row.pop("answer"), None, uid, kind)


def _read_text(row: Row) -> Fields:
    return Fields(row.pop("question"), [], row.pop("golden_answers"), None, row.pop("id"))


def _type_of(task) -> dict[str, str]:
    types = task.meta.get("type") or []
    return {"split": task.kind, "type": " + ".join(types if isinstance(types, list) else [types])} if task.kind else {}


MAT_CODING = Benchmark(
    name="mat-coding",
    title="MAT-Coding (200)",
    needs=("question", "answers", "processed_image_path"),
    read=_read_coding,
    metrics=CODING,
    template=lambda task: DIRECT,
    answer_type="set_f1",
    groups=_type_of,
    loop="coding",
)
MAT_SEARCH = Benchmark(
    name="mat-search",
    title="MAT-Search (150)",
    needs=("question", "answer", "image_path"),
    read=_read_search,
    metrics=TEXT,
    template=lambda task: DIRECT,
    answer_type="set_f1",
    groups=lambda task: {"split": task.kind} if task.kind else {},
    loop="search",
)


def text_benchmark(name: str, title: str) -> Benchmark:
    """Return a text benchmark in FlashRAG's form: `id`, `question`, `golden_answers`."""
    return replace(MAT_SEARCH, name=name, title=title, needs=("question", "golden_answers"), read=_read_text)


TWO_WIKI, HOTPOTQA = text_benchmark("2wiki", "2WikiMultihopQA (12,576)"), text_benchmark("hotpotqa", "HotpotQA (7,405)")
MUSIQUE, BAMBOOGLE = text_benchmark("musique", "MuSiQue (2,417)"), text_benchmark("bamboogle", "Bamboogle (125)")
