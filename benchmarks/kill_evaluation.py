"""An evaluation killed at ten moments and resumed: `python benchmarks/kill_evaluation.py [--rows 2000]`.

Evaluates the tiny base on rows of the tiny world of mixed sizes, once without interruption and once killed with SIGKILL at
moments drawn by seed. Both results must be the same to the byte. `--scripted` puts a policy that answers by the row's name, in no
time, in place of the base: then only what keeps, resumes and scores is tried. Records the pieces that were kept at each kill and
the peak memory of the process by pieces done. Writes benchmarks/results/kill_evaluation.json.
"""

import hashlib
import json
import multiprocessing
import random
import sys
import tempfile
import threading
import time
import zlib
from pathlib import Path
from types import SimpleNamespace

import common
import numpy as np

KILLS = 10
PICTURES = 20
"""Tasks whose pictures are written; further rows have the same pictures under other names."""


def write_rows(folder: Path, count: int) -> Path:
    """Write tasks of the tiny world as JSON Lines, and their images."""
    from imagent_jax.tiny.world import task_at

    folder.mkdir()
    with open(folder / "rows.jsonl", "w") as file:
        for i in range(count):
            task = task_at(7, "test", i % PICTURES)
            names = [f"{i % PICTURES}-{k}.jpg" for k in range(len(task.images))]
            for name, data in zip(names, task.images, strict=True) if i < PICTURES else ():
                (folder / name).write_bytes(data)
            row = {"question": task.question, "images": names, "answer": task.answer, "answer_type": task.answer_type}
            file.write(json.dumps(row | {"uid": str(i), "kind": task.kind}) + "\n")
    return folder / "rows.jsonl"


class Scripted:
    """A collector whose policy answers by the hash of the row's name: right, wrong, cut off, or an environment error."""

    def __init__(self, cfg):
        self.cfg = cfg

    def collect(self, params, tasks, *, group_size: int, **_):
        time.sleep(0.02)
        return SimpleNamespace(trajectories=[[self.trajectory(task, i) for i in range(group_size)] for task in tasks])

    def trajectory(self, task, rollout: int):
        from imagent_jax.types import EndReason, Trajectory, Turn

        luck = zlib.crc32(f"{task.uid} {rollout}".encode()) % 8
        end = {6: EndReason.TRUNCATED, 7: EndReason.FAULT}.get(luck, EndReason.ANSWERED)
        answer = None if luck > 5 else task.answer if luck < 3 else f"{luck}"
        none = np.zeros(2, np.int32)
        arrays = none, none.astype(np.float32), none.astype(np.uint8), np.zeros((3, 2), np.int32), none
        return Trajectory(task, rollout, *arrays, [Turn(0, 2, answer or "")], end, answer, error="no disk" if luck == 7 else None)


def evaluate_scripted(rows: Path, out: Path, groups: int) -> int:
    """Evaluate the scripted policy; write the result."""
    from imagent_jax.config import TINY, DataConfig, load_config
    from imagent_jax.evals.benchmarks import named
    from imagent_jax.evals.harness import Opened, Pieces, fingerprint, sample
    from imagent_jax.evals.result import result_of

    cfg, (benchmark, path) = load_config(TINY).changed({"eval.groups": groups}), named(f"own={rows}")
    opened = Opened(benchmark, benchmark.open(path, DataConfig(cache_dir=str(rows.parent / "cache"))), False)
    count = opened.count(None)
    pieces = Pieces(out / "samples" / "own-rows.jsonl", fingerprint(cfg, opened, count, rows.parent))
    records, _ = sample(Scripted(cfg), None, opened, count, pieces)
    result = {"benchmarks": {"own-rows": result_of(benchmark, opened.questions.facts[:count], records)}}
    (out / "result.json").write_text(json.dumps(result, indent=1))
    return 0


def evaluate_base(rows: Path, out: Path, groups: int) -> int:
    """Evaluate the tiny base by the command."""
    from imagent_jax.evals.evaluate import main

    return main([
        "--config=configs/tiny.yaml", f"--benchmark=own={rows}", f"--out={out}", f"--eval.groups={groups}",
        f"--data.cache_dir={rows.parent / 'cache'}",
    ])  # fmt: skip


class Evaluation:
    """A process that evaluates, a fork of this one, which has imported all but started no backend. Its memory is sampled."""

    def __init__(self, evaluate, rows: Path, out: Path, groups: int):
        self.samples, self.memory, self.began = out / "samples" / "own-rows.jsonl", [], time.perf_counter()
        self.process = multiprocessing.get_context("fork").Process(target=lambda: sys.exit(evaluate(rows, out, groups)))
        self.process.start()
        threading.Thread(target=self._watch, daemon=True).start()

    def pieces(self) -> int:
        return max(0, self.samples.read_bytes().count(b"\n") - 1) if self.samples.exists() else 0

    def wait(self) -> int:
        self.process.join()
        return self.process.exitcode

    def _watch(self) -> None:
        while self.process.is_alive():
            try:
                status = Path(f"/proc/{self.process.pid}/status").read_text()
            except OSError:
                return
            kib = int(status.partition("VmRSS:")[2].split()[0]) if "VmRSS:" in status else 0
            self.memory.append((self.pieces(), kib // 1024))
            time.sleep(1)


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--groups", type=int, default=32, help="rows in progress at once; a piece is four times as many")
    parser.add_argument("--scripted", action="store_true", help="a scripted policy in place of the base")
    args, rng = parser.parse_args(), random.Random(0)
    import imagent_jax.evals.evaluate  # noqa: F401 - before the first fork

    evaluate = evaluate_scripted if args.scripted else evaluate_base
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        rows = write_rows(folder / "rows", args.rows)
        whole = Evaluation(evaluate, rows, folder / "whole", args.groups)
        assert whole.wait() == 0
        seconds = time.perf_counter() - whole.began
        total, kept = whole.pieces(), []
        for kill in range(KILLS):
            run = Evaluation(evaluate, rows, folder / "killed", args.groups)
            until = total * (kill + 1) / (KILLS + 1)
            while run.pieces() < until and run.process.is_alive():
                time.sleep(0.2)
            time.sleep(rng.uniform(0, seconds / total))  # at any moment of the next piece
            run.process.kill()
            run.wait()
            kept.append(run.pieces())
            print(f"killed with {kept[-1]} of {total} pieces", flush=True)
        run = Evaluation(evaluate, rows, folder / "killed", args.groups)
        assert run.wait() == 0
        results = [(folder / name / "result.json").read_bytes() for name in ("whole", "killed")]
        assert results[0] == results[1], "the results differ"
        by_piece = {
            piece: max(mib for at, mib in whole.memory if at == piece) for piece in sorted({at for at, _ in whole.memory})
        }
        result = json.loads(results[0])["benchmarks"]["own-rows"]
    common.report("kill_evaluation", args, {
        "policy": "scripted" if args.scripted else "the tiny base", "rows": args.rows,
        "pieces": total, "kills": KILLS, "pieces kept at each kill": kept, "same to the byte": True,
        "sha256": hashlib.sha256(results[0]).hexdigest(), "seconds without a kill": round(seconds, 1),
        "peak MiB by pieces done": by_piece, "strict": result["scores"][""]["strict"]["micro"],
    })  # fmt: skip


if __name__ == "__main__":
    main()
