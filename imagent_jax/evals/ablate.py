"""Ablations: `python -m imagent_jax.ablate [FILE.yaml ...] [--seeds 0 1 2] [--out FOLDER] [--section.key VALUE ...]`.

Each file holds the settings that a variant changes (default: configs/ablations/*.yaml); the comment on its first line is the
variant's title. `full.yaml` in the same folder is read first, so that all variants share its settings. Every variant is trained
once per seed, each run in a separate process, and recorded in `<variant>.json` in FOLDER (benchmarks/results/ablations).
Recorded runs are skipped, so an interrupted command continues where it stopped. At the end, or alone with `--table`, a table
of means with 95 % confidence intervals over seeds (Student's t) is printed and written with a figure (ablations.md,
ablations.png) to docs/.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import scipy.stats

from imagent_jax.config import TINY, read_args
from imagent_jax.types import Trajectory

CURVES = ("accuracy", "reward/total", "tools/used_rate", "tools/invalid", "mask/dropped_tokens", "length")
COLUMNS = {
    "right, %": lambda run: 100 * run["final"]["accuracy"],
    "right on the way, %": lambda run: 100 * float(np.mean(run["curves"]["accuracy"])),
    "call a tool, %": lambda run: 100 * run["final"]["tools/used_rate"],
    "calls executed, %": lambda run: 100 * run["final"]["tools/executed_rate"],
    "dropped tokens, %": lambda run: 100 * float(np.mean(run["curves"]["mask/dropped_tokens"])),
    "tokens": lambda run: run["final"]["length"],
}
"""Columns of the table; "on the way" and "dropped" are means over the training steps."""


def gain_for_any_call(t: Trajectory) -> float:
    """Return 0.2 for a right answer after any call, executed or not: the tool-use gain without its condition."""
    return 0.2 * float(t.executed_calls + t.invalid_calls > 0 and t.right)


def title_of(file: Path) -> str:
    """Return the comment on the first line of a variant's file.

    Raises:
        ValueError: no such file, or its first line is not a comment.
    """
    if not file.is_file():
        raise ValueError(f"There is no ablation {file}; name a YAML file of what the variant changes.")
    first = file.read_text().partition("\n")[0]
    if not first.startswith("# "):
        raise ValueError(f"{file} must begin with a comment, '# What this variant is'.")
    return first[2:]


def train_once(file: Path, seed: int, overrides: Sequence[str]) -> dict:
    """Train one run in a separate process; return the figures of its metrics.jsonl.

    Raises:
        RuntimeError: the run failed; its own message was printed before.
    """
    shared = file.with_name("full.yaml")
    configs = [TINY, *([shared] if shared.is_file() and shared != file else []), file]
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "-m",
            "imagent_jax.train",
            *(f"--config={path}" for path in configs),
            *overrides,
            f"--run.seed={seed}",
            f"--run.dir={folder}",
            "--run.name=run",
            "--run.log_trajectories=0",
        ]
        if subprocess.run(command).returncode:
            raise RuntimeError(f"The run of {file.stem} with seed {seed} failed; its message stands above.")
        records = [json.loads(line) for line in (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()]
    if "base/accuracy" not in records[0]:
        raise RuntimeError(f"The run of {file.stem} evaluates nothing; set eval.tasks above 0.")
    steps = [record for record in records if "reward/total" in record]

    def part(record: dict, prefix: str) -> dict:
        return {k.removeprefix(prefix): round(v, 5) for k, v in record.items() if k.startswith(prefix)}

    return {
        "seed": seed,
        "base": part(records[0], "base/"),
        "final": part(records[-1], "final/"),
        "seconds": round(records[-1]["time/total"], 1),
        "curves": {name: [round(record[name], 4) for record in steps] for name in CURVES},
    }


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and half the width of its 95 % confidence interval by Student's t (NaN for one value)."""
    n = len(values)
    if n < 2:
        return float(np.mean(values)), math.nan
    return float(np.mean(values)), float(scipy.stats.t.ppf(0.975, n - 1) * scipy.stats.sem(values))


def table(results: Sequence[dict]) -> str:
    """Return a Markdown table with one variant per row: mean ± half-width over its seeds."""
    lines = ["| variant | seeds | " + " | ".join(COLUMNS) + " |", "|---|---" + "|---" * len(COLUMNS) + "|"]
    for result in results:
        cells = []
        for value in COLUMNS.values():
            mean, half = interval([value(run) for run in result["runs"]])
            cells.append(f"{mean:.1f}" if math.isnan(half) else f"{mean:.1f} ± {half:.1f}")
        lines.append(f"| {result['title']} | {len(result['runs'])} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def plot(results: Sequence[dict], path: Path) -> None:
    """Plot final accuracy with intervals, and training curves: means over seeds, smoothed over five steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (bars, *curves) = plt.subplots(1, 3, figsize=(18, 0.3 * len(results) + 3))
    names = [result["variant"] for result in results]
    finals = [interval([100 * run["final"]["accuracy"] for run in result["runs"]]) for result in results]
    bars.barh(names, [mean for mean, _ in finals], xerr=[0 if math.isnan(half) else half for _, half in finals])
    bars.invert_yaxis()
    bars.set_title("held-out questions right, %")
    for axis, name, title in zip(
        curves, ("accuracy", "tools/used_rate"), ("training rollouts right", "that call a tool"), strict=True
    ):
        for i, result in enumerate(results):
            curve = np.mean([run["curves"][name] for run in result["runs"]], axis=0)
            smooth = np.convolve(curve, np.ones(5) / 5, mode="valid") if len(curve) > 5 else curve
            axis.plot(smooth, "-" if i < 10 else "--", label=result["variant"])  # matplotlib has ten colours
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
    curves[-1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    plt.close(figure)


def write_table(results_folder: Path, docs: Path) -> None:
    """Write `ablations.md`, replacing the table between its two markers, and `ablations.png`, from all results.

    Raises:
        ValueError: there are no results.
    """
    results = [json.loads(path.read_text()) for path in sorted(results_folder.glob("*.json"))]
    if not results:
        raise ValueError(f"{results_folder} holds no results; run the ablations first.")
    results.sort(key=lambda result: (result["variant"] != "full", result["variant"]))
    page, begin, end = docs / "ablations.md", "<!-- table -->\n", "<!-- /table -->\n"
    text = page.read_text() if page.is_file() else f"# Ablations\n\n{begin}{end}"
    before, _, rest = text.partition(begin)
    page.write_text(f"{before}{begin}{table(results)}{end}{rest.partition(end)[2]}")
    plot(results, docs / "ablations.png")
    print(table(results))


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """Return the options of this command, and the settings that every run is given.

    Raises:
        ValueError: see `config.read_args`.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", type=Path, nargs="*", help="variants (default: configs/ablations/*.yaml)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/ablations"), help="folder of the results")
    parser.add_argument("--docs", type=Path, default=Path("docs"), help="folder of the table and the figure")
    parser.add_argument("--table", action="store_true", help="train nothing; only make table and figure")
    args, overrides = parser.parse_known_args(argv)
    read_args(overrides)
    args.files = args.files or sorted(Path("configs/ablations").glob("*.yaml"))
    return args, overrides


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command: exit code 0, or 2 after one sentence about bad input."""
    try:
        args, overrides = parse(argv)
        titles = {file: title_of(file) for file in args.files}
        args.out.mkdir(parents=True, exist_ok=True)
        if not args.table:
            print(f"{len(titles)} variants x {len(args.seeds)} seeds; results to {args.out}, table to {args.docs}.", flush=True)
        for file, title in () if args.table else titles.items():
            path = args.out / f"{file.stem}.json"
            result: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {"runs": []}
            result |= {"variant": file.stem, "title": title, "overrides": overrides}
            for seed in args.seeds:
                if any(run["seed"] == seed for run in result["runs"]):
                    continue
                print(f"{file.stem}, seed {seed}", flush=True)
                result["runs"].append(train_once(file, seed, overrides))
                path.write_text(json.dumps(result, indent=1) + "\n")
        write_table(args.out, args.docs)
    except (ValueError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"Stopped; what is done lies in {args.out}, and the same command goes on from there.")
        return 130
    return 0
