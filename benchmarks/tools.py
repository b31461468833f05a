"""Calls of the tool python: speed by backend, and endurance.

python benchmarks/tools.py                    calls a second and added milliseconds, beside in-process exec and subprocess.run
python benchmarks/tools.py --leaks 10000      calls after which no process, descriptor, file or memory may be left
"""

import argparse
import random
import statistics
import subprocess
import sys
import threading
import time

import common
import numpy as np
from PIL import Image

from imagent_jax.config import SandboxConfig
from imagent_jax.tools.sandbox import BACKENDS, Sandbox
from imagent_jax.types import ToolError

IMAGES = [Image.fromarray(np.random.default_rng(0).integers(0, 256, (480, 640, 3), np.uint8))] * 2
NOTHING, CROP = "pass", "show(images[1].crop((0, 0, 320, 240)))"


# ---- speed --------------------------------------------------------------------------------------------------------------


def two_at_a_time(call, count: int) -> dict[str, float]:
    """Median milliseconds of `count` calls on each of two threads, and calls a second of both."""
    times: list[float] = []

    def work() -> None:
        for _ in range(count):
            began = time.perf_counter()
            call()
            times.append(time.perf_counter() - began)

    threads = [threading.Thread(target=work) for _ in range(2)]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {"median_ms": 1e3 * statistics.median(times), "calls_a_second": len(times) / (time.perf_counter() - began)}


def speed(count: int) -> dict[str, dict]:
    """All ways of running code, in one run."""
    crop = compile("image.crop((0, 0, 320, 240)).tobytes()", "crop", "exec")
    done = {
        "in-process exec, nothing": two_at_a_time(lambda: exec(NOTHING, {}), count),
        "in-process exec, a crop": two_at_a_time(lambda: exec(crop, {"image": IMAGES[0]}), count),
    }
    for backend in BACKENDS:
        began = time.perf_counter()
        sandbox = Sandbox(SandboxConfig(backend=backend, wall_s=60.0, cpu_s=10**6))
        done[f"{backend}, start of the sandbox"] = {"median_ms": 1e3 * (time.perf_counter() - began), "calls_a_second": None}

        def first(sandbox=sandbox) -> None:
            worker = sandbox.open(0)
            worker.run(NOTHING, IMAGES, 4)
            worker.close()

        local = threading.local()

        def later(code: str, sandbox=sandbox, local=local) -> None:
            if not hasattr(local, "worker"):
                local.worker = sandbox.open(0)
            local.worker.run(code, IMAGES, 4)

        done[f"{backend}, a trajectory of one call"] = two_at_a_time(first, count)
        done[f"{backend}, a later call, nothing"] = two_at_a_time(lambda later=later: later(NOTHING), count)
        done[f"{backend}, a later call, a crop"] = two_at_a_time(lambda later=later: later(CROP), count)
        sandbox.close()
    plain = [sys.executable, "-c", NOTHING]
    done["subprocess.run of python"] = two_at_a_time(lambda: subprocess.run(plain, check=True), max(count // 10, 3))
    libraries = [sys.executable, "-c", "import numpy, PIL.Image, cv2, scipy.ndimage"]
    done["the same with the libraries"] = two_at_a_time(lambda: subprocess.run(libraries, check=True), max(count // 40, 2))
    return done


# ---- endurance ----------------------------------------------------------------------------------------------------------


def leaks(backend: str, calls: int) -> dict:
    """Make calls in trajectories of one to ten, every tenth of which ends its process."""
    sandbox, rng, made = Sandbox(SandboxConfig(backend=backend, wall_s=60.0)), random.Random(0), 0

    def trajectories(until: int) -> None:
        nonlocal made
        while made < until:
            worker = sandbox.open(made)
            for _ in range(rng.randint(1, 10)):
                worker.run(CROP, IMAGES, 4)
                made += 1
            if rng.random() < 0.1:
                try:
                    worker.run("import os; os._exit(1)", IMAGES, 4)
                except ToolError:
                    made += 1
            worker.close()

    trajectories(calls // 10)  # memory settles
    before = common.left(sandbox)
    trajectories(calls)
    after = common.left(sandbox)
    sandbox.close()
    same = all(after[name] == before[name] for name in ("workers", "descriptors", "folders"))
    grown = max(after[name] - before[name] for name in ("trainer_mb", "sandbox_mb"))
    if not same or grown > 20:
        sys.exit(f"error: {backend} leaves something behind: {before} became {after}.")
    return {"calls": made, "before": before, "after": after}


def main() -> None:
    parser = common.parser(__doc__, repeats=200)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--leaks", type=int, default=0, help="calls of the endurance run (0: none)")
    args = parser.parse_args()
    record: dict = {"repeats": args.repeats}
    if args.leaks:
        record["leaks"] = {backend: leaks(backend, args.leaks) for backend in BACKENDS}
    record["speed"] = speed(20 if args.quick else args.repeats)
    common.show("Calls of code, two at a time", ["", "median ms", "calls a second"],
                [(name, row["median_ms"], row["calls_a_second"] or "") for name, row in record["speed"].items()])  # fmt: skip
    for backend, row in record.get("leaks", {}).items():
        print(f"leaks, {backend}: {row}")
    common.report("tools", args, record)


if __name__ == "__main__":
    main()
