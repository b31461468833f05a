"""Check whether a run fits its chips without the chips: `python -m imagent_jax.plan --topology v5e:4x4 [--config FILE.yaml] ...`.

Compiles the programs of a training step (the same functions that `train.py` runs) ahead of time, from shapes alone. No
weights are created, and neither a TPU nor a network is needed, only jax and libtpu. Reports memory, communication and FLOPs
per chip. If the memory does not suffice, searches for the smallest change of settings that fits and compiles it.
Exit code 0: fits, 1: does not fit, 2: bad input.

    --topology v5e:4x4    CHIP:SHAPE; a TPU without a shape (v5p): the smallest slice that fits; cpu:8 or h100:8:
                          simulated by XLA's CPU backend, whose temporaries differ from those of a GPU
    --memory GB           memory per chip, in place of the published figure
    --scale 8,16,32       constant work per chip on slices of these numbers of chips: bytes exchanged and FLOPs
    --json FILE           write all figures as JSON
    --no-remedy           do not search for changes that fit
    --only NAME,NAME      compile only these programs of a step ("arrays": none); "fits" then refers to these programs

Time bounds are lower bounds from a chip's published peak figures (`CHIPS`), not predictions: the largest of FLOPs at the peak
rate, arguments and results moved once through HBM, and collectives at the full link rate.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from imagent_jax.config import Config, read_args
from imagent_jax.planner.programs import SLICES, Chip, Cost, RunArrays, chip_bytes, cost, open_topology, programs
from imagent_jax.rollout.policy import training_mesh

# ---- the plan --------------------------------------------------------------------------------------------------------


@dataclass
class Plan:
    """Memory, communication and FLOPs of the programs of a step on a topology. Figures are per chip; GB below are 10^9 bytes."""

    topology: str
    chips: int
    mesh: dict[str, int]
    memory: float
    settings: dict[str, Any]
    arrays: dict[str, int]
    least: int  # bytes of the arrays that are alive at the same time, without any program
    costs: list[Cost]
    stopped: bool = False  # some programs were not compiled

    @property
    def peak(self) -> Cost:
        return max([Cost("arrays", "", 1, total=self.least), *self.costs], key=lambda c: c.total)

    @property
    def fits(self) -> bool:
        return self.peak.total <= self.memory and not any(c.refused for c in self.costs)

    def bound(self, *names: str) -> float:
        """Return the lower bound, in seconds, on the time a step spends in the named programs, over all their calls."""
        return sum(c.bound_s * c.calls for c in self.costs if c.name in names)

    def to_dict(self) -> dict[str, Any]:
        costs = [vars(c) | {"collectives": [x._asdict() | {"wire": x.wire} for x in c.collectives]} for c in self.costs]
        return vars(self) | {"costs": costs, "peak": self.peak.total, "peak_program": self.peak.name, "fits": self.fits}


ASPECTS = (
    "model.path",
    "model.param_dtype",
    "model.remat",
    "model.freeze_vision",
    "lora.rank",
    "rollout.groups",
    "rollout.group_size",
    "rollout.prompt_tokens",
    "rollout.response_tokens",
    "grpo.micro_groups",
    "optim.moment_dtype",
)


def hold(cfg: Config, topology: str, memory: float | None = None) -> tuple[RunArrays, Chip]:
    """Return the arrays of a run on a topology and the chip, whose memory is `memory` bytes if given.

    Raises:
        ValueError: unknown topology, unknown model or invalid mesh.
    """
    chip, devices = open_topology(topology)
    return RunArrays(cfg, training_mesh(cfg, devices), chip.platform), chip._replace(memory=memory or chip.memory)


def least(held: RunArrays) -> int:
    """Return the bytes per chip of the arrays alive at the same time, maximum over rollout and update; needs no compilation."""
    both = held.params, held.opt_state, held.pages, held.reference
    return max(chip_bytes(both, held.sampled, held.state), chip_bytes(both, held.total, held.of_pages, held.shown))


def make_plan(
    cfg: Config,
    topology: str,
    memory: float | None = None,
    *,
    only: Sequence[str] = (),
    first: Sequence[str] = (),
    give_up: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> Plan:
    """Compile the programs of a step and return their costs.

    Args:
        memory: bytes per chip; default: the published figure.
        only: names of programs to compile (default: all); first: names of programs to compile first.
        give_up: stop at the first program that does not fit.
        say: called with one line of text per compiled program.
    Raises:
        ValueError: unknown program name, or see `hold`.
    """
    held, chip = hold(cfg, topology, memory)
    arrays = {
        "parameters": chip_bytes(held.params),
        "optimizer": chip_bytes(held.opt_state),
        "rollout's copy": chip_bytes(held.sampled),
        "cache": chip_bytes(held.state),
        "image features": chip_bytes(held.pages, held.of_pages, held.shown),
        "gradients": chip_bytes(held.total),
        "reference": chip_bytes(held.reference),
    }
    settings = {name: cfg.get(name) for name in ASPECTS}
    plan = Plan(topology, held.mesh.size, dict(held.mesh.shape), chip.memory, settings, arrays, least(held), [])
    every = list(programs(held))
    if wrong := set(only) - {"arrays", *(p.name for p in every)}:
        names = ", ".join(p.name for p in every)
        raise ValueError(f"This run has no program {min(wrong)!r}; choose from arrays, {names}.")
    chosen = [p for p in every if not only or p.name in only]
    plan.stopped = len(chosen) < len(every)
    for program in sorted(chosen, key=lambda p: p.name not in first):
        found = cost(held, program, chip)
        plan.costs.append(found)
        say(f"{program.name}: {found.total / 1e9:.2f} GB, compiled in {found.compile_s:.0f} s")
        if give_up and not plan.fits:
            plan.stopped = True
            break
    plan.costs.sort(key=lambda c: [p.name for p in every].index(c.name))
    return plan


# ---- search for settings that fit ------------------------------------------------------------------------------------

TRIES = 8
"""Maximum number of combinations of changes that are compiled."""


def changes(cfg: Config, mesh: dict[str, int]) -> list[tuple[str, dict[str, Any]]]:
    """Return single changes of settings that reduce memory, cheapest first.

    Each change has the phase that it helps ("rollout", "update" or "" for both) and its settings by dotted name.
    """
    shards, devices, g, r = (
        mesh["data"] * mesh["fsdp"],
        mesh["data"] * mesh["fsdp"] * mesh["tensor"],
        cfg.grpo,
        cfg.rollout,
    )
    found: list[tuple[str, dict[str, Any]]] = []
    if g.micro_groups > shards:
        found.append(("update", {"grpo.micro_groups": shards}))
    if cfg.model.remat != "full":
        found.append(("update", {"model.remat": "full"}))
    if mesh["data"] > 1:
        found.append(("", {"mesh.data": 1, "mesh.fsdp": devices // mesh["tensor"]}))
    for tensor in (2, 4, 8):
        if tensor > mesh["tensor"] and devices % tensor == 0:
            found.append(("", {"mesh.tensor": tensor, "mesh.data": 1, "mesh.fsdp": devices // tensor}))
    least = shards * g.minibatches
    found += [("rollout", {"rollout.groups": n}) for n in (r.groups // 2, r.groups // 4) if n >= least]
    if not cfg.lora.on:
        found.append(("", {"lora.rank": 16, "model.freeze_vision": True, "model.param_dtype": "bfloat16"}))
    found += [("", {"rollout.response_tokens": r.response_tokens // n}) for n in (2, 4)]
    found += [("", {"rollout.group_size": r.group_size // 2})] if r.group_size > 2 else []
    return found


def nearest(cfg: Config, plan: Plan, say: Callable[[str], None]) -> tuple[dict[str, Any] | None, Plan | None, int]:
    """Search for the smallest combination of `changes` with which a plan fits.

    Combinations whose arrays alone exceed the memory are not compiled. At most `TRIES` combinations are compiled.

    Returns:
        The settings and their plan (None if no compiled combination fits), and the number of compiled combinations.
    """
    phases = {c.phase for c in plan.costs if c.refused or c.total > plan.memory}
    worst = [c.name for c in sorted(plan.costs, key=lambda c: -c.total) if c.refused or c.total > plan.memory]
    singles, tried = changes(cfg, plan.mesh), 0
    for number in (1, 2, 3, 4):
        for combination in combinations(singles, number):
            names = [name for _, settings in combination for name in settings]
            helped = {phase for phase, _ in combination}
            if len(set(names)) < len(names) or not ("" in helped or phases <= helped):
                continue
            settings = {name: value for _, part in combination for name, value in part.items()}
            try:
                other = cfg.changed(settings)
                held, chip = hold(other, plan.topology, plan.memory)
            except ValueError:
                continue
            if least(held) > plan.memory:
                continue
            if tried == TRIES:
                return None, None, tried
            tried += 1
            say(f"Trying {options(settings)}")
            found = make_plan(other, plan.topology, plan.memory, first=worst, give_up=True, say=say)
            if found.fits:
                return settings, found, tried
    return None, None, tried


def options(settings: dict[str, Any]) -> str:
    """Return settings as command-line options."""
    return " ".join(f"--{name}={str(value).lower() if isinstance(value, bool) else value}" for name, value in settings.items())


def resized(cfg: Config, chips: int, fixed: int) -> Config:
    """Return the run for another number of chips with constant work per chip: the mesh's `fsdp` and the groups grow together.

    Args:
        fixed: number of chips of `cfg`.
    """

    def times(n: int) -> int:
        return max(1, n * chips // fixed)

    tensor, micro = cfg.mesh.tensor, times(cfg.grpo.micro_groups)
    return cfg.changed(
        {
            "mesh.data": 1,
            "mesh.fsdp": chips // tensor,
            "mesh.tensor": tensor,
            "grpo.micro_groups": micro,
            "rollout.groups": max(times(cfg.rollout.groups), micro * cfg.grpo.minibatches),
        }
    )


def smallest_slice(
    cfg: Config, kind: str, memory: float | None, only: Sequence[str], say: Callable[[str], None]
) -> tuple[Config, Plan, dict[str, int]]:
    """Find the smallest of `SLICES` on which the run fits. The number of groups is rounded up to a multiple of the mesh.

    Args:
        kind: name of the chip.
        only: see `make_plan`.
    Returns:
        Configuration and plan on that slice (on the largest if none fits), and the bytes per chip on the smaller slices.
    """
    ruled_out = {}
    for shape in SLICES[kind]:
        topology, last = f"{kind}:{shape}", shape == SLICES[kind][-1]
        chip, devices = open_topology(topology)
        if len(devices) % cfg.mesh.tensor:
            continue
        shards = len(devices) // max(cfg.mesh.tensor, 1)
        groups = -(-cfg.rollout.groups // shards) * shards
        other = cfg.changed({"mesh.data": 1, "mesh.fsdp": -1, "rollout.groups": groups})
        held, chip = hold(other, topology, memory)
        if (need := least(held)) > chip.memory and not last:
            say(f"{topology}: {need / 1e9:.1f} GB of arrays alone, too much")
            ruled_out[topology] = need
            continue
        plan = make_plan(other, topology, memory, only=only, first=["train"], give_up=not last, say=say)
        say(f"{topology}: {plan.peak.total / 1e9:.1f} GB, {'fits' if plan.fits else 'too much'}")
        if plan.fits or last:
            return other, plan, ruled_out
        ruled_out[topology] = plan.peak.total
    raise AssertionError("there is a last slice")


# ---- the command -----------------------------------------------------------------------------------------------------


def show(plan: Plan, console: Console) -> None:
    """Print a plan as a table."""
    shape = ", ".join(f"{axis} {size}" for axis, size in plan.mesh.items())
    held = ", ".join(f"{name} {size / 1e9:.3f}" for name, size in plan.arrays.items() if size)
    console.print(
        f"[bold]{plan.settings['model.path']}[/] on {plan.topology}: {plan.chips} chips of {plan.memory / 1e9:.3g} GB, "
        f"{shape}. A chip holds, in GB: {held}."
    )
    table = Table(title="programs of a step: GB of a chip, TFLOP of a chip and call, bound in ms of a call")
    for i, name in enumerate(
        ("program", "calls", "arguments", "temporaries", "beside", "total", "received", "TFLOP", "bound", "compiled")
    ):
        table.add_column(name, justify="right" if i else "left", no_wrap=True)
    for c in plan.costs:
        gb = [f"{x / 1e9:.2f}" for x in (c.arguments, c.temporaries, c.resident, c.total)] + [f"{c.wire / 1e9:.3f}"]
        if c.refused:
            gb[1], gb[3], gb[4] = "refused", f"> {gb[3]}", ""
        calls = f"<= {c.calls}" if c.name in ("decode", "vision", "vision backward") else str(c.calls or "")
        bound = f">= {1e3 * c.bound_s:.2g}" if c.bound_s else ""
        table.add_row(c.name, calls, *gb, f"{c.flops / 1e12:.3g}", bound, f"{c.compile_s:.0f} s")
    if plan.costs:
        console.print(table)
    verdict = "fits" if plan.fits else "does NOT fit"
    verdict += ", as far as it was compiled" * plan.stopped
    console.print(
        f"Most in {plan.peak.name}: {plan.peak.total / 1e9:.2f} of {plan.memory / 1e9:.2f} GB. It {verdict}.",
        soft_wrap=True,
    )
    token = 1e3 * plan.bound("decode") / plan.settings["rollout.response_tokens"]
    update = plan.bound("score", "reference", "train", "apply")
    if update:
        console.print(f"A bound, not a time: no update of all groups takes less than {update:.2g} s.", soft_wrap=True)
    if token:
        console.print(f"A bound, not a time: no token of all rows takes less than {token:.2g} ms.", soft_wrap=True)


def scale(cfg: Config, kind: str, counts: Sequence[int], memory: float | None, say) -> list[Plan]:
    """Return plans of decoding and of the gradient with constant work per chip, on slices of `counts` chips.

    Raises:
        ValueError: no slice has this number of chips.
    """
    sizes = {int(np.prod([int(n) for n in shape.split("x")])): shape for shape in SLICES.get(kind, ())}
    if unknown := [n for n in counts if n not in sizes and kind in SLICES]:
        raise ValueError(f"There is no slice of {unknown[0]} {kind} chips; choose from {', '.join(map(str, sizes))}.")
    plans = []
    for n in counts:
        say(f"{n} chips")
        topology = f"{kind}:{sizes.get(n, n)}"
        only = "gather", "decode", "train"
        only = only[n == cfg.mesh.tensor :]
        plans.append(make_plan(resized(cfg, n, counts[0]), topology, memory, only=only, say=say))
    return plans


def show_scale(plans: Sequence[Plan], console: Console) -> None:
    """Print plans of `scale` as a table of bytes received, FLOPs and memory per chip."""
    table = Table(title="the same work a chip: what it receives a call, by kind, and computes")
    for i, name in enumerate(("chips", "program", "GB received", "TFLOP", "GB held", "exchanges")):
        table.add_column(name, justify="right" if i != 5 else "left")
    for plan in plans:
        for c in plan.costs:
            kinds = ", ".join(f"{x.kind}[{x.size}] {x.count} x, {x.wire / 1e9:.3g}" for x in c.collectives)
            table.add_row(str(plan.chips), c.name, f"{c.wire / 1e9:.3f}", f"{c.flops / 1e12:.3f}", f"{c.total / 1e9:.2f}", kinds)
    console.print(table)


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, Config]:
    """Return the options of this command, and the configuration from all other options (`config.read_args`).

    Raises:
        ValueError: see `config.read_args`.
    """
    parser = argparse.ArgumentParser(
        prog="python -m imagent_jax.plan",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--topology", required=True, metavar="CHIP[:SHAPE]")
    parser.add_argument("--memory", type=float, metavar="GB")
    parser.add_argument("--scale", metavar="CHIPS,CHIPS,...")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--no-remedy", action="store_true")
    parser.add_argument("--only", type=lambda names: names.split(","), default=(), metavar="NAME,NAME")
    own, rest = parser.parse_known_args(argv)
    return own, read_args(rest, "imagent_jax.plan")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command: exit code 0 (fits), 1 (does not fit), or 2 after one sentence about bad input."""
    argv = list(sys.argv[1:] if argv is None else argv)
    console = Console()
    console.width = max(console.width, 120)
    say = partial(console.print, style="dim", highlight=False)
    jax.config.update("jax_platforms", "cpu")  # attached accelerators stay unused
    try:
        own, cfg = parse(argv)
        memory = own.memory and own.memory * 1e9
        record: dict[str, Any] = {"command": " ".join(["python -m imagent_jax.plan", *argv]), "jax": jax.__version__}
        if own.scale:
            plans = scale(cfg, own.topology.partition(":")[0], [int(n) for n in own.scale.split(",")], memory, say)
            show_scale(plans, console)
            record["scale"] = [plan.to_dict() for plan in plans]
            fits = all(plan.fits for plan in plans)
        else:
            if own.topology in SLICES:
                cfg, plan, record["ruled_out"] = smallest_slice(cfg, own.topology, memory, own.only, say)
            else:
                plan = make_plan(cfg, own.topology, memory, only=own.only, say=say)
            show(plan, console)
            record, fits = record | plan.to_dict(), plan.fits
            if not fits and not own.no_remedy and not own.only:
                settings, remedied, tried = nearest(cfg, plan, say)
                record["nearest"] = remedied and {"changes": settings} | remedied.to_dict()
                if settings and remedied:
                    found = f"It fits ({remedied.peak.total / 1e9:.2f} GB) with {options(settings)}"
                    console.print(found, soft_wrap=True)
                else:
                    console.print(f"None of {tried} combinations of smaller settings fits; take more or larger chips.")
        if own.json:
            own.json.write_text(json.dumps(record, indent=1) + "\n")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0 if fits else 1
