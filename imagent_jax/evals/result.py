"""The result of a benchmark: scores by both rules, with errors, groups, what went wrong, cost, and the rows behind them."""

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

from imagent_jax.evals.benchmark import Benchmark
from imagent_jax.evals.harness import Record
from imagent_jax.evals.rules import Metric, unread
from imagent_jax.evals.statistics import Estimate, estimate, macro_estimate
from imagent_jax.types import Task

RULES = ("published", "strict", "judged")
CUT_OFF = ("TRUNCATED", "OVER_TURNS", "REPEATED")
"""Ends of a trajectory that something else than the policy ended."""


def scored(benchmark: Benchmark, tasks: Sequence[Task], rows: Sequence[Record]) -> list[dict[str, Any]]:
    """Return rows with their question, groups and scores.

    `scores[metric][rule]` has a score for each sample; None: the sample failed on an environment error, or its judge did. A
    sample without an answer scores 0.
    """
    found = []
    for task, row in zip(tasks, rows, strict=True):
        scores: dict[str, dict[str, list]] = {}
        for name, metric in benchmark.metrics.items():
            scores[name] = {
                rule: [_score(metric, rule, task, sample) for sample in row["samples"]]
                for rule in ("published", "strict")
                if getattr(metric, rule)
            }
        if any("judged" in sample or "judge_fault" in sample for sample in row["samples"]):
            first = next(iter(benchmark.metrics))
            scores[first]["judged"] = [None if sample["fault"] else sample.get("judged") for sample in row["samples"]]
        place = {"uid": task.uid, "question": benchmark.question(task), "groups": benchmark.groups(task)}
        found.append(place | {"scores": scores})
    return found


def _score(metric: Metric, rule: str, task: Task, sample: Record) -> float | None:
    if sample["fault"]:
        return None
    said = sample.get("text") if metric.whole else sample["reply"]
    return 0.0 if said is None else round(float(getattr(metric, rule)(task, said)), 6)


def units(rows: Sequence[dict], metric: str, rule: str, circular: bool) -> tuple[list[float], list[str], list[dict]]:
    """Return the values that are averaged, the question of each, and its first row.

    A value is the mean score of a row over samples. Of a circular benchmark it is that of a question, which is right in a sample
    where all of its rows are. Samples without a score are left out, and so is a value without samples.
    """
    parts = defaultdict(list)
    for row in rows:
        parts[row["question"] if circular else row["uid"]].append(row)
    values, questions, firsts = [], [], []
    for same in parts.values():
        by_sample = zip(*(row["scores"][metric].get(rule, ()) for row in same), strict=True)
        samples = [min(each) for each in by_sample if None not in each]
        if samples:
            values.append(sum(samples) / len(samples))
            questions.append(same[0]["question"])
            firsts.append(same[0])
    return values, questions, firsts


def summary(rows: Sequence[dict], metric: str, rule: str, benchmark: Benchmark) -> dict[str, Any] | None:
    """Return the averages of a metric by a rule, each with its standard error over questions; None where the rule scores nothing.

    `micro` is over rows, `macro` over the groups of each grouping, which count equally. `headline` is the one that is published.
    """
    values, questions, firsts = units(rows, metric, rule, benchmark.circular)
    if not values:
        return None
    by: dict[str, dict[str, list]] = defaultdict(lambda: defaultdict(list))
    for value, question, row in zip(values, questions, firsts, strict=True):
        for grouping, group in row["groups"].items():
            by[grouping][group].append((value, question))
    groups = {
        grouping: {group: estimate(*zip(*each, strict=True)) for group, each in sorted(parts.items())}
        for grouping, parts in by.items()
    }
    for outer, inner in benchmark.within.items():
        parts = defaultdict(set)
        for row in firsts:
            parts[row["groups"][outer]].add(row["groups"][inner])
        groups[outer] = {
            group: macro_estimate([by[inner][one] for one in sorted(inside)]) for group, inside in sorted(parts.items())
        }
    macro = {name: macro_estimate([*parts.values()]) for name, parts in by.items()}
    micro = estimate(values, questions)
    return {
        "headline": _told(macro.get(benchmark.headline, micro)),
        "micro": _told(micro),
        "macro": {name: _told(made) for name, made in macro.items()},
        "groups": {
            name: {group: _told(made) | {"count": len(by[name][group])} for group, made in parts.items()}
            for name, parts in groups.items()
        },
    }


def _told(made: Estimate) -> dict[str, float | None]:
    return {"mean": _rounded(made.mean), "error": None if math.isnan(made.error) else _rounded(made.error)}


def _rounded(value: float) -> float:
    return round(float(value), 6)


def result_of(
    benchmark: Benchmark, tasks: Sequence[Task], records: Sequence[Record], left_out: Sequence[Any] = ()
) -> dict[str, Any]:
    """Return the result of a benchmark as JSON. Scores are shares in 0..1.

    Args:
        tasks: the questions that were asked, without images.
        records: what was kept of their samples.
        left_out: rows with faults.
    """
    rows = scored(benchmark, tasks, records)
    samples = [(task, sample) for task, record in zip(tasks, records, strict=True) for sample in record["samples"]]
    n, alive = len(samples), [(task, sample) for task, sample in samples if not sample["fault"]]
    no_reply = [sample["end"] in CUT_OFF for _, sample in alive if sample["reply"] is None]
    faults = Counter(sample["fault"] for _, sample in samples if sample["fault"])
    judges = Counter(sample["judge_fault"] for _, sample in samples if sample.get("judge_fault"))
    scores = {
        name: {rule: made for rule in RULES if (made := summary(rows, name, rule, benchmark))} for name in benchmark.metrics
    }
    differ = [
        {
            "uid": row["uid"],
            "metric": name,
            "sample": i,
            "reply": record["samples"][i]["reply"],
            "answers": list(task.answers),
            "published": a,
            "strict": b,
        }
        for row, record, task in zip(rows, records, tasks, strict=True)
        for name, by in row["scores"].items()
        for i, (a, b) in enumerate(zip(by.get("published", ()), by["strict"], strict=False))
        if a is not None and abs(a - b) > 1e-9
    ]
    return {
        "benchmark": benchmark.name,
        "title": benchmark.title,
        "headline": benchmark.headline,
        "judged": benchmark.judged,
        "circular": benchmark.circular,
        "rows": len(rows),
        "questions": len({row["question"] for row in rows}),
        "samples": n // max(len(rows), 1),
        "left_out": [str(fault) for fault in left_out],
        "scores": scores,
        "unanswered": no_reply.count(False),
        "cut_off": no_reply.count(True),
        "unread": sum(sample["reply"] is not None and unread(task, sample["reply"]) for task, sample in alive),
        "faults": dict(faults.most_common()),
        "judge_faults": dict(judges.most_common()),
        "cost": {key: _rounded(sum(one[key] for _, one in samples) / max(n, 1)) for key in ("calls", "invalid", "tokens")},
        "differ": differ,
        "per_row": rows,
    }


def metrics_of(result: dict[str, Any]) -> dict[str, float]:
    """Return the headline scores of a result as metrics of a run, `<benchmark>/<metric, if named>/<rule>`, and its faults."""
    prefix = f"benchmark/{result['benchmark']}"
    found = {
        "/".join(part for part in (prefix, name, rule) if part): made["headline"]["mean"]
        for name, by in result["scores"].items()
        for rule, made in by.items()
    }
    count = max(result["rows"] * result["samples"], 1)
    return found | {f"{prefix}/faults": sum(result["faults"].values()) / count}
