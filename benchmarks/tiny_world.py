"""The main job on several seeds: `python benchmarks/tiny_world.py [--seeds 0 1 2] [--section.key VALUE ...]`.

Runs `python -m imagent_jax.train` once a seed, each in a process of its own with an empty compile cache, then the first
seed's start once more with the cache full. Writes benchmarks/results/tiny_world.json and tiny_world.png.
"""

import argparse
import json
import resource
import tempfile
from pathlib import Path

import matplotlib
import numpy as np
from common import RESULTS, machine, train

matplotlib.use("Agg")
import matplotlib.pyplot as plt

CURVES = {"reward/total": "reward", "accuracy": "right answers", "tools/used_rate": "rollouts that call a tool",
          "mask/dropped_tokens": "sampled tokens dropped"}  # fmt: skip


def run(seed: int, cache: str, folder: str, overrides: list[str]) -> dict:
    """One run of the main job; its figures. Peak memory is the process's own maximum resident set."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    flags = ["--run.seed", str(seed), "--run.compile_cache", cache, *overrides]
    records, seconds = train(Path(folder), f"seed{seed}", *flags)
    peak = max(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss, before) / 2**20
    steps = [r for r in records if "reward/total" in r]
    base, final = records[0], records[-1]
    return {
        "seed": seed,
        "base": {k.removeprefix("base/"): v for k, v in base.items() if k.startswith("base/")},
        "trained": {k.removeprefix("final/"): v for k, v in final.items() if k.startswith("final/")},
        "seconds": {
            "all": round(seconds, 1),
            "to_first_step": round(steps[0]["time/total"] - steps[0]["time/step"], 1),
            "first_step": round(steps[0]["time/step"], 1),
            "step_median": round(float(np.median([r["time/step"] for r in steps])), 2),
            "base_evaluation": round(base["time/evaluation"], 1),
        },
        "tokens_per_second_median": round(float(np.median([r["rollout/tokens_per_second"] for r in steps])), 1),
        "vision_waste_median": round(float(np.median([r["vision/waste"] for r in steps])), 3),
        "peak_memory_gib": round(peak, 2),
        "compiled_after_step_3": int(sum(r["compile/count"] for r in steps[3:] if "eval/accuracy" not in r)),
        "curves": {key: [round(r[key], 4) for r in steps] for key in CURVES},
        "evaluations": {r["step"]: round(r["eval/accuracy"], 4) for r in steps if "eval/accuracy" in r},
    }


def plot(runs: list[dict], path: Path) -> None:
    """Training curves of every seed, one panel a quantity."""
    figure, axes = plt.subplots(1, len(CURVES), figsize=(4 * len(CURVES), 3.2))
    for axis, (key, title) in zip(axes, CURVES.items(), strict=True):
        for one in runs:
            curve = np.asarray(one["curves"][key])
            smooth = np.convolve(curve, np.ones(5) / 5, mode="valid") if len(curve) > 5 else curve
            axis.plot(np.arange(len(smooth)) + (len(curve) - len(smooth)) / 2 + 1, smooth, label=f"seed {one['seed']}")
        axis.set_title(title)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args, overrides = parser.parse_known_args()
    runs = []
    with tempfile.TemporaryDirectory() as scratch:
        for seed in args.seeds:
            runs.append(run(seed, f"{scratch}/cache{seed}", f"{scratch}/runs", overrides))
        short = ["--run.steps", "1", "--eval.tasks", "128", "--run.name", "warm"]
        warm = run(args.seeds[0], f"{scratch}/cache{args.seeds[0]}", f"{scratch}/warm", [*overrides, *short[:4]])
    result = {
        "command": "python benchmarks/tiny_world.py " + " ".join(["--seeds", *map(str, args.seeds), *overrides]),
        "machine": machine(),
        "second_start": warm["seconds"],
        "runs": runs,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "tiny_world.json").write_text(json.dumps(result, indent=1))
    plot(runs, RESULTS / "tiny_world.png")
    for one in runs:
        print(f"seed {one['seed']}: {100 * one['base']['accuracy']:.1f} % -> {100 * one['trained']['accuracy']:.1f} % "
              f"in {one['seconds']['all']:.0f} s, peak {one['peak_memory_gib']} GiB")  # fmt: skip


if __name__ == "__main__":
    main()
