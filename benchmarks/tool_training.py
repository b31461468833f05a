"""The tool worlds trained on several seeds: `python benchmarks/tool_training.py [--configs tiny_code ...] [--seeds 0 1 2]`.

For each configuration and seed: `python -m imagent_jax.train`, then base and trained agent on held-out tasks: accuracy and calls
by kind of question, and accuracy where what tools return is exchanged with another task's (`shuffle`). Counts the programs of
the training run by how they ended, and the processes of the sandbox that are left. Writes benchmarks/results/tool_training.json
after every run; a run that stands there is not done again.
"""

import argparse
import json
import shutil
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

import common
import numpy as np

CONFIGS = ("tiny_code", "tiny_search", "tiny_all")
ROOT = Path(__file__).parent.parent


def train(name: str, seed: int, folder: Path, overrides: Sequence[str]) -> dict:
    """Train; return accuracies before and after by kind, the curve, seconds, and calls of tools in training by how they ended."""
    flags = [f"--config=configs/{name}.yaml", f"--run.seed={seed}", *overrides]
    records, seconds = common.train(folder, f"{name}-{seed}", *flags)
    steps = [record for record in records if "reward/total" in record]
    rollouts = trained_config(folder / f"{name}-{seed}").rollout
    size = rollouts.groups * rollouts.group_size
    calls = Counter()
    for record in steps:
        calls.update({k: round(v * size) for k, v in record.items() if k.startswith("tools/calls/") and k.count("/") == 3})
    ends = {"base": records[0], "final": records[-1]}
    return {
        "seconds": round(seconds, 1), "steps": len(steps),
        "step_median": round(float(np.median([r["time/step"] for r in steps])), 2),
        **{end: {k.removeprefix(f"{end}/"): round(v, 4) for k, v in record.items() if k.startswith(f"{end}/accuracy")}
           for end, record in ends.items()},
        "calls in training": {k.removeprefix("tools/calls/"): n for k, n in sorted(calls.items()) if n},
        "curve": [round(record["accuracy"], 3) for record in steps],
    }  # fmt: skip


def trained_config(run: Path):
    """Return the configuration of a run."""
    from imagent_jax.config import load_config

    return load_config(run / "config.yaml")


def habits(cfg, tasks: int) -> dict:
    """Return accuracy and calls by kind of question on held-out tasks, and accuracy under `shuffle`."""
    import jax

    from imagent_jax.evals.controls import variants
    from imagent_jax.evals.evaluate import evaluate
    from imagent_jax.rollout.collect import Collector
    from imagent_jax.rollout.policy import Policy
    from imagent_jax.types import CallStatus

    policy = Policy(cfg)
    how = {"groups": cfg.eval.groups, "seed": cfg.eval.seed, "greedy": False, "temperature": cfg.rollout.temperature}
    with jax.set_mesh(policy.mesh):
        metrics, done = evaluate(policy.collector, policy.params, policy.test_tasks(tasks), **how)
        (variant,) = variants("shuffle", done, cfg.eval.seed)
        other = Collector(policy.model, policy.processor, policy.tools, cfg, environment=variant.environment)
        shuffled, _ = evaluate(other, policy.params, variant.tasks, **how)
    calls = defaultdict(Counter)
    for t in done:
        calls[t.task.kind]["tasks"] += 1
        calls[t.task.kind].update(turn.call.name for turn in t.turns if turn.call and turn.call.status == CallStatus.EXECUTED)
    kinds = {
        kind: {"accuracy": round(metrics[f"accuracy/{kind}"], 4), "shuffled": round(shuffled[f"accuracy/{kind}"], 4),
               "calls a task": {name: round(n / own["tasks"], 2) for name, n in sorted(own.items()) if name != "tasks"}}
        for kind, own in sorted(calls.items())
    }  # fmt: skip
    return {"accuracy": round(metrics["accuracy"], 4), "shuffled": round(shuffled["accuracy"], 4), "kinds": kinds}


def left_over() -> int:
    """Return the number of processes of the sandbox that still run."""
    found = 0
    for status in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found += b"imagent_jax/tools/sandbox" in status.read_bytes()
        except OSError:
            continue
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--configs", nargs="+", default=CONFIGS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--tasks", type=int, default=256, help="held-out tasks for habits and control")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "tool_training", help="of the runs")
    args, overrides = parser.parse_known_args()
    path = common.RESULTS / "tool_training.json"
    result = json.loads(path.read_text()) if path.exists() else {}
    print(f"Trains {', '.join(args.configs)} on seeds {args.seeds}; writes {path}.", flush=True)
    for name in args.configs:
        for seed in args.seeds:
            key = f"{name}, seed {seed}" + "".join(f" {one}" for one in overrides)
            if key in result:
                continue
            shutil.rmtree(args.folder / f"{name}-{seed}", ignore_errors=True)
            run = train(name, seed, args.folder, overrides)
            run["sandbox processes left"] = left_over()
            cfg = trained_config(args.folder / f"{name}-{seed}")
            if seed == args.seeds[0]:
                run["base habits"] = habits(cfg, args.tasks)
            run["habits"] = habits(cfg.changed({"model.path": str(args.folder / f"{name}-{seed}" / "model")}), args.tasks)
            result[key] = run | {"machine": common.machine()}
            path.write_text(json.dumps(result, indent=1) + "\n")
            base, final = run["base"]["accuracy"], run["final"]["accuracy"]
            print(f"{key}: {100 * base:.1f} % -> {100 * final:.1f} % in {run['seconds']:.0f} s; shuffled "
                  f"{100 * run['habits']['shuffled']:.1f} %", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
