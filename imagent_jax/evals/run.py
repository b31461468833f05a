"""Evaluation of a model on benchmarks, from their files to a result, a page and predictions."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from imagent_jax.config import Config
from imagent_jax.data.check import left_out
from imagent_jax.evals.benchmarks import named
from imagent_jax.evals.exports import write_predictions
from imagent_jax.evals.harness import Opened, Pieces, fingerprint, open_benchmark, sample
from imagent_jax.evals.judging import judge_replies
from imagent_jax.evals.page import about, table, write_page
from imagent_jax.evals.result import metrics_of, result_of
from imagent_jax.rollout.collect import Collector
from imagent_jax.rollout.policy import Policy
from imagent_jax.runs.trajectory_log import TrajectoryLog


def labels(specs: Sequence[str]) -> dict[str, str]:
    """Return names of benchmarks for results and files: that of the benchmark, for files of your own with that of the file.

    Raises:
        ValueError: there is no such benchmark, or two have the same name.
    """
    found: dict[str, str] = {}
    for spec in specs:
        benchmark, path = named(spec)
        label = f"{benchmark.name}-{Path(path).stem}" if benchmark.name in ("own", "tsv") else benchmark.name
        if label in found:
            raise ValueError(f"The benchmark {label} is named twice; name each once.")
        found[label] = spec
    return found


class ResultFolder:
    """The folder of an evaluation, as `TrajectoryLog` takes it."""

    def __init__(self, path: Path):
        self.path = path

    def log_trajectories(self, step: int, records: list[dict[str, Any]], name: str = "train") -> None:
        lines = (json.dumps(record) + "\n" for record in records)
        (self.path / "trajectories" / f"{name}-{step:06d}.jsonl").write_text("".join(lines))


def evaluate_benchmarks(policy: Policy, opened: dict[str, Opened], folder: Path, limit: int | None, console: Console) -> dict:
    """Evaluate on benchmarks; write `result.json`, `report.html`, `seconds.json` and `predictions/`. Returns the result.

    Call it on the policy's mesh. It goes on where an earlier call with the same settings was killed, and ends with the same
    result to the byte. Seconds are apart, as they never repeat.

    Raises:
        ValueError: the folder holds samples of other settings.
    """
    collector, cfg, results, seconds = policy.collector, policy.cfg, {}, {}
    examples = TrajectoryLog(ResultFolder(folder), collector.processor, cfg)
    for name, one in opened.items():
        count = one.count(limit)
        console.print(f"{one.benchmark.title}: {count:,} rows.")
        pieces = Pieces(folder / "samples" / f"{name}.jsonl", fingerprint(cfg, one, count, policy.folder))
        records, seconds[name] = sample(
            collector,
            policy.params,
            one,
            count,
            pieces,
            keep=lambda groups, name=name: examples.write(0, groups, name=name),
            progress=lambda done, total: console.print(f"  {done}/{total}"),
        )
        tasks = one.questions.facts[:count]
        if cfg.eval.judge:
            judge_replies(cfg.judge, tasks, records)
        results[name] = result_of(one.benchmark, tasks, records, one.questions.faults)
        write_predictions(folder / "predictions", name, tasks, records)
        for sentence in about(results[name], seconds[name]):
            console.print(f"  {escape(sentence)}", soft_wrap=True)
    settings = {
        "samples": cfg.eval.samples,
        "greedy": cfg.eval.greedy,
        "temperature": cfg.rollout.temperature,
        "seed": cfg.eval.seed,
        "prompt": cfg.eval.prompt,
        "max_turns": cfg.tools.max_turns,
    }
    result = {"model": cfg.model.path, "settings": settings, "benchmarks": results}
    (folder / "result.json").write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / "seconds.json").write_text(json.dumps(seconds) + "\n")
    write_page(folder, cfg.model.path, results, seconds)
    console.print(table(results, cfg.model.path))
    console.print(f"Result, page and predictions: {folder}")
    return result


def open_benchmarks(specs: Sequence[str], cfg: Config, collector: Collector, console: Console, progress) -> dict[str, Opened]:
    """Return benchmarks by name, with their rows; see `open_benchmark`."""
    found = {name: open_benchmark(spec, cfg, collector, progress) for name, spec in labels(specs).items()}
    for one in found.values():
        if sentence := left_out(one.questions):
            console.print(f"[yellow]{escape(sentence)}[/]", soft_wrap=True)
    return found


def benchmark_metrics(collector: Collector, params, opened: dict[str, Opened], count: int, console: Console) -> dict[str, float]:
    """Return the metrics of the first `count` rows of each benchmark (`result.metrics_of`), and print them."""
    metrics: dict[str, float] = {}
    for name, one in opened.items():
        rows = one.count(count)
        records, _ = sample(collector, params, one, rows, Pieces(None, ""))
        found = metrics_of(result_of(one.benchmark, one.questions.facts[:rows], records) | {"benchmark": name})
        told = ", ".join(f"{key.removeprefix(f'benchmark/{name}/')} {100 * value:.1f} %" for key, value in found.items())
        console.print(f"  {name}, {rows} rows: {told}")
        metrics |= found
    return metrics
