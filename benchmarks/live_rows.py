"""How busy an evaluation keeps the engine's rows, and its memory: `python benchmarks/live_rows.py [--rows 2000]`.

The tiny base answers held-out tasks of one to several images and views, in the pieces of `imagent evaluate` (4 x groups rows),
and all at once. Records the share of live rows among those that decoding computes, and the process's memory after each piece.
Writes benchmarks/results/live_rows.json.
"""

import time
from pathlib import Path

import common


def memory_mib() -> int:
    """Return the resident memory of this process."""
    return int(Path("/proc/self/status").read_text().partition("VmRSS:")[2].split()[0]) // 1024


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--groups", type=int, default=32, help="rows in progress at once; a piece is four times as many")
    args = parser.parse_args()
    import jax

    from imagent_jax.config import TINY, load_config
    from imagent_jax.rollout.policy import Policy
    from imagent_jax.tiny.world import task_at

    policy = Policy(load_config(TINY))
    tasks = [task_at(7, "test", i) for i in range(args.rows)]
    piece, result, memory = 4 * args.groups, {}, []
    with jax.set_mesh(policy.mesh):
        for name, size in (("in pieces", piece), ("at once", args.rows)):
            began, sampled, decoded = time.perf_counter(), 0, 0
            for begin in range(0, args.rows, size):
                batch = policy.collector.collect(
                    policy.params, tasks[begin : begin + size], group_size=1, seed=0, slots=args.groups
                )
                sampled, decoded = sampled + batch.sampled_tokens, decoded + batch.decoded
                memory += [memory_mib()] if name == "in pieces" else []
                print(f"{name}: {min(begin + size, args.rows)} of {args.rows} rows", flush=True)
            result[name] = {
                "tokens": sampled, "live": round(sampled / decoded, 4), "seconds": round(time.perf_counter() - began, 1),
            }  # fmt: skip
    images = sorted({len(task.images) for task in tasks})
    common.report("live_rows", args, {
        "rows": args.rows, "groups": args.groups, "images a task": [images[0], images[-1]], **result,
        "MiB after each piece": memory,
    })  # fmt: skip


if __name__ == "__main__":
    main()
