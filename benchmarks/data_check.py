"""The check of a task file at the start: `python benchmarks/data_check.py [--rows 50000] [--images 300]`.

Writes a JSON Lines file of questions about two to four of the images, which rows share, and reads it as a run does: every
image is decoded, every prompt is rendered and counted with the tiny base's tokenizer, every answer is scored against itself.
Reports seconds and peak memory of a first start and of a second, which recalls the verdict, each in a process of its own.
Writes benchmarks/results/data_check.json.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
from common import PeakMemory, child, parser, report, show
from PIL import Image


def write(folder: Path, rows: int, images: int) -> None:
    """Write `train.jsonl` and its images, 320 x 240 pixels, half of them JPEG."""
    rng = np.random.default_rng(0)
    names = [f"{i}.{'jpg' if i % 2 else 'png'}" for i in range(images)]
    for name in names:
        small = Image.fromarray(rng.integers(0, 256, (24, 32, 3), np.uint8))
        small.resize((320, 240), Image.Resampling.BICUBIC).save(folder / name)
    with open(folder / "train.jsonl", "w") as file:
        for i in range(rows):
            shown = [names[k] for k in rng.integers(images, size=rng.integers(2, 5))]
            row = {"question": f"Which of the images has tag number {i}?", "images": shown, "answer": i, "answer_type": "number"}
            file.write(json.dumps(row) + "\n")


def measure(folder: Path) -> dict:
    """Read the file as a run does, with the model's part of the start left out."""
    from imagent_jax.config import Config
    from imagent_jax.data.pipeline import open_tasks
    from imagent_jax.model import checkpoint
    from imagent_jax.model.processor import Processor
    from imagent_jax.rollout.collect import Collector
    from imagent_jax.tools import tools_by_name

    cfg = Config().changed({"data.name": "files", "data.path": str(folder), "data.cache_dir": str(folder / "cache")})
    path = checkpoint.resolve("tiny")
    processor, model = Processor.from_pretrained(path), checkpoint.from_pretrained(path, progress=False).split()[0]
    check = Collector(model, processor, tools_by_name(cfg.tools.names), cfg).check
    memory, sentences, began = PeakMemory(), [], time.perf_counter()
    before = memory.read()["peak_resident_gb"]
    tasks = open_tasks(cfg.data, "train", check, sentences.append)
    taken = time.perf_counter() - began
    return {"rows": len(tasks), "seconds": round(taken, 2), "progress_sentences": len(sentences),
            "before_gb": before} | memory.read()  # fmt: skip


def main() -> None:
    options = parser(__doc__, repeats=3)
    options.add_argument("--rows", type=int, default=50_000)
    options.add_argument("--images", type=int, default=300)
    options.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    args = options.parse_args()
    if args.child:
        print(json.dumps(measure(args.child)))
        return
    rows, images = (500, 30) if args.quick else (args.rows, args.images)
    starts = {"first": [], "second": []}
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), rows, images)
        for _ in range(args.repeats):
            for file in (Path(folder) / "cache").rglob("*.json"):
                file.unlink()
            for done in starts.values():
                done.append(child(__file__, ["--child", folder]))
    found = {start: sorted(done, key=lambda one: one["seconds"])[len(done) // 2] for start, done in starts.items()}
    for start, done in starts.items():
        found[start]["repeats_s"] = [one["seconds"] for one in done]
    report("data_check", args, {"rows": rows, "images": images} | found)
    show(f"Check of {rows:,} rows with {images} images", ["start", "seconds", "peak GB", "GB before"],
         ([start, one["seconds"], one["peak_resident_gb"], one["before_gb"]] for start, one in found.items()))  # fmt: skip


if __name__ == "__main__":
    main()
