"""The main job killed at random moments and resumed: `python benchmarks/survival.py [--kills 20] [--terms 3]`.

One run of a small setting goes through; another is killed (SIGKILL), or asked to stop (SIGTERM), again and again, and
resumed each time. Both must end with the same bits: every metric of every step but times, all parameters, the optimizer's
state.
"""

import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import common
import numpy as np

SMALL = [
    "--rollout.groups=2", "--rollout.group_size=2", "--rollout.response_tokens=96", "--grpo.micro_groups=1",
    "--grpo.length_buckets=2", "--grpo.minibatches=1",
    "--images.pack_blocks=4", "--images.pages=2", "--eval.tasks=4", "--eval.during=2",
    "--eval.groups=2", "--eval.every=3", "--data.train_size=64", "--data.test_size=32", "--run.checkpoint_every=1",
    "--tools.timeout_s=600", "--tools.patience_s=600",  # nothing depends on the clock
]  # fmt: skip
RESTART = 75
STEP = re.compile(r"^step +\d+/", re.M)


def start(folder: Path, name: str, log: Path, *flags: str) -> subprocess.Popen:
    """The main job in a process of its own, which resumes where there is something to resume."""
    resume = ["--run.resume=true"] if (folder / name / "config.yaml").is_file() else []
    command = [sys.executable, "-m", "imagent_jax.train", *SMALL, f"--run.dir={folder}", f"--run.name={name}", *resume]
    command += flags
    with open(log, "w") as file:
        return subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=os.environ | {"JAX_PLATFORMS": "cpu"})


def strike(process: subprocess.Popen, log: Path, number: int, rng: random.Random, startup: float, step: float) -> dict:
    """Sends a signal at a random moment: one in four while the job starts, the others within a step and a half of a step's
    end, where its checkpoint is being written. What was hit when."""
    began, early = time.perf_counter(), rng.random() < 0.25
    if not early:
        while process.poll() is None and not STEP.search(log.read_text()):
            time.sleep(0.05)
    time.sleep(rng.uniform(0, startup if early else 1.5 * step))
    running = process.poll() is None
    process.send_signal(number)
    code = process.wait()
    if not running:
        raise SystemExit(f"error: the job ended by itself with code {code}; give it more steps.\n{log.read_text()[-2000:]}")
    return {"signal": signal.Signals(number).name, "at_s": round(time.perf_counter() - began, 2), "code": code,
            "steps_done": len(STEP.findall(log.read_text()))}  # fmt: skip


def survive(folder: Path, name: str, signals: Sequence[int], seed: int, startup: float, step: float, *flags: str) -> list[dict]:
    """A run that gets `signals`, one a start, and then goes through."""
    rng, log, strikes = random.Random(seed), folder / f"{name}.log", []
    for number in signals:
        strikes.append(strike(start(folder, name, log, *flags), log, number, rng, startup, step))
        print(f"{strikes[-1]}", flush=True)
    finish(start(folder, name, log, *flags), log)
    return strikes


def finish(process: subprocess.Popen, log: Path) -> None:
    if process.wait():
        raise SystemExit(f"error: the job ended with code {process.returncode}:\n{log.read_text()[-2000:]}")


def records(run: Path) -> list[dict]:
    """The metrics of a run, less what depends on the clock and on how often the process was started."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not re.search("time/|compile/|memory/|per_second", k)} for line in lines]


def differences(a: Path, b: Path) -> list[str]:
    """In what two runs differ: metrics, the last checkpoint's arrays, the final model."""
    import jax
    import orbax.checkpoint.experimental.v1 as ocp

    found = []
    for x, y in zip(ra := records(a), rb := records(b), strict=False):
        keys = [key for key in sorted(x.keys() | y.keys()) if x.get(key) != y.get(key)]
        found += [f"step {x['step']}: {key} {x.get(key)} {y.get(key)}" for key in keys]
    if [r["step"] for r in ra] != [r["step"] for r in rb]:
        found.append(f"steps {[r['step'] for r in ra]} {[r['step'] for r in rb]}")
    last = str(ra[-1]["step"])
    trees = [jax.tree_util.tree_leaves_with_path(ocp.load((run / "checkpoints" / last).absolute())) for run in (a, b)]
    for (path, x), (_, y) in zip(*trees, strict=True):
        if np.asarray(x).tobytes() != np.asarray(y).tobytes():
            found.append(f"checkpoint {last}: {jax.tree_util.keystr(path)}")
    if (a / "model/model.safetensors").read_bytes() != (b / "model/model.safetensors").read_bytes():
        found.append("model/model.safetensors")
    return found


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--kills", type=int, default=20, help="times the job is killed (SIGKILL)")
    parser.add_argument("--terms", type=int, default=3, help="times it is asked to stop (SIGTERM)")
    parser.add_argument("--steps", type=int, default=24, help="training steps")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args = parser.parse_args()
    if args.quick:
        args.kills, args.terms, args.steps = 2, 1, 4
    with tempfile.TemporaryDirectory() as scratch:
        folder, began = Path(scratch), time.perf_counter()
        flags = [f"--run.steps={args.steps}", f"--run.compile_cache={folder}/cache", f"--data.cache_dir={folder}/data"]
        for name in ("cold", "whole"):  # the first fills the cache of compiled programs
            started, log = time.perf_counter(), folder / f"{name}.log"
            finish(start(folder, name, log, *flags), log)
        lines = [json.loads(line) for line in (folder / "whole/metrics.jsonl").read_text().splitlines()]
        step = float(np.median([line["time/step"] for line in lines if "time/step" in line]))
        startup = time.perf_counter() - started - args.steps * step
        signals = [signal.SIGKILL] * args.kills + [signal.SIGTERM] * args.terms
        random.Random(args.seed).shuffle(signals)
        strikes = survive(folder, "struck", signals, args.seed, startup, step, *flags)
        found = differences(folder / "whole", folder / "struck") + differences(folder / "whole", folder / "cold")
        count = len(records(folder / "whole"))
        record = {
            "steps": args.steps, "startup_s": round(startup, 1), "step_s": round(step, 2), "strikes": strikes,
            "records_compared": count, "differences": found, "seconds": round(time.perf_counter() - began),
        }  # fmt: skip
    common.report("survival", args, record)
    hits = {name: [s["code"] for s in strikes if s["signal"] == name] for name in sorted({s["signal"] for s in strikes})}
    rows = [[name, len(codes), " ".join(map(str, sorted(set(codes))))] for name, codes in hits.items()]
    common.show("The main job, killed and resumed", ["signal", "times", "exit codes"], rows)
    print("Identical to the uninterrupted run." if not found else "\n".join(["Not identical:", *found]))
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
