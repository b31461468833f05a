"""Runs with tools that act, repeated and killed: `python benchmarks/acting.py [--steps 20] [--kills 5]`.

The tiny base trains with the visual tools, `python` in a sandbox and `search` on an index. What a rollout samples is the base's
own, and so is where its turns end. How such a turn reads (a program, a query, a crop, a malformed call, an answer) is drawn for
its task and rollout. Programs use variables of earlier ones, chance, the clock, and images.

One run goes through with eight calls at once. Another does with one call at a time, each of which is delayed by chance. A third,
with three at a time and delays, is killed (SIGKILL) at random moments and resumed each time. All three must agree to the bit in
metrics (except times, memory and compile counts), trajectories, all arrays of the last checkpoint, and the final model.
"""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import common
import numpy as np
import real_use
import survival

from imagent_jax import train
from imagent_jax.chat import QWEN
from imagent_jax.chat.answers import answer_markup
from imagent_jax.index import main as index
from imagent_jax.rollout.environment import ToolEnvironment

CALLS, DELAY_S, STARTUP_S = 3, 0.3, 20.0
"""Most calls of a rollout, the longest delay of a call, and the seconds in which one start in four is killed."""
WORDS = ("tower", "river", "bridge", "harbour", "garden", "market", "museum", "station", "island", "castle")
SETTINGS = [
    *survival.SMALL, "--tools.names=[visual_reflection, visual_confirmation, python, search]", f"--tools.max_turns={CALLS}",
    "--sandbox.wall_s=120", "--sandbox.printed=160", "--search.passages=2", "--search.passage_chars=60", "--eval.tasks=0",
    "--eval.every=0", "--rollout.prompt_tokens=1024", "--rollout.response_tokens=1024", "--rollout.observation_tokens=128",
    "--run.log_trajectories=1000",
]  # fmt: skip
PROGRAMS = [
    "import random, time, uuid\nx = [random.random(), time.time(), uuid.uuid4().hex[:8], {'a', 'b', 'c'}]\nprint(x, images[1])",
    "import numpy as np\na = np.random.default_rng().integers(0, 256, (64, 64, 3), np.uint8)\nprint(a.mean())\nshow(a)",
    "try:\n    x = [*x, len(images)]\nexcept NameError:\n    x = []\nprint(x[-2:])\nshow(images[1].rotate(90, expand=True))",
    "import cv2\nim = cv2.imread('path_to_input_image.jpg')\ncv2.imwrite('path_to_output_image.jpg', im[: im.shape[0] // 2])",
    "print(len(images))\nshow(images[len(images)].crop((0, 0, 40, 40)))\nprint(y)",
    "y = sorted({hash(w) % 97 for w in ('tower', 'river', 'bridge')})\nprint(y, lambda: 0)",
    "import os\nos._exit(0)",
]


# ---- the job --------------------------------------------------------------------------------------------------------


def said(task, rollout: int, turn: int) -> str:
    """How a turn of a rollout reads."""
    rng = np.random.default_rng([zlib.crc32(f"{task.uid}/{rollout}".encode()), turn])
    if turn == CALLS or rng.random() < 0.15:
        return answer_markup(task.answer if rng.random() < 0.5 else "none") + "<|im_end|>"
    kind, box = rng.random(), [*rng.integers(0, 400, 2).tolist(), *rng.integers(500, 1000, 2).tolist()]
    if kind < 0.55:
        return QWEN.render_call("python", {"code": PROGRAMS[rng.integers(len(PROGRAMS))]})
    if kind < 0.8:
        return QWEN.render_call("search", {"query": " ".join(rng.choice(WORDS, 2))})
    if kind < 0.85:
        return "<tool_call>{not JSON}</tool_call>"
    return QWEN.render_call("visual_confirmation", {"image": int(rng.integers(1, 3)), "bbox_2d": box, "label": "it"})


def job(delay_s: float, flags: list[str]) -> int:
    """The main job, in which turns read as `said` does and every call is delayed by up to `delay_s`."""
    step, chance = ToolEnvironment.step, random.SystemRandom()

    def delayed(environment, call):
        time.sleep(chance.uniform(0, delay_s))
        return step(environment, call)

    ToolEnvironment.step = delayed
    real_use.speak(said)
    return train.main(flags)


def start(folder: Path, name: str, workers: int, delay_s: float, *flags: str) -> subprocess.Popen:
    """The job in a process of its own, which resumes where there is something to resume."""
    resume = ["--run.resume=true"] if (folder / name / "config.yaml").is_file() else []
    command = [sys.executable, __file__, "--job", str(delay_s), *SETTINGS, f"--tools.workers={workers}", f"--run.dir={folder}"]
    command += [f"--run.name={name}", f"--search.path={folder}/index", *resume, *flags]
    with open(folder / f"{name}.log", "w") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=os.environ | {"JAX_PLATFORMS": "cpu"})


# ---- the runs -------------------------------------------------------------------------------------------------------


def write_index(folder: Path, passages: int = 200) -> None:
    """Write an index of generated passages."""
    rng = random.Random(0)
    rows = [{"id": str(i), "title": rng.choice(WORDS), "text": " ".join(rng.choices(WORDS, k=12))} for i in range(passages)]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if index([str(folder / "corpus.jsonl"), str(folder / "index")]):
        raise SystemExit("error: the index was not written.")


def counted(run: Path) -> dict:
    """What a run did: its trajectories by end, and its calls by tool and status."""
    files = sorted((run / "trajectories").glob("train-*.jsonl"))
    logged = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    calls = [turn["call"] for record in logged for turn in record["turns"] if turn["call"]]
    shown = sum("parent" in image or "origin" in image for record in logged for image in record["images"])
    return {
        "steps": len(files), "trajectories": len(logged), "images_made": shown, "ends": dict(Counter(r["end"] for r in logged)),
        "calls": dict(sorted(Counter(f"{call['name'] or 'unreadable'} {call['status']}" for call in calls).items())),
    }  # fmt: skip


def step_s(run: Path) -> float:
    """Median seconds of the steps of a run so far; 1 before the first."""
    metrics = run / "metrics.jsonl"
    lines = metrics.read_text().splitlines() if metrics.is_file() else []
    return float(np.median([json.loads(line)["time/step"] for line in lines if '"time/step"' in line] or [1.0]))


def through(folder: Path, name: str, workers: int, delay_s: float, flags: list[str]) -> None:
    """A run that goes through."""
    survival.finish(start(folder, name, workers, delay_s, *flags), folder / f"{name}.log")


def struck(folder: Path, kills: int, flags: list[str]) -> list[dict]:
    """The run that is killed: while it starts, or within three steps after its first. Returns what was hit when."""
    rng, log, strikes = random.Random(0), folder / "struck.log", []
    for _ in range(kills):
        process = start(folder, "struck", 3, DELAY_S, *flags)
        strikes.append(survival.strike(process, log, signal.SIGKILL, rng, STARTUP_S, 2 * step_s(folder / "struck")))
        print(f"killed: {strikes[-1]}", flush=True)
    through(folder, "struck", 3, DELAY_S, flags)
    return strikes


def measure(folder: Path, steps: int, kills: int, *flags: str, again: bool = True) -> dict:
    """The runs, beside each other, in `folder`. Without `again`, the one that is killed is the only other run."""
    flags = [f"--run.steps={steps}", f"--run.compile_cache={folder}/programs", f"--data.cache_dir={folder}/data", *flags]
    write_index(folder)
    began = time.perf_counter()
    with ThreadPoolExecutor() as pool:
        runs = [pool.submit(through, folder, "whole", 8, 0.0, flags), pool.submit(struck, folder, kills, flags)]
        runs += [pool.submit(through, folder, "again", 1, DELAY_S, flags)] if again else []
        strikes = [run.result() for run in runs][1]
    others = ["again", "struck"] if again else ["struck"]
    found = {name: real_use.differences(folder / "whole", folder / name) for name in others}
    return counted(folder / "whole") | {"kills": strikes, "differences": found, "seconds": round(time.perf_counter() - began)}


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--steps", type=int, default=20, help="training steps")
    parser.add_argument("--kills", type=int, default=5, help="times a run is killed")
    args = parser.parse_args()
    if args.quick:
        args.steps, args.kills = 4, 1
    with tempfile.TemporaryDirectory() as scratch:
        record = measure(Path(scratch), args.steps, args.kills)
    common.report("acting", args, record)
    print(json.dumps({name: value for name, value in record.items() if name != "kills"}, indent=1))
    sys.exit(any(record["differences"].values()))


if __name__ == "__main__":
    sys.exit(job(float(sys.argv[2]), sys.argv[3:])) if sys.argv[1:2] == ["--job"] else main()
