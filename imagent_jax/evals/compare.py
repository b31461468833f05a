"""Comparison of two results on the same questions: `python -m imagent_jax.compare A/result.json B/result.json`.

Scores of a row are means over its samples. Differences are paired by row, with 95 % intervals by bootstrap over questions.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from imagent_jax.evals.result import RULES, units
from imagent_jax.evals.statistics import paired_difference


def read_result(path: Path) -> dict[str, Any]:
    """Read a result, or that in a folder.

    Raises:
        ValueError: there is none.
    """
    path = path / "result.json" if path.is_dir() else path
    try:
        found = json.loads(path.read_text())
        return found["benchmarks"] and found
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no result of an evaluation ({error!r}); name a result.json.") from None


def compare(a: dict[str, Any], b: dict[str, Any], seed: int = 0) -> list[dict[str, Any]]:
    """Return a line for each benchmark, metric and rule of both results: means and the paired difference B - A.

    Rows that lack a score in either result, for an environment error, count in neither.

    Raises:
        ValueError: they share no benchmark, asked other questions, or have no row that both scored.
    """
    if not (shared := [name for name in a["benchmarks"] if name in b["benchmarks"]]):
        raise ValueError("The results share no benchmark; evaluate both models on the same ones.")
    lines = []
    for name in shared:
        first, second = a["benchmarks"][name], b["benchmarks"][name]
        asked = [{row["uid"]: row["question"] for row in result["per_row"]} for result in (first, second)]
        if asked[0] != asked[1]:
            other = len(asked[0].keys() ^ asked[1].keys())
            raise ValueError(f"The results have other questions of {name} ({other:,} rows are in one only); evaluate both alike.")
        for metric, by in first["scores"].items():
            for rule in RULES:
                if rule in by and rule in second["scores"][metric]:
                    lines.append({"benchmark": name, "metric": metric, "rule": rule} | _paired(first, second, metric, rule, seed))
    return lines


def _paired(first: dict, second: dict, metric: str, rule: str, seed: int) -> dict[str, Any]:
    values = []
    for result in (first, second):
        found, _, rows = units(result["per_row"], metric, rule, result["circular"])
        values.append({row["uid"]: (value, row["question"]) for value, row in zip(found, rows, strict=True)})
    if not (uids := [uid for uid in values[0] if uid in values[1]]):
        raise ValueError("No row was scored in both results: all failed in one or the other; evaluate again.")
    x, y = ([found[uid][0] for uid in uids] for found in values)
    difference = paired_difference(x, y, [values[0][uid][1] for uid in uids], seed=seed)
    return {
        "rows": len(uids),
        "a": sum(x) / len(x),
        "b": sum(y) / len(y),
        "difference": difference.mean,
        "low": difference.low,
        "high": difference.high,
        "shown": difference.shown,
    }


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the options of this command."""
    parser = argparse.ArgumentParser(prog="imagent_jax.compare", description=__doc__.splitlines()[0])
    parser.add_argument("a", type=Path, help="result.json, or its folder")
    parser.add_argument("b", type=Path)
    parser.add_argument("--out", type=Path, help="file of the comparison, JSON")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command: exit code 0, or 2 after one sentence about bad input."""
    args = parse(argv)
    try:
        a, b = read_result(args.a), read_result(args.b)
        lines = compare(a, b)
        if args.out:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps({"a": a["model"], "b": b["model"], "lines": lines}, indent=1) + "\n")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    made = Table(title=f"A: {a['model']}, B: {b['model']}", caption="micro averages, %; 95 % bootstrap over questions, paired")
    for column in ("benchmark", "rule", "rows", "A", "B", "B - A", "95 % interval", "differ"):
        made.add_column(column, justify="left" if column in ("benchmark", "rule", "differ") else "right")
    for line in lines:
        figures = [f"{100 * line[key]:.1f}" for key in ("a", "b")]
        interval = f"{100 * line['low']:+.1f} to {100 * line['high']:+.1f}"
        verdict = "yes" if line["shown"] else "not shown"
        name = f"{line['benchmark']} {line['metric']}".strip()
        made.add_row(name, line["rule"], str(line["rows"]), *figures, f"{100 * line['difference']:+.1f}", interval, verdict)
    Console().print(made)
    return 0
