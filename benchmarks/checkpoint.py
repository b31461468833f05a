"""What a checkpoint costs the training loop: `python benchmarks/checkpoint.py [--size small] [--repeats 3]`.

Steps are updates of the learner (`benchmarks/train_step.py`) of 4 groups of 8 rollouts, without the rollouts, which make a
real step longer. Parameters and both moments of AdamW are saved after a step, asynchronously, and the next step runs while
they are written. Stall: seconds until `RunFolder.save` returns. Writes benchmarks/results/checkpoint.json.
"""

import statistics
import tempfile
import time
from pathlib import Path

import common
from train_step import Ours, Shape, make_problem

SHAPE, QUICK = Shape(4, 8, 512, 64), Shape(2, 4, 64, 32)


def measure(size: str, shape: Shape, repeats: int, folder: Path) -> dict:
    import jax

    from imagent_jax.config import Config
    from imagent_jax.runs.folder import RunFolder

    common.random_checkpoint(folder, size)
    ours = Ours(folder, make_problem(shape, common.SIZES[size]["vocab_size"]), shape)
    run = RunFolder(Config.from_dict({"run": {"dir": str(folder), "name": "run"}}))

    def save(step: int) -> None:
        run.save(step, ours.learner.split(ours.params)[0], ours.state, {"step": step})

    plain = common.seconds(ours.step, repeats)
    stalls, during, written = [], [], []
    for step in range(repeats + 1):
        began = time.perf_counter()
        save(step)
        stalls.append(time.perf_counter() - began)
        during += common.seconds(ours.step, 1, warmup=0)
        run.settle()
        written.append(time.perf_counter() - began)
    run.close()
    trained = (ours.learner.split(ours.params)[0], ours.state)
    stalls, during, written = stalls[1:], during[1:], written[1:]  # the first compiles the checksums
    return {
        "size": size, "shape": str(shape), "saved_gb": sum(x.nbytes for x in jax.tree.leaves(trained)) / 1e9,
        "parameters": sum(x.size for x in jax.tree.leaves(ours.params)),
        "step": common.median(plain), "stall": common.median(stalls), "step_while_writing": common.median(during),
        "stall_share_of_step": statistics.median(stalls) / statistics.median(plain),
        "on_disk_within_s": round(statistics.median(written), 2), "device": jax.devices()[0].device_kind,
    }  # fmt: skip


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--size", choices=common.SIZES, default="small")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        record = measure("tiny" if args.quick else args.size, QUICK if args.quick else SHAPE, args.repeats, Path(scratch))
    common.report("checkpoint", args, record, record["device"])
    common.show("An asynchronous checkpoint", ["", "value"], [
        ["saved, GB", record["saved_gb"]], ["step, s", record["step"]["median_s"]], ["stall, s", record["stall"]["median_s"]],
        ["stall, % of a step", 100 * record["stall_share_of_step"]],
        ["step while it is written, s", record["step_while_writing"]["median_s"]],
        ["on disk within, s", record["on_disk_within_s"]],
    ])  # fmt: skip


if __name__ == "__main__":
    main()
