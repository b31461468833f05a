"""Is a version slower than another: `python benchmarks/versions.py BASE [NEW] [--repeats 5]`.

Trains with the code of two commits (NEW: default the newest) in turn, with the settings of the main job, and compares start-up,
rollout and update by what the runs themselves log. Both have their programs compiled before the first repeat. Writes
benchmarks/results/versions.json.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import common

ROOT = Path(__file__).parent.parent
PHASES = ("prepare", "vision", "prefill", "decode", "host", "tools", "observe")  # of a rollout
STEPS = 6


def run(code: Path, folder: Path, name: str, cache: Path) -> dict[str, float]:
    """One run of a few steps: seconds until its base is evaluated, and medians of a step's rollout and update."""
    settings = [f"--run.steps={STEPS}", "--run.checkpoint_every=0", "--eval.tasks=16", "--eval.every=0", "--eval.groups=16"]
    places = [f"--run.dir={folder}", f"--run.name={name}", f"--run.compile_cache={cache}"]
    command = [sys.executable, "-m", "imagent_jax.train", *settings, *places]
    subprocess.run(command, cwd=folder, env=os.environ | {"PYTHONPATH": str(code)}, check=True, stdout=subprocess.DEVNULL)
    records = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if "reward/total" in record]
    return {
        "start-up": steps[0]["time/total"] - steps[0]["time/step"],
        "rollout": statistics.median(sum(step[f"time/{phase}"] for phase in PHASES) for step in steps[1:]),
        "update": statistics.median(step["time/train"] for step in steps[1:]),
    }


def main() -> None:
    """Entry point."""
    options = common.parser(__doc__, repeats=5)
    options.add_argument("base", metavar="BASE", nargs="?", default="HEAD~1", help="commit to compare with")
    options.add_argument("new", metavar="NEW", nargs="?", default="HEAD")
    args = options.parse_args()
    read = ["git", "rev-parse", "--short"]
    commits = [subprocess.check_output([*read, name], cwd=ROOT, text=True).strip() for name in (args.base, args.new)]
    found: dict[str, list[dict[str, float]]] = {"base": [], "new": []}
    with tempfile.TemporaryDirectory() as scratch:
        codes = {side: Path(scratch) / side for side in found}
        for side, commit in zip(found, commits, strict=True):
            subprocess.run(["git", "clone", "-q", ROOT, codes[side]], check=True)
            subprocess.run(["git", "checkout", "-q", "--detach", commit], cwd=codes[side], check=True)
            run(codes[side], Path(scratch), f"{side}-compiles", Path(scratch) / f"{side}-cache")
        for repeat in range(1 if args.quick else args.repeats):
            for side in ("base", "new") if repeat % 2 == 0 else ("new", "base"):
                found[side].append(run(codes[side], Path(scratch), f"{side}-{repeat}", Path(scratch) / f"{side}-cache"))
                print(repeat + 1, side, {name: round(seconds, 3) for name, seconds in found[side][-1].items()}, flush=True)
    rows = []
    for name in found["base"][0]:
        medians = [statistics.median(one[name] for one in found[side]) for side in ("base", "new")]
        ratios = [new[name] / base[name] for base, new in zip(found["base"], found["new"], strict=True)]
        rows.append((name, *medians, statistics.median(ratios), min(ratios), max(ratios)))
    common.show("Seconds, and new / base", ("", "base", "new", "ratio", "least", "most"), rows)
    common.report("versions", args, {"commits": commits, "runs": found})


if __name__ == "__main__":
    main()
