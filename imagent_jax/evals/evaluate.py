"""Evaluation on held-out tasks: `python -m imagent_jax.evaluate --model.path FOLDER_OR_HUB_ID`.

`--control shuffle` and `--control blank` evaluate once more with something taken away (`evals.controls`); what they
leave is reported beside the true accuracy.
"""

import argparse
import sys
from collections.abc import Sequence

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from imagent_jax.config import Config, parse_args
from imagent_jax.evals.controls import CONTROLS, controlled
from imagent_jax.rl.guards import looks_unused
from imagent_jax.rollout.collect import Collector
from imagent_jax.rollout.metrics import answered_right, call_metrics, summarise
from imagent_jax.rollout.policy import Policy
from imagent_jax.types import Task, Trajectory


def evaluate(
    collector: Collector, params, tasks: Sequence[Task], *, groups: int, seed: int, greedy: bool, temperature: float,
    progress=None,
) -> tuple[dict[str, float], list[Trajectory]]:  # fmt: skip
    """One rollout of every task, `groups` at a time."""
    done: list[Trajectory] = []
    for begin in range(0, len(tasks), 4 * groups):  # bounds the room for encoded images
        out = collector.collect(
            params, tasks[begin : begin + 4 * groups], group_size=1, seed=seed, temperature=0.0 if greedy else temperature,
            slots=groups, packs=4 * collector.cfg.images.packs,
        )  # fmt: skip
        done += [group[0] for group in out.trajectories]
        if progress:
            progress(len(done), len(tasks))
    return summarise(done) | call_metrics([[t] for t in done], collector.tools.names), done


def comparison(columns: dict[str, dict[str, float]], title: str) -> Table:
    """A table of evaluation figures, one column an evaluation."""
    table = Table(title=title)
    table.add_column("held-out")
    for name in columns:
        table.add_column(name, justify="right")
    for key in list(columns.values())[-1]:
        figures = [metrics.get(key) for metrics in columns.values()]
        if key == "time/evaluation" or (key.startswith(("end/", "tools/calls/")) and not any(figures)):
            continue
        plain = key.startswith(("length", "tools/calls", "tools/invalid"))
        table.add_row(key, *("–" if x is None else f"{x:.2f}" if plain else f"{100 * x:.1f} %" for x in figures))
    return table


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, Config]:
    """Options of the command, and the configuration of all others (`config.parse_args`)."""
    options = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    options.add_argument("--control", action="append", choices=CONTROLS, default=[])
    chosen, rest = options.parse_known_args(argv)
    return chosen, parse_args(rest, program=f"imagent_jax.evaluate [--control {'|'.join(CONTROLS)}]")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; prints the table of one model on the held-out split, and what the controls say."""

    chosen, cfg = parse(argv)
    console = Console()
    try:
        parts = Policy(cfg)
        tasks = parts.test_tasks(cfg.eval.tasks)
        console.print(f"Evaluating {cfg.model.path} on {len(tasks)} held-out tasks of {cfg.data.name}; nothing is written.")
        with jax.set_mesh(parts.mesh):

            def run(collector: Collector):
                return evaluate(
                    collector, parts.params, tasks, groups=cfg.eval.groups, seed=cfg.eval.seed, greedy=cfg.eval.greedy,
                    temperature=cfg.rollout.temperature, progress=lambda d, n: console.print(f"  {d}/{n}"),
                )  # fmt: skip

            results = {"model": run(parts.collector)}
            for control in chosen.control:
                console.print(f"Control {control}: {CONTROLS[control]}.")
                other = controlled(control, results["model"][1], cfg.eval.seed)
                results[control] = run(Collector(parts.model, parts.processor, parts.tools, cfg, environment=other))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    columns = {name: metrics for name, (metrics, _) in results.items()}
    console.print(comparison(columns, f"{cfg.model.path} on {cfg.data.name}"))
    true, *others = (np.asarray(answered_right(done)) for _, done in results.values())
    for control, right in zip(list(results)[1:], others, strict=True):
        if warning := looks_unused(true, right, CONTROLS[control]):
            console.print(f"[yellow]warning[/] ({control}): {warning}")
    return 0

