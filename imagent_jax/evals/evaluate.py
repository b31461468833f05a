"""Evaluation on held-out tasks or benchmarks: `python -m imagent_jax.evaluate --model.path FOLDER_OR_HUB_ID`.

`--benchmark muirbench,vstar=FOLDER` evaluates on benchmarks (docs/benchmarks.md) and writes to the folder `--out`. A killed
evaluation goes on where it was.

`--control NAME` evaluates again with something taken away from the agent or exchanged (`evals.controls`), and says in a sentence
what that shows; `--control all` does so with every control. Both together: the controls on the benchmarks' own questions.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from imagent_jax.config import Config, parse_args
from imagent_jax.data.check import left_out
from imagent_jax.data.pipeline import check_source
from imagent_jax.evals.audit import audit, is_warning
from imagent_jax.evals.audit import table as audit_table
from imagent_jax.evals.controls import CONTROLS, Variant
from imagent_jax.evals.harness import Opened
from imagent_jax.evals.run import benchmark_metrics, evaluate_benchmarks, labels, open_benchmarks
from imagent_jax.rollout.collect import Collector
from imagent_jax.rollout.metrics import call_metrics, summarise
from imagent_jax.rollout.policy import Policy
from imagent_jax.runs.report import progress_on
from imagent_jax.runs.trajectory_log import TrajectoryLog
from imagent_jax.types import Task, Trajectory


def evaluate(
    collector: Collector,
    params,
    tasks: Sequence[Task],
    *,
    groups: int,
    seed: int,
    greedy: bool,
    temperature: float,
    progress=None,
) -> tuple[dict[str, float], list[Trajectory]]:
    """Sample one rollout of every task; return metrics and trajectories.

    Args:
        groups: tasks decoded at once.
        greedy: take the likeliest tokens, whatever `temperature` says.
        temperature: of the sampled softmax.
        progress: called with the number of tasks done and of all tasks.
    Returns:
        Metrics by name (`rollout.metrics.summarise` and `call_metrics`), and the trajectory of each task, in order.
    Raises:
        ValueError: see `Collector.open_task`.
        Stopped: the collector's `stop` was set.
    """
    done: list[Trajectory] = []
    for begin in range(0, len(tasks), 4 * groups):  # bounds the memory for encoded images
        out = collector.collect(
            params,
            tasks[begin : begin + 4 * groups],
            group_size=1,
            seed=seed,
            temperature=0.0 if greedy else temperature,
            slots=groups,
        )
        done += [group[0] for group in out.trajectories]
        if progress:
            progress(len(done), len(tasks))
    return summarise(done) | call_metrics([[t] for t in done], collector.names), done


class HeldOut:
    """Evaluates a policy on a run's held-out tasks, logs the trajectories and prints the accuracy; then on benchmarks.

    Args:
        benchmarks: `eval.benchmarks`, opened.
    """

    def __init__(
        self,
        collector: Collector,
        tasks: Sequence[Task],
        cfg: Config,
        log: TrajectoryLog,
        console: Console,
        benchmarks: dict[str, Opened],
    ):
        self.collector, self.tasks, self.cfg, self.log, self.console = collector, tasks, cfg, log, console
        self.benchmarks = benchmarks

    def __call__(self, params, count: int, step: int, name: str) -> dict[str, float]:
        """Return metrics of the first `count` tasks, and of the first `count` rows of each benchmark."""
        began, tasks, cfg = time.perf_counter(), self.tasks[:count], self.cfg.eval
        with self.console.status(f"Evaluating on {len(tasks)} held-out tasks"):
            metrics, trajectories = evaluate(
                self.collector,
                params,
                tasks,
                groups=cfg.groups,
                seed=cfg.seed,
                greedy=cfg.greedy,
                temperature=self.cfg.rollout.temperature,
            )
        self.log.write(step, [[t] for t in trajectories], name=name)
        metrics["time/evaluation"] = time.perf_counter() - began
        self.console.print(
            f"{name}: {100 * metrics['accuracy']:.1f} % of {len(trajectories)} held-out tasks right, "
            f"{metrics['tools/calls']:.2f} calls a task ({metrics['time/evaluation']:.0f} s)"
        )
        return metrics | benchmark_metrics(self.collector, params, self.benchmarks, count, self.console)


def comparison(columns: dict[str, dict[str, float]], title: str) -> Table:
    """Return a table of evaluation metrics, one column per evaluation."""
    table = Table(title=title)
    table.add_column("held-out")
    for name in columns:
        table.add_column(name, justify="right")
    for key in list(columns.values())[-1]:
        figures = [metrics.get(key) for metrics in columns.values()]
        if key == "time/evaluation" or (key.startswith(("end/", "tools/calls/")) and not any(figures)):
            continue
        plain = key.startswith(("length", "tools/calls", "tools/invalid", "tools/time/"))
        table.add_row(key, *("–" if x is None else f"{x:.2f}" if plain else f"{100 * x:.1f} %" for x in figures))
    return table


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, Config]:
    """Return the options of this command, and the configuration from all other options (`config.parse_args`)."""
    options = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    options.add_argument("--control", action="append", choices=(*CONTROLS, "all"), default=[])
    options.add_argument("--benchmark", default="")
    options.add_argument("--out", type=Path, default=Path("evaluation"))
    options.add_argument("--limit", type=int)
    chosen, rest = options.parse_known_args(argv)
    chosen.control = [*CONTROLS] if "all" in chosen.control else list(dict.fromkeys(chosen.control))
    flags = f"[--control {'|'.join(CONTROLS)}|all] [--benchmark NAME[=PATH],... --out FOLDER --limit ROWS]"
    return chosen, parse_args(rest, program=f"imagent_jax.evaluate {flags}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command: exit code 0, or 2 after one sentence about bad input."""
    chosen, cfg = parse(argv)
    console = Console()
    try:
        if chosen.benchmark:
            _benchmarks(chosen, cfg, console)
        else:
            _held_out(chosen, cfg, console)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _benchmarks(chosen: argparse.Namespace, cfg: Config, console: Console) -> None:
    """Evaluate on benchmarks, see `run.evaluate_benchmarks`; then under controls, whose lines go to `controls.json`."""
    if chosen.control and cfg.eval.prompt != "agent":
        raise ValueError(f"Controls need our own prompt, not the {cfg.eval.prompt}'s; set eval.prompt to agent.")
    if chosen.limit is not None and chosen.limit < 1:
        raise ValueError("--limit is below 1, so that nothing would be evaluated; leave it out for all rows.")
    specs = [spec.strip() for spec in chosen.benchmark.split(",") if spec.strip()]
    labels(specs)  # bad names are refused before the model is loaded
    with console.status("Loading the model and the benchmarks") as status:
        policy = Policy(cfg)
        opened = open_benchmarks(specs, cfg, policy.collector, console, progress_on(console, status))
    questions = {name: one.questions[: one.count(chosen.limit)] for name, one in opened.items()} if chosen.control else {}
    for tasks in questions.values():
        _refuse_environments(cfg, tasks)
    with jax.set_mesh(policy.mesh):
        evaluate_benchmarks(policy, opened, chosen.out, chosen.limit, console)
        found = {name: under_controls(policy, tasks, chosen.control, name, console) for name, tasks in questions.items()}
    if found:
        (chosen.out / "controls.json").write_text(json.dumps(found, indent=1) + "\n")


def _held_out(chosen: argparse.Namespace, cfg: Config, console: Console) -> None:
    """Print metrics of a model on the held-out split, and the warnings of its controls."""
    if not cfg.eval.tasks:
        raise ValueError("eval.tasks is 0, so that nothing would be evaluated; set how many held-out tasks to evaluate.")
    check_source(cfg.data)
    with console.status("Loading the model and the tasks") as status:
        policy = Policy(cfg)
        split = policy.open_tasks("test", progress_on(console, status))
    if sentence := left_out(split):
        console.print(f"[yellow]{escape(sentence)}[/]")
    tasks = list(split[: cfg.eval.tasks])
    if chosen.control:
        _refuse_environments(cfg, tasks)
    console.print(f"Evaluating {cfg.model.path} on {len(tasks)} held-out tasks of {cfg.data.title}; nothing is written.")
    with jax.set_mesh(policy.mesh):
        under_controls(policy, tasks, chosen.control, cfg.data.title, console)


def _refuse_environments(cfg: Config, tasks: Sequence[Task]) -> None:
    if own := next((task for task in tasks if task.environment or cfg.tools.environment), None):
        raise ValueError(f"Task {own.uid} has an environment of its own, which a control would replace; leave out --control.")


def under_controls(
    policy: Policy, tasks: Sequence[Task], controls: Sequence[str], title: str, console: Console
) -> dict[str, Any]:
    """Evaluate on tasks, and under controls; print metrics, lines and sentences. Returns the lines, and a sentence by control.

    Call it on the policy's mesh.
    """
    columns, cfg = {}, policy.cfg

    def run(name: str, collector: Collector, tasks: Sequence[Task]) -> list[Trajectory]:
        columns[name], done = evaluate(
            collector,
            policy.params,
            tasks,
            groups=cfg.eval.groups,
            seed=cfg.eval.seed,
            greedy=cfg.eval.greedy,
            temperature=cfg.rollout.temperature,
            progress=lambda d, n: console.print(f"  {d}/{n}"),
        )
        return done

    def under(variant: Variant) -> list[Trajectory]:
        console.print(f"Control {variant.name}: {CONTROLS[variant.control]}.")
        other = Collector(policy.model, policy.processor, policy.tools, cfg, environment=variant.environment)
        return run(variant.name, other, variant.tasks)

    done = run("model", policy.collector, tasks)
    lines, sentences = audit(controls, done, cfg.eval.seed, under)
    whole = {name: metrics for name, metrics in columns.items() if name in ("model", *controls)}
    console.print(comparison(whole, f"{cfg.model.path} on {title}"))
    if lines:
        console.print(audit_table(lines, "controls"))
    for control, sentence in sentences.items():
        mark = "[yellow]warning[/] " if is_warning(control, [line for line in lines if line.control == control]) else ""
        console.print(f"{mark}({control}): {escape(sentence)}", soft_wrap=True)
    return {"lines": [line._asdict() for line in lines], "sentences": sentences}
