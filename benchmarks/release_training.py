"""Training on what curation keeps against training on all it was proposed: `python benchmarks/release_training.py [--steps 100]`.

Proposals of the tiny world with planted faults (`curation.py`) go through all filters, unrepaired. The tiny base is trained on
all of them and on those kept, with the same steps, seeds and settings (configs/mifg_qa_tiny.yaml without curriculum), and
evaluated on questions about other pictures in which nothing was planted. Writes benchmarks/results/release_training.json after
every run and goes on where it was stopped.
"""

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import common
import numpy as np
import scipy.stats
from curation import Counted, Planter, pictures, plan_of, run, scenes_of, settings

from imagent_jax.curation.groups import make_groups
from imagent_jax.curation.pipeline import is_kept
from imagent_jax.curation.pool import Pool, build_pool
from imagent_jax.curation.question import Question
from imagent_jax.curation.release import row_of
from imagent_jax.tiny.curators import TinyCurators, TinyCuratorsSettings

SEEDS = (0, 1, 2)


def questions_of(folder: Path, proposals: int, seed: int, planted: bool) -> tuple[list[Question], Pool]:
    """Make pictures and propose questions; return all of them, filtered and unrepaired, and the pool."""
    pictures(folder / "pictures", round(0.8 * proposals), round(0.016 * proposals) if planted else 0, seed)
    cfg = settings(folder, proposals, "run", stop_early=False)
    pool = build_pool(cfg.pool, 0, Path(cfg.run.out))
    groups = make_groups(cfg.groups, pool, 0)
    tainted = {name for name, picture in pool.pictures.items() if "planted" in picture.origin}
    plan = plan_of(proposals, groups, tainted) if planted else {}
    own = TinyCuratorsSettings(folders=(str(folder / "pictures"), str(folder / "pictures_test")), slip=0.0)
    agents = Counted(TinyCurators(own))
    found, _ = run(cfg, Planter(agents, plan, groups, scenes_of(folder, pool)), agents)
    return [found[number] for number in sorted(found)], pool


def write_split(file: Path, questions: Sequence[Question], pool: Pool) -> int:
    """Write rows with the paths of their pictures; return their number."""
    rows = [row_of(q) | {"images": [str(pool.folder / pool.pictures[i].file) for i in q.images]} for q in questions]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return len(rows)


def data_sets(folder: Path, proposals: int) -> dict[str, int]:
    """Write the folders `proposed` and `kept`, each with the same test split; return the number of rows."""
    asked, pool = questions_of(folder / "train", proposals, 0, planted=True)
    fresh, other = questions_of(folder / "test", proposals // 4, 1, planted=False)
    counts = {}
    for name, some in (("proposed", asked), ("kept", [question for question in asked if is_kept(question)])):
        counts[name] = write_split(folder / name / "train.jsonl", some, pool)
        counts["test"] = write_split(folder / name / "test.jsonl", [q for q in fresh if is_kept(q)], other)
    return counts


def train(folder: Path, name: str, seed: int, steps: int, tasks: int) -> dict[str, float]:
    """Train on a folder; return held-out accuracy before and after, and the seconds."""
    label = f"{name}-{seed}"
    options = {"data.path": folder / name, "data.curriculum": "none", "data.skip_bad": "true", "run.seed": seed,
               "run.steps": steps, "run.checkpoint_every": 0, "run.keep_best": 0, "eval.every": 0,
               "eval.tasks": tasks}  # fmt: skip
    flags = [f"--{key}={value}" for key, value in options.items()]
    records, seconds = common.train(folder / "runs", label, "--config=configs/mifg_qa_tiny.yaml", *flags)
    shutil.rmtree(folder / "runs" / label)
    return {"base": records[0]["base/accuracy"], "trained": records[-1]["final/accuracy"], "seconds": round(seconds, 1)}


def compared(runs: dict[str, dict[str, float]]) -> dict[str, object]:
    """Return accuracies and their difference with a 95 % t interval over seeds."""
    done = [seed for seed in SEEDS if all(f"{name}-{seed}" in runs for name in ("proposed", "kept"))]
    pairs = np.array([[runs[f"{name}-{seed}"]["trained"] for name in ("proposed", "kept")] for seed in done])
    difference = pairs[:, 1] - pairs[:, 0]
    low, high = scipy.stats.t.interval(0.95, len(done) - 1, difference.mean(), scipy.stats.sem(difference))
    means = {name: round(float(values.mean()), 4) for name, values in zip(("proposed", "kept"), pairs.T, strict=True)}
    interval = [round(float(low), 4), round(float(high), 4)]
    return {"seeds": done, **means, "difference": round(float(difference.mean()), 4), "interval": interval}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--proposals", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--tasks", type=int, default=200, help="held-out questions")
    parser.add_argument("--folder", type=Path, default=Path("runs/release_training"), help="data sets and runs")
    args = parser.parse_args()
    path, folder = common.RESULTS / "release_training.json", args.folder.resolve()
    print(f"{2 * len(SEEDS)} runs of {args.steps} steps; writes {path} and {folder}.", flush=True)
    made = {"proposals": args.proposals, "steps": args.steps}
    result = json.loads(path.read_text()) if path.exists() else {}
    if {name: result.get(name) for name in made} != made or not folder.exists():
        shutil.rmtree(folder, ignore_errors=True)
        result = made | {"rows": data_sets(folder, args.proposals), "runs": {}, "machine": common.machine()}
    for seed in SEEDS:
        for name in ("proposed", "kept"):
            if f"{name}-{seed}" not in result["runs"]:
                result["runs"][f"{name}-{seed}"] = train(folder, name, seed, args.steps, args.tasks)
                path.write_text(json.dumps(result, indent=1) + "\n")
    result["compared"] = compared(result["runs"])
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result["compared"]))


if __name__ == "__main__":
    main()
