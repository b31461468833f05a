"""The plans of docs/plans.md: `python benchmarks/plans.py [NAME ...]` compiles them, `python benchmarks/plans.py
--table` writes the page.

Each is one command of `imagent_jax.plan`, whose figures go to benchmarks/results/plan_NAME.json; without names, those
that are missing. Nothing is run on an accelerator, none is needed. The page holds what the files say and no more.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import jax

from imagent_jax.planner import plan

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parent.parent / "docs" / "plans.md"

SMALL = "--rollout.groups=16 --rollout.group_size=8 --rollout.prompt_tokens=4096 --rollout.response_tokens=2048"
LORA = "--lora.rank=16 --model.param_dtype=bfloat16"
SEVEN = f"--config configs/qwen2_5_vl_7b_tpu.yaml --mesh.fsdp=-1 --grpo.minibatches=1 {SMALL}"
PLANS = {
    "tiny_v5e_2x2": "--topology v5e:2x2 --mesh.fsdp=4 --grpo.micro_groups=4 --model.dtype=bfloat16 --grpo.minibatches=1",
    "7b_as_shipped_v5p_2x2x2": "--topology v5p:2x2x2 --config configs/qwen2_5_vl_7b_tpu.yaml",
    "7b_full_v5e_4x4": f"--topology v5e:4x4 {SEVEN} --mesh.tensor=4 --grpo.micro_groups=4",
    "7b_lora_v5e_4x4": f"--topology v5e:4x4 {SEVEN} --mesh.tensor=4 --grpo.micro_groups=4 {LORA}",
    "7b_full_v6e_4x4": f"--topology v6e:4x4 {SEVEN} --mesh.tensor=4 --grpo.micro_groups=4",
    "7b_lora_v6e_4x4": f"--topology v6e:4x4 {SEVEN} --mesh.tensor=4 --grpo.micro_groups=4 {LORA}",
    "7b_full_v5p_2x2x2": f"--topology v5p:2x2x2 {SEVEN} --mesh.tensor=1 --grpo.micro_groups=8",
    "7b_lora_v5p_2x2x2": f"--topology v5p:2x2x2 {SEVEN} --mesh.tensor=1 --grpo.micro_groups=8 {LORA}",
    "2b_full_v5e_2x2": "--topology v5e:2x2 --config configs/qwen2_vl_2b_gpu.yaml --mesh.fsdp=-1 --grpo.minibatches=1 "
    f"{SMALL} --grpo.micro_groups=4",
    "qwen3_8b_as_shipped_v5p_2x2x4": "--topology v5p:2x2x4 --config configs/qwen3_vl_8b_tpu.yaml",
    "72b_full_v5p": "--topology v5p --config configs/qwen2_5_vl_7b_tpu.yaml --model.path=Qwen/Qwen2.5-VL-72B-Instruct "
    f"--mesh.fsdp=-1 --mesh.tensor=8 --grpo.minibatches=1 --grpo.micro_groups=1 {SMALL}",
}
"""Their commands, after `python -m imagent_jax.plan`."""
SCALES = {
    "scale_7b_v5p": f"--topology v5p --scale=8,16,32,64,128,256 {SEVEN} --mesh.tensor=1 --grpo.micro_groups=8",
}
COLUMNS = (
    "plan", "slice", "chips", "parameters", "optimizer", "rollout's copy", "cache", "gradients", "most temporaries",
    "in all", "of", "fits", "update takes at least",
)  # fmt: skip


def command(name: str) -> str:
    return f"python -m imagent_jax.plan {(PLANS | SCALES)[name]} --json benchmarks/results/plan_{name}.json"


def compile_plans(names: list[str], only: str | None) -> None:
    for name in names:
        line = command(name) + (f" --only {only}" if only else "")
        print(line, flush=True)
        if plan.main(line.split()[3:]) == 2:
            sys.exit(2)
        jax.clear_caches()


def load(names: Iterable[str]) -> dict[str, dict]:
    files = {name: RESULTS / f"plan_{name}.json" for name in names}
    return {name: json.loads(file.read_text()) for name, file in files.items() if file.is_file()}


def row(title: str, found: dict) -> list[str]:
    """A plan as cells of the first table."""
    a, costs = found["arrays"], [c for c in found["costs"] if not c["refused"]]
    most = max((c["temporaries"] for c in costs), default=0)
    update = sum(c["bound_s"] * c["calls"] for c in costs if c["phase"] == "update")
    arrays = [a[key] for key in ("parameters", "optimizer", "rollout's copy", "cache", "gradients")]
    whole = not found["stopped"] and len(costs) == len(found["costs"])
    gb = [f"{x / 1e9:.3g}" for x in (*arrays, most, found["peak"], found["memory"])]
    fits = ("so far" if found["stopped"] else "yes") if found["fits"] else "**no**"
    return [title, found["topology"], str(found["chips"]), *gb, fits, f"{update:.2g} s" if whole else "–"]


def options(settings: dict) -> str:
    return " ".join(f"--{k}={str(v).lower() if isinstance(v, bool) else v}" for k, v in settings.items())


INTRO = """# Plans

This page lists what runs need of TPU slices. The programs are compiled ahead of time, from shapes, without a TPU
(`python -m imagent_jax.plan --help`). **No TPU was used, and no figure is a measured time.** Memory is the compiler's account:
arguments, temporaries, results and code. Arrays that are alive beside a program are added by their shapes. Operations and
exchanged bytes are counted in the programs. Lower bounds on time follow from published figures of the chips.
`python benchmarks/plans.py` writes the files in `benchmarks/results/`. `python benchmarks/plans.py --table` writes this page
from the files. All plans except those of the tiny base and of Qwen3-VL were compiled before two changes. Patches are now
bytes, so the patches of the vision program take an eighth. Tokens are now drawn by inverse transform, so the decode program
makes fewer random numbers.

## Memory

GB (10^9 bytes) of one chip. "In all" is the largest program with the arrays that are alive beside it. The lower bound on time
is for an update of all groups.
"""


BREAKS = """## What breaks first

From the shapes, for Qwen2.5-VL-7B on a growing number of chips with `mesh.tensor` unchanged:

1. **The rollout's copy of the weights.** The copy is replicated over `fsdp`, so more chips do not make it smaller. It has
   16.6 GB in bfloat16, divided only by `mesh.tensor`, which is at most 4 (the number of key heads). On any slice this is at
   best 4.2 of the 16 GB of a v5e chip.
2. **Groups.** A chip takes part in an update with a whole group, so a micro-batch has as many groups as data x fsdp. 256 chips
   with `mesh.tensor=1` train on at least 256 tasks per update. The activations of one group (G responses of R tokens, and the
   prompt) are the minimum for a chip. They shrink only with G, R and `mesh.tensor`.
3. **Gathers.** With the same work per chip (the table above), the operations of a chip do not grow. The bytes that a chip
   receives for a gradient are bounded: 53 GB on 8 chips, 59 GB on 32, and 88 to 89 GB from 64 on. From 64 chips on the compiler
   turns all-gathers into all-reduces, which move twice the bytes. `mesh.data` above 1 would keep `fsdp` below 64.
4. **Widths.** `fsdp` must divide the tower's width 1280 = 256 x 5. 256 is the largest power of two, although 512 divides 3584.
"""


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> list[str]:
    """Lines of a table, the first columns to the left."""
    marks = "".join("---|" if i < left else "---:|" for i in range(len(columns)))
    return [f"| {' | '.join(columns)} |", f"|{marks}", *(f"| {' | '.join(cells)} |" for cells in rows), ""]


def both(name: str, found: dict) -> list[tuple[str, dict]]:
    """A plan, and the nearest that fits where it does not."""
    near = found.get("nearest")
    return [(name, found), *([(f"… with `{options(near['changes'])}`", near)] if near else [])]


def program(c: dict) -> list[str]:
    """A program as cells of a table."""
    gb = [f"{c[key] / 1e9:.3g}" for key in ("arguments", "temporaries", "total")]
    if c["refused"]:
        return [c["name"], gb[0], "refused", f"> {gb[2]}", "", f"{c['flops'] / 1e12:.3g}", "", f"{c['compile_s']:.0f}"]
    rest = f"{c['wire'] / 1e9:.3g}", f"{c['flops'] / 1e12:.3g}", f"{c['bound_s']:.2g}", f"{c['compile_s']:.0f}"
    return [c["name"], *gb, *rest]


def exchanged(c: dict) -> list[str]:
    """What a program exchanges, as cells of a table."""
    kinds = ", ".join(f"{x['kind']}[{x['size']}] {x['wire'] / 1e9:.3g}" for x in c["collectives"])
    held = f"{'> ' * c['refused']}{c['total'] / 1e9:.3g}"
    return [c["name"], held, f"{c['flops'] / 1e12:.3g}", f"{c['wire'] / 1e9:.3g}", kinds]


def page() -> str:
    plans, scales = load(PLANS), load(SCALES)
    named = [pair for name, p in plans.items() for pair in both(name, p)]
    lines = [INTRO, *table(COLUMNS, (row(*pair) for pair in named))]
    part = {name: [c["name"] for c in p["costs"]] or ["arrays alone"] for name, p in plans.items() if p["stopped"]}
    if partly := [f"{name} ({', '.join(names)})" for name, names in part.items()]:
        lines += [f"Compiled in part: {'; '.join(partly)}.", ""]
    if missing := [name for name in (*PLANS, *SCALES) if name not in plans | scales]:
        lines += [f"Not compiled yet: {', '.join(missing)}.", ""]
    for name, p in plans.items():
        if p.get("ruled_out"):
            needs = ", ".join(f"{slice_} ({size / 1e9:.3g} GB)" for slice_, size in p["ruled_out"].items())
            lines += [f"{name}: too small are {needs}.", ""]
    if hopeless := [name for name, p in plans.items() if not (p["fits"] or p["stopped"] or p.get("nearest"))]:
        lines += [f"None of the changes tried makes these fit: {', '.join(hopeless)}.", ""]
    lines += ["## Programs", "Figures of one chip and one call. Received: a lower bound on the bytes from other chips.", ""]
    figures = "arguments", "temporaries", "in all", "received", "TFLOP", "at least, s", "compiled in, s"
    cells = ([title, *program(c)] for title, p in named for c in p["costs"])
    lines += table(("plan", "program", *figures), cells, 2)
    for name, record in scales.items():
        lines += [f"## The same work a chip: {name}", "By kind: [devices in a group] and GB received.", ""]
        cells = ([str(p["chips"]), *exchanged(c)] for p in record["scale"] for c in p["costs"])
        lines += table(("chips", "program", "GB held", "TFLOP", "GB received", "by kind"), cells, 2)
    commands = [record["command"] for record in (plans | scales).values()]
    return "\n".join([*lines, BREAKS, "## Commands", "```", *commands, "```"]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join((*PLANS, *SCALES))}")
    parser.add_argument("--only", metavar="PROGRAM,...", help="see imagent_jax.plan")
    parser.add_argument("--table", action="store_true", help="write docs/plans.md from the result files")
    args = parser.parse_args()
    if wrong := [name for name in args.names if name not in PLANS | SCALES]:
        parser.error(f"there is no plan {wrong[0]!r}; choose from {', '.join((*PLANS, *SCALES))}.")
    if args.table:
        PAGE.write_text(page())
        print(f"Written to {PAGE}.")
    else:
        os.chdir(PAGE.parent.parent)
        compile_plans(args.names or [name for name in (*PLANS, *SCALES) if not load([name])], args.only)


if __name__ == "__main__":
    main()
