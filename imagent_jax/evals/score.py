"""Scores of anybody's predictions: `python -m imagent_jax.score PREDICTIONS.json --benchmark mat-coding [--out RESULT.json]`.

A prediction is an object with `pred_answer` (text, or null where there is no answer), `gt` (a reference or a list of them) and,
where the benchmark has one, `id`: the form of the predictions that Visual-ARFT released. The published score stands beside a
strict one, and the rows on which both rules differ are listed.
"""

import argparse
import hashlib
import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from imagent_jax.evals.benchmarks.mat import CODING, TEXT
from imagent_jax.evals.rules import Metric
from imagent_jax.types import Task, quote

Row = dict[str, Any]


class Form(NamedTuple):
    """A benchmark whose predictions can be scored.

    Attributes:
        rows: questions of the whole benchmark.
        simple: how many of the first questions are the group "simple"; the others are "hard". 0: no groups.
        fixed: the published rule divides by the sizes of the whole benchmark, not by the number of rows.
    """

    metrics: dict[str, Metric]
    rows: int
    simple: int = 0
    fixed: bool = False


FORMS = {
    "mat-coding": Form(CODING, 200, 70, fixed=True), "mat-search": Form(TEXT, 150, 75), "2wiki": Form(TEXT, 12576),
    "hotpotqa": Form(TEXT, 7405), "musique": Form(TEXT, 2417), "bamboogle": Form(TEXT, 125),
}  # fmt: skip


def read_predictions(path: Path) -> list[Row]:
    """Read a JSON list or JSON Lines of predictions.

    Raises:
        ValueError: the file cannot be read, or a row is no prediction; the sentence names the row.
    """
    try:
        text = path.read_text()
        rows = json.loads(text) if text.lstrip()[:1] == "[" else [json.loads(line) for line in text.split("\n") if line.strip()]
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}); name a JSON list or JSON Lines of predictions.") from None
    for number, row in enumerate(rows, 1):
        row = row if isinstance(row, dict) else {}
        references = row.get("gt") if isinstance(row.get("gt"), list) else [row.get("gt")]
        if not references or not all(isinstance(reference, str) for reference in references):
            raise ValueError(f"{path}, row {number}: there is no reference; write 'gt' as text or a list of texts.")
        if "pred_answer" not in row or not isinstance(row["pred_answer"], str | None):
            raise ValueError(f"{path}, row {number}: there is no prediction; write 'pred_answer' as text, or null for none.")
    if not rows:
        raise ValueError(f"{path} has no predictions; write at least one row.")
    return rows


def _places(rows: Sequence[Row], form: Form, path: Path) -> list[int] | None:
    """Return the place of each row in the benchmark, from 0: by its id, else by its position where no row is missing.

    None: unknown.

    Raises:
        ValueError: two rows have the same id, or there are more rows than questions.
    """
    if len(rows) > form.rows:
        raise ValueError(f"{path} has {len(rows):,} rows and the benchmark {form.rows:,}; score another benchmark or fewer rows.")
    ids = [row.get("id") for row in rows]
    repeated = [name for name, count in Counter(name for name in ids if name is not None).items() if count > 1]
    if repeated:
        raise ValueError(f"{path} has the id {repeated[0]!r} more than once; keep one prediction for each question.")
    numbers = [name for name in ids if isinstance(name, int) and 1 <= name <= form.rows]
    if len(numbers) == len(ids):
        return [number - 1 for number in numbers]
    return list(range(form.rows)) if len(rows) == form.rows else None


def score_predictions(rows: Sequence[Row], form: Form, path: Path) -> dict[str, Any]:
    """Return the result: scores in percent by rule, group and metric, and the rows on which the rules differ.

    By the strict rule, a question without a row is wrong, and a group is known by the ids.
    """
    places, scored = _places(rows, form, path), []
    for row in rows:
        answers = row["gt"] if isinstance(row["gt"], list) else [row["gt"]]
        task, reply = Task("", "", (), answers[0], other_answers=tuple(answers[1:])), row["pred_answer"]
        scored.append(
            {
                name: tuple(
                    0.0 if reply is None or rule is None else rule(task, reply) for rule in (metric.published, metric.strict)
                )
                for name, metric in form.metrics.items()
            }
        )
    n, simple = form.rows, form.simple
    position = np.arange(len(rows))
    published = {"all": (position >= 0, n if form.fixed else len(rows))}
    strict = {"all": (position >= 0, n)}
    if simple:
        published |= {"simple": (position < simple, simple), "hard": (position >= simple, n - simple)}
        if places is not None:
            place = np.asarray(places)
            strict |= {"simple": (place < simple, simple), "hard": (place >= simple, n - simple)}
    scores = {}
    for which, (rule, groups) in enumerate({"published": published, "strict": strict}.items()):
        scores[rule] = {
            group: {
                name: round(100 * sum(row[name][which] for row, inside in zip(scored, mask, strict=True) if inside) / count, 4)
                for name in form.metrics
            }
            for group, (mask, count) in groups.items()
        }
    differ = [
        {"row": i + 1, "id": row.get("id"), "prediction": row["pred_answer"], "gt": row["gt"]}
        | {name: {"published": round(a, 4), "strict": round(b, 4)} for name, (a, b) in values.items()}
        for i, (row, values) in enumerate(zip(rows, scored, strict=True))
        if any(abs(a - b) > 1e-9 for a, b in values.values())
    ]
    return {
        "rows": len(rows),
        "missing": n - len(rows),
        "unanswered": sum(row["pred_answer"] is None for row in rows),
        "scores": scores,
        "differ": differ,
    }


def _show(console: Console, result: dict[str, Any], title: str, shown: int) -> None:
    table = Table(title=title)
    for column in ("group", *(f"{name}, {rule}" for rule in ("published", "strict") for name in ("F1", "EM"))):
        table.add_column(column, justify="left" if column == "group" else "right")
    published, strict = result["scores"]["published"], result["scores"]["strict"]
    for group, values in published.items():
        figures = [*values.values(), *strict.get(group, dict.fromkeys(values)).values()]
        table.add_row(group, *("–" if x is None else f"{x:.2f}" for x in figures))
    console.print(table)
    console.print(f"{result['rows']:,} rows, {result['unanswered']:,} without an answer (wrong by both rules).")
    if result["missing"]:
        unknown = "" if len(strict) == len(published) else " Without ids, their groups are unknown."
        console.print(f"{result['missing']:,} questions have no row: they are wrong by the strict rule.{unknown}")
    console.print(f"The rules differ on {len(result['differ']):,} rows{', of which:' if shown else '.'}")
    for row in result["differ"][:shown]:
        by = ", ".join(f"{name} {row[name]['published']:.2f} / {row[name]['strict']:.2f}" for name in ("F1", "EM"))
        told = f"  row {row['row']}: {quote(row['prediction'] or '', 50)} for {quote(row['gt'], 60)}: {by}"
        console.print(escape(told), soft_wrap=True)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the options of this command."""
    parser = argparse.ArgumentParser(prog="imagent_jax.score", description=__doc__.splitlines()[0])
    parser.add_argument("predictions", type=Path, help="JSON list or JSON Lines of predictions")
    parser.add_argument("--benchmark", required=True, choices=FORMS)
    parser.add_argument("--subset", action="store_true", help="the file is a part of the benchmark; its rows are all there is")
    parser.add_argument("--show", type=int, default=10, help="rows shown on which the rules differ; the result has all")
    parser.add_argument("--out", type=Path, help="file of the result, JSON")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command: exit code 0, or 2 after one sentence about bad input."""
    args, console = parse(argv), Console()
    try:
        rows = read_predictions(args.predictions)
        form = FORMS[args.benchmark]
        if args.subset:
            form = form._replace(rows=len(rows), simple=0, fixed=False)
        result = score_predictions(rows, form, args.predictions)
        digest = hashlib.sha256(args.predictions.read_bytes()).hexdigest()
        result = {"benchmark": args.benchmark, "predictions": args.predictions.name, "sha256": digest} | result
        if args.out:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    _show(console, result, f"{args.benchmark}: {args.predictions.name}", args.show)
    return 0
