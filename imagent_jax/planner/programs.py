"""Arrays that a run holds on a topology and the costs of its programs, from shapes alone; see `imagent_jax.plan`."""

import contextlib
import os
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from imagent_jax.chat import QWEN
from imagent_jax.config import Config
from imagent_jax.distributed.mesh import GROUPS, fitting
from imagent_jax.model import features, lora, sharding
from imagent_jax.model.checkpoint import EMBEDDED, resolve
from imagent_jax.model.config import VLMConfig
from imagent_jax.model.families import published_config, read_folder
from imagent_jax.model.sharding import check_heads, shardings
from imagent_jax.model.vlm import abstract
from imagent_jax.planner.hlo import collectives, kernel_pairs, matrix_flops
from imagent_jax.rl import learner
from imagent_jax.rl.batch import GroupBatch, group_sharding, micro_shapes
from imagent_jax.rl.mask import mask_tables
from imagent_jax.rl.optim import make_optimizer
from imagent_jax.rollout import sampler
from imagent_jax.rollout.engine import quarters
from imagent_jax.rollout.policy import check_images, model_settings
from imagent_jax.rollout.stops import automaton


class Chip(NamedTuple):
    """Published figures of a chip: memory in bytes, bfloat16 FLOP/s, HBM bytes/s, and bytes/s received from other chips."""

    platform: str
    memory: float
    flops: float
    bandwidth: float
    links: float


CHIPS = {
    "v5e": Chip("tpu", 16e9, 197e12, 819e9, 200e9),
    "v5p": Chip("tpu", 95e9, 459e12, 2765e9, 600e9),
    "v6e": Chip("tpu", 32e9, 918e12, 1640e9, 448e9),
    "h100": Chip("gpu", 80e9, 989e12, 3350e9, 450e9),
    "h200": Chip("gpu", 141e9, 989e12, 4800e9, 450e9),
    "cpu": Chip("cpu", 0, 0, 0, 0),
}
"""Chips by name. GB are 10^9 bytes, the stricter reading.

TPUs: cloud.google.com/tpu/docs/v5e, /v5p and /v6e ("16 GB, 819 GBps, 197 TFLOPs, 1600 Gbps" and so on; where published
figures for v6e differ, the higher). GPUs: NVIDIA's data sheets of the SXM models, dense bfloat16, half of NVLink's
bidirectional figure. cpu: the memory of this machine divided by the number of devices; no time bounds."""

SLICES = {
    "v5e": ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
    "v6e": ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
    "v5p": ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8"),
}
"""Slice shapes by chip, 4 to 256 chips, smallest first."""


def open_topology(name: str) -> tuple[Chip, Sequence[jax.Device]]:
    """Return the chip and the devices of a topology such as "v5e:4x4" or "cpu:8".

    Raises:
        ValueError: unknown chip or shape.
    """
    kind, _, shape = name.partition(":")
    if kind not in CHIPS or not shape:
        slices = f"{kind}:{SLICES[kind][2]}" if kind in SLICES else "v5e:4x4"
        raise ValueError(
            f"There is no topology {name!r}; name one of {', '.join(CHIPS)} with its shape, as in {slices} or cpu:8."
        )
    chip = CHIPS[kind]
    if chip.platform == "tpu":
        from jax.experimental import topologies

        os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # only compilation: no device to lock
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # and no TPU metadata server
        try:
            return chip, topologies.get_topology_desc(name, "tpu").devices
        except Exception as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"There is no topology {name!r}: {reason}; {kind} has {', '.join(SLICES[kind])}.") from None
    with contextlib.suppress(ValueError, RuntimeError):  # not a number, or the backend is initialised
        jax.config.update("jax_num_cpu_devices", int(shape))
    devices = jax.devices("cpu")
    if not shape.isdigit() or not 1 <= int(shape) <= len(devices):
        raise ValueError(f"There is no topology {name!r}; name a number of devices, as in {kind}:8 (open now: {len(devices)}).")
    if kind == "cpu":
        chip = chip._replace(memory=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / int(shape))
    return chip, devices[: int(shape)]


# ---- arrays of a run -------------------------------------------------------------------------------------------------


def placed(shapes: Any, where: Any) -> Any:
    """Return `shapes` with the shardings of a tree of the same structure."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, where)


def _another(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """Return a distinct array of the same shape, dtype and sharding, alive at the same time."""
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)


def chip_bytes(*trees: Any) -> int:
    """Return the bytes per chip of the arrays in some trees. An array that occurs twice counts once; host arrays count zero."""
    leaves = {id(x): x for x in jax.tree.leaves(trees) if getattr(x, "sharding", None) is not None}
    return sum(int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize for x in leaves.values())


class RunArrays:
    """Shapes and shardings of everything a run of `cfg` holds on a mesh.

    These are: parameters, the rollout's copy of the parameters, optimizer state, sampler state, pages of image features,
    gradients, and a micro-batch with the features at its tokens.

    Raises:
        ValueError: unknown model, or the model is not divisible over the mesh.
    """

    def __init__(self, cfg: Config, mesh: Mesh, platform: str):
        self.cfg, self.mesh, r = cfg, mesh, cfg.rollout
        size = model_config(cfg.model.path)
        check_heads(size, mesh)
        check_images(cfg, size.vision)
        self.settings = model_settings(cfg, platform)
        if platform == "gpu":  # cuDNN's kernels do not compile on a CPU
            self.settings["attention"] = "xla"
        with self.on_mesh():
            self.model, shapes = abstract(size, jnp.dtype(cfg.model.param_dtype), **self.settings)
            if cfg.lora.rank:
                self.model, shapes = self._adapted(shapes)
            self.params = placed(shapes, shardings(shapes, mesh))
            copied = jax.eval_shape(partial(sharding.rollout_params, self.settings["dtype"]), shapes)
            self.sampled = placed(copied, shardings(copied, mesh, whole=("fsdp",)))
            self.optimizer = make_optimizer(cfg.optim, cfg.run.steps * cfg.grpo.epochs * cfg.grpo.minibatches)
            self.trained, self.frozen = nnx.split_state(self.params, learner.trained_filter(cfg), ...)
            self.learns = "vision" in self.trained
            moments = jax.eval_shape(self.optimizer.init, self.trained)
            self.opt_state = placed(moments, shardings(moments, mesh))
            self.reference = nnx.merge_state(jax.tree.map(_another, self.trained), self.frozen) if cfg.grpo.kl else None
            empty = partial(sampler.empty, self.model, r.groups, r.group_size, r.prompt_tokens, r.response_tokens)
            self.state = jax.tree.map(lambda x: self.on(x, *fitting(x, *sampler.axes(x))), jax.eval_shape(empty))
            rows = self.pack // size.vision.merge_unit
            self.page = self.on(jax.ShapeDtypeStruct((rows, size.vision.feature_dim), self.settings["dtype"]))
            self.pages = [self.page, *(_another(self.page) for _ in range(cfg.images.pages - 1))]
            self.batch = self._batch(micro_shapes(cfg)[-1][1])
            self.shown = self.shown_at(self.batch.prompt_ids), self.shown_at(self.batch.response_ids)
            self.total = jax.tree.map(_another, self.trained)
            self.of_pages = list(map(_another, self.pages)) if self.learns else []

    @property
    def pack(self) -> int:
        """Patches encoded in one call."""
        return self.cfg.images.pack_blocks * self.cfg.images.vision_block

    def on_mesh(self):
        """Return a context manager that makes the abstract mesh current: nothing is placed on devices that do not exist."""
        return jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh)

    def shown_at(self, ids: jax.ShapeDtypeStruct | np.ndarray) -> jax.ShapeDtypeStruct:
        """Return the image features at the tokens `ids`."""
        shown = jax.ShapeDtypeStruct((*ids.shape, self.model.cfg.vision.feature_dim), self.settings["dtype"])
        return self.on(shown, *fitting(shown, GROUPS))

    def on(self, x, *axes) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(self.mesh, PartitionSpec(*axes)))

    def _adapted(self, shapes):
        c, found = self.cfg.lora, []

        def attach(params):
            found[:] = lora.attach(self.model, params, c)
            return found[1]

        shapes = jax.eval_shape(attach, shapes)
        return found[0], shapes

    def _batch(self, n: int) -> GroupBatch:
        r = self.cfg.rollout
        sizes = {"N": n, "G": r.group_size, "P": r.prompt_tokens, "R": r.response_tokens, "3": 3}
        made = {}
        for f in (f for f in fields(GroupBatch) if f.default is MISSING):
            kind = get_args(f.type)[0]  # first alternative of NumPy's and JAX's array types
            shape = [sizes[d] for d in kind.dim_str.split()]
            made[f.name] = jax.ShapeDtypeStruct(shape, kind.dtypes[0], sharding=group_sharding(self.mesh, f.name))
        return GroupBatch(**made)


def model_config(path: str) -> VLMConfig:
    """Return the model configuration for `model.path`: a folder, the tiny base or a published size.

    Raises:
        ValueError: `path` is none of these.
    """
    if path in EMBEDDED or Path(path).expanduser().is_dir():
        return read_folder(resolve(path))
    return published_config(path)


# ---- the programs of a step ------------------------------------------------------------------------------------------


class Program(NamedTuple):
    """A jitted function of the run with its arguments.

    Attributes:
        static: static arguments, which come before `args`.
        alive: arrays that are alive during the call besides the arguments.
        calls: calls per step.
        phase: "rollout" or "update".
    """

    name: str
    function: Any
    static: tuple
    args: tuple
    alive: tuple
    calls: int
    phase: str  # "rollout" or "update": selects the changes of settings that may help


def programs(held: RunArrays) -> Iterator[Program]:
    """Yield the programs of a step in execution order. `calls` of decoding counts tokens, at most the response length."""
    pack = np.zeros((held.pack, held.model.cfg.vision.patch_bytes), np.uint8), _ints(held.pack, 2), _ints(held.pack)
    yield from _rollout_programs(held, pack)
    yield from _update_programs(held, pack)


def _ints(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.int32)


def _rollout_programs(held: RunArrays, pack: tuple) -> Iterator[Program]:
    cfg, model, r, ints = held.cfg, held.model, held.cfg.rollout, _ints
    with held.on_mesh():
        admitted, few = quarters(r.groups, r.group_size)
    rolling = held.params, held.opt_state, held.reference, held.sampled, held.state, held.pages
    gathered, alive = (held.params,), (held.params, held.opt_state, held.reference)
    yield Program("gather", sharding.rollout_params, (held.settings["dtype"],), gathered, alive, 1, "rollout")
    encode = held.sampled, held.page, 0, *pack
    yield Program("vision", features._encode_into, (model,), encode, rolling, cfg.images.pages, "rollout")
    p, s = r.prompt_tokens, r.observation_tokens
    ids = ints(admitted, p)
    yield Program("show", features._show, (), (held.shown_at(ids), held.page, ids, 0), rolling, r.groups // admitted, "rollout")
    prompts = ints(admitted), ints(admitted, p), ints(3, admitted, p), ints(admitted, p), *(ints(admitted),) * 3
    drawn = np.zeros(admitted, np.uint32), np.ones(admitted, np.float32)
    admit = held.sampled, held.state, *prompts, *drawn, held.shown_at(ids)
    yield Program("prefill", sampler.admit, (model,), admit, rolling, r.groups // admitted, "rollout")
    stops = np.zeros((len(automaton(QWEN.stop_strings)) - 1, model.cfg.text.vocab_size), np.int16)
    decode = held.sampled, held.state, None, stops, r.decode_chunk, 0
    yield Program("decode", sampler.decode, (model, r.response_tokens), decode, rolling, r.response_tokens, "rollout")
    appended = ints(few), ints(few, s), ints(3, few, s), ints(few, s), ints(few)
    observe = held.sampled, held.state, *appended, held.shown_at(ints(few, s))
    yield Program("observe", sampler.observe, (model,), observe, rolling, 0, "rollout")


def _update_programs(held: RunArrays, pack: tuple) -> Iterator[Program]:
    cfg, model, r = held.cfg, held.model, held.cfg.rollout
    learning = held.params, held.opt_state, held.reference, held.pages, held.total, held.of_pages, held.batch, held.shown
    micro = cfg.grpo.epochs * -(-r.groups // held.batch.prompt_len.shape[0])
    logprobs = held.on(held.batch.logprobs, *fitting(held.batch.logprobs, GROUPS))
    score = partial(learner.score_jit.trace, temperature=r.temperature)
    for name, params, wanted in (("score", held.params, cfg.grpo.recompute), ("reference", held.reference, cfg.grpo.kl)):
        if wanted:
            args = params, held.batch, held.shown
            yield Program(name, score, (model,), args, learning, micro // cfg.grpo.epochs, "update")
    reference, old = logprobs if cfg.grpo.kl else None, logprobs if cfg.grpo.recompute else None
    tables, one = mask_tables(cfg.mask), np.float32(1)
    args = held.trained, held.frozen, held.total, held.shown, held.batch, tables, one, reference, old
    static = model, learner.LossSettings.of(cfg), held.learns
    yield Program("train", learner.accumulate, static, args, learning, micro, "update")
    if held.learns:
        pull, static = (held.params, *pack, held.of_pages[0]), (model, learner.trained_filter(cfg))
        yield Program("vision backward", features._pull_back, static, pull, learning, cfg.images.pages, "update")
    apply = held.trained, held.opt_state, held.total
    updates = cfg.grpo.epochs * cfg.grpo.minibatches
    yield Program("apply", learner.apply_gradients, (held.optimizer,), apply, learning, updates, "update")


# ---- cost of a program -----------------------------------------------------------------------------------------------


@dataclass
class Cost:
    """Cost of one program per chip: bytes held and exchanged, FLOPs, lower bound on the time, and compile time here (seconds)."""

    name: str
    phase: str
    calls: int
    arguments: int = 0
    temporaries: int = 0
    resident: int = 0  # alive during the call, not among the arguments
    total: int = 0
    refused: bool = False  # rejected by the compiler for its size; `total` is then the size it reported
    wire: float = 0.0
    flops: float = 0.0
    bound_s: float = 0.0
    compile_s: float = 0.0
    collectives: list = field(default_factory=list)


def cost(held: RunArrays, program: Program, chip: Chip) -> Cost:
    """Compile a program and return the cost that the compiler reports."""
    found = Cost(program.name, program.phase, program.calls)
    with held.on_mesh():
        trace = program.function if isinstance(program.function, partial) else program.function.trace
        began, traced = time.perf_counter(), trace(*program.static, *program.args)
        jaxpr = traced.jaxpr.jaxpr
        read = {id(v) for eqn in jaxpr.eqns for v in eqn.invars} | {id(v) for v in jaxpr.outvars}
        kept = [x for v, x in zip(jaxpr.invars, jax.tree.leaves(program.args), strict=True) if id(v) in read]
        ids = {id(x) for x in kept}
        found.resident = chip_bytes([x for x in jax.tree.leaves(program.alive) if id(x) not in ids])
        pairs = kernel_pairs(held.cfg.rollout.group_size, "vision" in program.name)
        found.flops = matrix_flops(jaxpr, pairs) / held.mesh.size
        try:
            compiled = traced.lower().compile()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            found.refused, found.arguments = True, chip_bytes(kept)
            found.total = _needed(str(error), found.arguments) + found.resident
            found.compile_s = time.perf_counter() - began
            return found
        found.compile_s = time.perf_counter() - began
    m = compiled.memory_analysis()
    found.arguments = m.argument_size_in_bytes
    results = m.output_size_in_bytes - m.alias_size_in_bytes
    found.temporaries = m.temp_size_in_bytes + results + m.generated_code_size_in_bytes
    found.total = found.arguments + found.temporaries + found.resident
    found.collectives = collectives(compiled.as_text())
    found.wire = sum(c.wire for c in found.collectives)
    if chip.flops:
        moved = found.arguments + results
        found.bound_s = max(found.flops / chip.flops, moved / chip.bandwidth, found.wire / chip.links)
    return found


def _needed(message: str, kept: int) -> int:
    """Return the bytes of a program that the compiler rejected, parsed from its message: the total, or the temporaries alone."""
    unit = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    if match := re.search(r"temporaries \(([\d.]+)([KMGT]?)", message):
        return kept + int(float(match[1]) * unit[match[2]])
    match = re.search(r"(?:Used|requirement) ([\d.]+)([KMGT]?)", message)
    return int(float(match[1]) * unit[match[2]]) if match else kept
