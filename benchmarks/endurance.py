"""A long run on whatever comes: `python benchmarks/endurance.py [--steps 200]`.

The main job on 5 new tasks a step, 1,000 in all: 1 to 8 images of 28 to 1,500 pixels a side, 0 to 6 calls a rollout. What a
rollout samples is the base's; how many calls it makes, and of which box, is drawn for it. Counted: programs compiled after the
first step, resident memory step by step, and the part of encoded patches that were filling.

Writes benchmarks/results/endurance.json. Meant to take about 10 minutes on two free cores.
"""

import json
import sys
import tempfile
import zlib
from collections import Counter
from pathlib import Path

import common
import numpy as np
from PIL import Image

from imagent_jax import train
from imagent_jax.chat import Call
from imagent_jax.rollout.episode import Episode
from imagent_jax.tiny.world import make_task
from imagent_jax.types import EndReason

GROUPS, CALLS, WARM = 5, 6, 20
"""Tasks a step, most calls of a rollout, steps before memory is looked at."""
SETTINGS = [
    f"--rollout.groups={GROUPS}", "--rollout.group_size=4", "--rollout.prompt_tokens=448", "--rollout.response_tokens=512",
    "--images.max_pixels=25088", "--images.vision_block=576", "--images.pack_blocks=2", "--images.pages=4",
    "--tools.confirm_max_pixels=25088", "--tools.max_turns=7", "--tools.max_images=16", "--grpo.micro_groups=1",
    "--eval.tasks=4", "--eval.every=0", "--run.log_trajectories=0", "--run.checkpoint_every=50", "--data.name=files",
]  # fmt: skip


def write_tasks(folder: Path, count: int) -> Counter:
    """Questions of the tiny world on images of any size; returns how many have how many images."""
    rng, images = np.random.default_rng(0), Counter()
    for split, n in (("train", count), ("test", 4)):
        rows = []
        for i in range(n):
            names = []
            for number in range(int(rng.integers(1, 9))):
                width, height = (int(side) for side in rng.integers(28, 1501, 2))
                names.append(f"{split}-{i}-{number}.jpg")
                pixels = Image.fromarray(rng.integers(0, 256, (6, 6, 3), np.uint8))
                pixels.resize((width, height), Image.Resampling.BILINEAR).save(folder / names[-1], quality=70)
            images[len(names)] += split == "train"
            task, _ = make_task(rng, "train")
            rows.append({"uid": f"{split}-{i}", "question": task.question, "images": names, "answer": task.answer})
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return images


def call(images: int, rng: np.random.Generator) -> Call:
    """A call that can be executed."""
    left, top = rng.uniform(0, 700, 2)
    box = [int(left), int(top), int(rng.uniform(left + 100, 1000)), int(rng.uniform(top + 100, 1000))]
    arguments = {"image": int(rng.integers(images)) + 1, "bbox_2d": box}
    return Call("visual_confirmation", arguments)


def script_calls() -> Counter:
    """Every rollout makes as many calls as are drawn for it; returns how many made how many, as they end."""
    end, ended = Episode.end_turn, Counter()

    def end_turn(episode, ids):
        end(episode, ids)
        seed = zlib.crc32(f"{episode.task.uid}/{episode.rollout}".encode())
        full, calls = episode.length >= episode.rules.response_tokens, len(episode.turns) - 1
        if not full and calls < seed % (CALLS + 1):
            episode.end, episode.environment = None, episode.environment.fork()
            return call(len(episode.task.images), np.random.default_rng((seed, calls)))
        episode.end = episode.end or EndReason.VOID
        ended[calls] += 1
        return None

    Episode.end_turn = end_turn
    return ended


def run(folder: Path, steps: int, *flags: str) -> tuple[list[dict], Counter, Counter]:
    """The job in `folder`: metrics of its steps, tasks by images, rollouts by calls."""
    images, calls = write_tasks(folder, GROUPS * steps), script_calls()
    job = [*SETTINGS, f"--run.steps={steps}", f"--run.dir={folder}", "--run.name=run", f"--data.path={folder}"]
    if train.main([*job, "--run.compile_cache=", *flags]):
        sys.exit("error: the run failed; its message stands above.")
    records = map(json.loads, (folder / "run" / "metrics.jsonl").read_text().splitlines())
    return [record for record in records if "reward/total" in record], images, calls


def main() -> None:
    options = common.parser(__doc__)
    options.add_argument("--steps", type=int, default=200)
    args = options.parse_args()
    steps = 3 if args.quick else args.steps
    with tempfile.TemporaryDirectory() as scratch:
        found, images, calls = run(Path(scratch), steps)
    resident = [record["memory/resident_gb"] for record in found]
    later = resident[WARM:] or resident
    middle = float(np.median(later))
    waste = float(np.mean([record["vision/waste"] for record in found]))
    compiled = [int(record["compile/count"]) for record in found]
    rows = [
        ("tasks", GROUPS * steps), ("steps", steps), ("images shown", int(sum(r["vision/shown"] for r in found))),
        ("compiled in the first step", compiled[0]), ("compiled after it", sum(compiled[1:])),
        (f"resident GB after step {WARM}, median", middle), ("least of it, %", 100 * (min(later) / middle - 1)),
        ("most of it, %", 100 * (max(later) / middle - 1)),
        (f"most of it beside the most before step {WARM}, %", 100 * (max(later) / max(resident[:WARM]) - 1)),
        ("places for patches left empty, %", 100 * waste),
    ]  # fmt: skip
    common.show("Endurance", ("", "measured"), rows)
    record = {
        "steps": steps, "tasks_by_images": dict(sorted(images.items())), "rollouts_by_calls": dict(sorted(calls.items())),
        "compiled": compiled, "resident_gb": [round(x, 4) for x in resident], "waste": waste,
        "step_median_s": float(np.median([r["time/step"] for r in found])),
    }  # fmt: skip
    common.report("endurance", args, record, "cpu")


if __name__ == "__main__":
    main()
