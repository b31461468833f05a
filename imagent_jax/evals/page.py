"""Tables of results, on the screen and as a page `report.html` with examples."""

import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from imagent_jax.evals.result import RULES
from imagent_jax.runs.examples import Pictures
from imagent_jax.runs.report import ASSETS

Result = dict[str, Any]
EXAMPLES = 4
"""Most examples of right, and of wrong, answers of a benchmark."""


def percent(made: Result | None) -> str:
    """Return an average in percent with twice its standard error; "–" where there is none."""
    if made is None:
        return "–"
    return f"{100 * made['mean']:.1f}" + ("" if made["error"] is None else f" ± {200 * made['error']:.1f}")


def rows_of(result: Result, name: str) -> list[list[str]]:
    """Return the lines of a benchmark in the table: for each metric and average its scores by rule, the published one first."""
    lines = []
    for metric, by in result["scores"].items():
        averages = {"micro": {rule: made["micro"] for rule, made in by.items()}}
        for grouping in by["strict"]["macro"] if "strict" in by else ():
            averages[grouping] = {rule: made["macro"][grouping] for rule, made in by.items()}
        first = result["headline"] if result["headline"] in averages else "micro"
        for average in sorted(averages, key=lambda each: each != first):
            words = "micro" if average == "micro" else f"macro over {average}"
            title = f"{f'{name} {metric}'.strip()}, {words}" if average == first else f"  {words}"
            lines.append([title, *(percent(averages[average].get(rule)) for rule in RULES)])
    return lines


def groups_of(result: Result) -> list[list[str]]:
    """Return a line for each group of each grouping: its rows and its strict and published scores of the first metric."""
    by = next(iter(result["scores"].values()), {})
    lines = []
    for grouping, groups in by.get("strict", {}).get("groups", {}).items():
        for group, made in groups.items():
            others = [by[rule]["groups"][grouping].get(group) if rule in by else None for rule in RULES]
            lines.append([f"{grouping}: {group}", str(made["count"]), *map(percent, others)])
    return lines


def about(result: Result, seconds: float | None = None) -> list[str]:
    """Return sentences about a result: what was asked, what went wrong, what it cost."""
    n = result["rows"] * result["samples"]
    said = [f"{result['rows']:,} rows ({result['questions']:,} questions), {result['samples']} sample(s) each."]
    if result["circular"]:
        said.append("A question is right where all of its rows are.")
    said.append(
        f"{result['unanswered']:,} of {n:,} without an answer, {result['cut_off']:,} cut off: wrong. {result['unread']:,} "
        f"answers name no option or several. The rules differ on {len(result['differ']):,}."
    )
    if result["judged"] and not any("judged" in by for by in result["scores"].values()):
        said.append("The published score asks a judge where its rule finds nothing; eval.judge true adds a judged score.")
    for what, faults in (("failed on an environment error", result["faults"]), ("have no verdict", result["judge_faults"])):
        if faults:
            first = next(iter(faults))
            said.append(f"{sum(faults.values()):,} samples {what} and count nowhere. The most frequent: {first}.")
    if result["left_out"]:
        said.append(f"{len(result['left_out']):,} rows are left out for faults. The first: {result['left_out'][0]}.")
    cost, each = result["cost"], "" if seconds is None else f", {seconds / max(n, 1):.2f} s"
    said.append(f"A sample: {cost['calls']:.2f} calls, {cost['invalid']:.2f} invalid, {cost['tokens']:.0f} tokens sampled{each}.")
    return said


def table(results: dict[str, Result], title: str) -> Table:
    """Return the table of all benchmarks."""
    made = Table(title=title, caption="± two standard errors, over questions")
    for column in ("benchmark", *RULES):
        made.add_column(column, justify="left" if column == "benchmark" else "right")
    for name, result in results.items():
        for line in rows_of(result, name):
            made.add_row(*line)
    return made


def _html_table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    body = "".join(
        f"<tr><th>{html.escape(first)}</th>{''.join(f'<td>{html.escape(cell)}</td>' for cell in cells)}</tr>"
        for first, *cells in lines
    )
    return f"<table><tr>{head}</tr>{body}</table>"


def _examples(folder: Path, name: str, result: Result, pictures: Pictures) -> str:
    path = folder / "trajectories" / f"{name}-000000.jsonl"
    if not path.is_file():
        return ""
    metric = next(iter(result["scores"]))
    right = {row["uid"]: row["scores"][metric]["strict"] for row in result["per_row"]}
    cases: dict[bool, list[str]] = {True: [], False: []}
    for line in path.read_text().splitlines():
        record = json.loads(line)
        score = right.get(record["task"], [None])[record["rollout"]]
        if score is not None and len(cases[score == 1]) < EXAMPLES:
            record["right"] = score == 1
            label = f"strict score {score:.2f}"
            cases[score == 1].append(pictures.case(f"{name}: {'right' if score == 1 else 'wrong'}", [(label, record)]))
    return "".join([*cases[False], *cases[True]])


def write_page(folder: Path, model: str, results: dict[str, Result], seconds: dict[str, float]) -> Path:
    """Write `report.html` into the folder of an evaluation and return its path."""
    pictures, parts, e = Pictures(folder), [], html.escape
    for name, result in results.items():
        sentences = " ".join(about(result, seconds.get(name)))
        parts.append(f"<h2>{e(result['title'])}</h2><p>{e(sentences)}</p>")
        parts.append(_html_table(("", *RULES), rows_of(result, name)))
        if groups := groups_of(result):
            parts.append(f"<h3>Groups</h3>{_html_table(('group', 'rows', *RULES), groups)}")
        if differ := result["differ"]:
            lines = [
                [row["uid"], row["reply"] or "", " | ".join(row["answers"]), *(f"{row[rule]:.2f}" for rule in RULES[:2])]
                for row in differ[:20]
            ]
            parts.append(f"<h3>Where the rules differ</h3>{_html_table(('row', 'reply', 'answer', *RULES[:2]), lines)}")
        parts.append(_examples(folder, name, result, pictures))
    style = "".join((ASSETS / name).read_text() for name in ("theme.css", "report.css"))
    page = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{e(model)}: benchmarks</title><style>{style}</style>'
        f"<main><header><h1>{e(model)}</h1><p class=soft>Scores in percent ± two standard errors over questions.</p></header>"
        f"{''.join(parts)}</main><svg width=0 height=0 style=position:absolute><defs>{pictures.definitions()}</defs></svg>"
    )
    out = folder / "report.html"
    out.write_text(page, encoding="utf-8")
    return out
