"""Curation with measured difficulty: pass rates of the tiny base on questions that the pipeline keeps, with and without tools."""

import argparse
import json
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import common
import numpy as np

from imagent_jax.curation.pipeline import curate
from imagent_jax.curation.question import Question
from imagent_jax.curation.settings import Curation
from imagent_jax.tiny.curators import make_pictures


def measure(proposals: int, rollouts: int) -> dict:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_pictures(folder / "pictures", proposals, 0)
        own = {"folders": [str(folder / "pictures"), str(folder / "pictures_test")]}
        cfg = Curation.from_dict({
            "run": {"out": str(folder / "run"), "proposals": proposals, "parallel": 2},
            "pool": {"path": str(folder / "pictures")},
            "agents": {"backend": "imagent_jax.tiny.curators:TinyCurators", "settings": own},
            "filters": {"crop_side": 1},
            "difficulty": {"on": True, "rollouts": rollouts, "settings": {"settings": {"rollout.prompt_tokens": 160}}},
        })  # fmt: skip
        began = time.perf_counter()
        funnel = curate(cfg, progress=lambda words: print(f"  {words}", flush=True))
        seconds = time.perf_counter() - began
        questions = [Question.from_json(line) for line in (folder / "run" / "questions.jsonl").read_text().splitlines()]
    rates = defaultdict(list)
    for question in questions:
        for event in question.history:
            if event.what == "measured":
                rates[question.kind].append((event.facts["with tools"], event.facts["without"]))
    return {
        "proposals": proposals, "rollouts": rollouts, "seconds": round(seconds, 1), "kept": funnel["kept"],
        "dropped by difficulty": funnel["filters"]["difficulty"]["dropped"],
        "kinds": {kind: {"questions": len(own), "with tools": round(float(np.mean([a for a, _ in own])), 3),
                         "without": round(float(np.mean([b for _, b in own])), 3)} for kind, own in sorted(rates.items())},
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--proposals", type=int, default=60)
    parser.add_argument("--rollouts", type=int, default=4)
    args = parser.parse_args()
    path = common.RESULTS / "curation_difficulty.json"
    print(
        f"{args.proposals} proposals, {args.rollouts} rollouts with and without tools; writes {path.name} to benchmarks/results."
    )
    result = measure(args.proposals, args.rollouts) | {"machine": common.machine()}
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
