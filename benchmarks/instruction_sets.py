"""The test suite as other processors run it: `python benchmarks/instruction_sets.py [--repeats 3] [--only AVX2]`.

Runs pytest under each instruction set that XLA may use, several times, the last time beside a load that takes all cores. Records
tests passed and failed, seconds and the ten slowest tests. A run that is recorded for the same commit is not repeated, so a
stopped command goes on. Writes benchmarks/results/instruction_sets.json. Exit code 1: a test failed.

Nine runs of the whole suite; the first of each instruction set is the longest, as it compiles everything.
"""

import contextlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import common

ROOT = Path(__file__).parent.parent
SETS = {"SSE4_2": "--xla_cpu_max_isa=SSE4_2", "AVX2": "--xla_cpu_max_isa=AVX2", "own": ""}
SUMMARY = re.compile(r"^(?:=+ )?((?:\d+ \w+(?:, )?)+) in ([\d.]+)s", re.M)


@contextlib.contextmanager
def busy(cores: int) -> Iterator[None]:
    """A load of one busy process per core."""
    loads = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(cores)]
    try:
        yield
    finally:
        for load in loads:
            load.kill()
            load.wait()


def suite(flags: str, marks: list[str]) -> dict:
    """One run of pytest: outcome counts, seconds, load before it, the slowest tests and the failed ones."""
    load, began = os.getloadavg()[0], time.perf_counter()
    env = os.environ | {"XLA_FLAGS": " ".join(filter(None, [os.environ.get("XLA_FLAGS", ""), flags]))}
    command = [sys.executable, "-m", "pytest", "--durations=10", *marks]
    output = subprocess.run(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True).stdout
    counts, _ = SUMMARY.findall(output)[-1]
    return {
        "outcome": {word: int(number) for number, word in re.findall(r"(\d+) (\w+)", counts)},
        "seconds": round(time.perf_counter() - began), "load_before": round(load, 1),
        "failed": re.findall(r"^(?:FAILED|ERROR) (\S+)", output, re.M),
        "slowest": re.findall(r"^([\d.]+s \w+) +(\S+)", output, re.M),
    }  # fmt: skip


def main() -> int:
    """Entry point."""
    options = common.parser(__doc__)
    options.add_argument("--only", choices=SETS, help="one instruction set")
    args = options.parse_args()
    commit = subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, text=True).strip()
    path = (args.out or common.RESULTS) / "instruction_sets.json"
    earlier = json.loads(path.read_text()) if path.is_file() else {}
    runs = {name: list(found) for name, found in earlier.get("runs", {}).items()} if earlier.get("commit") == commit else {}
    marks = ["-m", "not slow"] if args.quick else []
    for name, flags in SETS.items():
        if args.only not in (None, name):
            continue
        done = runs.setdefault(name, [])
        while len(done) < args.repeats:
            beside = len(done) == args.repeats - 1
            print(f"{name}, run {len(done) + 1} of {args.repeats}{', beside a load' if beside else ''} …", flush=True)
            with busy(os.cpu_count() or 1) if beside else contextlib.nullcontext():
                done.append(suite(flags, marks) | {"beside_a_load": beside})
            print(f"  {done[-1]['outcome']} in {done[-1]['seconds']} s {' '.join(done[-1]['failed'])}", flush=True)
            common.report("instruction_sets", args, {"commit": commit, "runs": runs})
    rows = [
        (f"{name} {i + 1}", str(run["outcome"]), run["seconds"]) for name, found in runs.items() for i, run in enumerate(found)
    ]
    common.show("Test suite by instruction set", ("run", "outcome", "seconds"), rows)
    return int(any(run["failed"] for found in runs.values() for run in found))


if __name__ == "__main__":
    sys.exit(main())
