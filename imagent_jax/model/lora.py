"""Low-rank adapters (LoRA, arXiv 2106.09685) of the decoder's matrices and the vision merger, in PEFT's file format.

A matrix `q` [L in out] is adapted by two parameters of the same module, `q_lora_a` [L in r] and `q_lora_b` [L r out], of type
`nnx.LoRAParam` and dtype float32 regardless of the base's dtype. `params.linear` adds their product. An adapted
`(model, params)` is used like a plain one; `nnx.split_state(params, nnx.LoRAParam, ...)` separates adapters from the base.
"""

import functools
import json
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import load_file, save_file

from imagent_jax.model.checkpoint import older_name
from imagent_jax.model.families import family_of
from imagent_jax.model.vlm import Model

TARGETS = {f"{name}_proj": f"text.layers.{name}" for name in (*"qkvo", "gate", "up", "down")}
"""Adaptable matrices of every decoder layer: name of Hugging Face's module -> path of our parameter."""
MERGER = ("vision.merge_fc1", "vision.merge_fc2")
"""Adaptable matrices of the vision merger, adapted all or none: paths of our parameters."""
_KEYS = (*TARGETS.values(), *MERGER)
PREFIX = "base_model.model."  # prefix of every tensor name in PEFT's files
_UNSUPPORTED = ("use_dora", "rank_pattern", "alpha_pattern", "modules_to_save", "lora_bias", "fan_in_fan_out")


def check_targets(targets: Sequence[str], merger: bool = False) -> None:
    """Check the names of the matrices to adapt.

    Raises:
        ValueError: an unknown target (the message lists the valid names), or nothing to adapt.
    """
    if wrong := [name for name in targets if name not in TARGETS]:
        raise ValueError(f"there is no target {wrong[0]!r}; choose from {', '.join(TARGETS)}.")
    if not targets and not merger:
        raise ValueError(f"there is nothing to adapt; choose from {', '.join(TARGETS)}, or adapt the merger.")


def attach(
    model: Model, params: nnx.State, *, rank: int, alpha: float, targets: Sequence[str], merger: bool = False, seed: int = 0
) -> tuple[Model, nnx.State]:
    """Return the model with new adapters. A is uniform in ±1/sqrt(in), as in PEFT, and B is zero, so outputs do not change.

    Args:
        rank, alpha: the product A B is scaled by alpha / rank.
        targets: names in `TARGETS`.
        merger: adapt the vision merger too.
        seed: seed of A.
    Raises:
        ValueError: see `check_targets`.
    """
    check_targets(targets, merger)
    root, rngs = model.bind(params), nnx.Rngs(seed)
    for key in (*(TARGETS[name] for name in targets), *(MERGER if merger else ())):
        *lead, into, out = _variable(root, key).get_value().shape
        a = jax.random.uniform(rngs.params(), (*lead, into, rank), minval=-(into**-0.5), maxval=into**-0.5)
        _put(root, key, a, jnp.zeros((*lead, rank, out)), alpha / rank)
    return _split(model, root)


def merge(model: Model, params: nnx.State) -> tuple[Model, nnx.State]:
    """Return the plain model with matrices base + scale A B in the base's dtype. A model without adapters is unchanged."""
    root = model.bind(params)
    for key, a, b in _adapters(root):
        owner, name = _place(root, key)
        base = _variable(root, key)
        setattr(owner, name, base.replace(_merged(base.get_value(), a.get_value(), b.get_value(), _scale(b))))
        delattr(owner, f"{name}_lora_a")
        delattr(owner, f"{name}_lora_b")
    return _split(model, root)


@jax.jit
def _merged(base, a, b, scale):
    product = jnp.matmul(a, b, precision="highest") * scale
    return (base + product).astype(base.dtype)


def save(folder: str | Path, model: Model, params: nnx.State, base: str = "") -> None:
    """Write the adapters in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`.

    Args:
        base: base model of the adapters (a folder or a hub id), recorded in the config.
    """
    folder, tensors, names = Path(folder), {}, []
    for key, a, b in _adapters(model.bind(params)):
        module, rank, scale = _module(model, key), a.get_value().shape[-1], _scale(b)
        names.append(module.rpartition(".")[2] if "{}" in module else module.partition("visual.")[2])
        for half, stack in (("A", np.asarray(a.get_value())), ("B", np.asarray(b.get_value()))):
            for i, matrix in enumerate(stack) if "{}" in module else ((0, stack),):
                tensors[f"{PREFIX}{module.format(i)}.lora_{half}.weight"] = np.ascontiguousarray(matrix.T)
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": scale * rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": _pattern(names),
        "inference_mode": True,
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2))


def load(folder: str | Path, model: Model, params: nnx.State) -> tuple[Model, nnx.State]:
    """Return the model with the adapters of a folder in PEFT's format. Older tensor names are supported.

    Raises:
        ValueError: missing folder or file, a LoRA variant other than plain LoRA, or tensors that are missing, mis-shaped, or of
            modules not in `TARGETS` and `MERGER`.
    """
    folder = Path(folder).expanduser()
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        if not (folder / file).is_file():
            raise ValueError(f"{folder} holds no {file}; name a folder that peft or a run wrote.")
    config = json.loads((folder / "adapter_config.json").read_text())
    odd = [name for name in _UNSUPPORTED if config.get(name)] + ["bias"] * (config.get("bias", "none") != "none")
    if config.get("peft_type") != "LORA" or odd:
        raise ValueError(f"{folder}: only plain LoRA is read, and adapter_config.json sets {(odd or ['peft_type'])[0]}.")
    rank = config["r"]
    scale = config["lora_alpha"] / (math.sqrt(rank) if config.get("use_rslora") else rank)
    stored = load_file(folder / "adapter_model.safetensors")
    root, faults = model.bind(params), []

    def read(name: str, shape: tuple[int, int]) -> np.ndarray:
        tensor = next((stored.pop(n) for n in (PREFIX + name, PREFIX + older_name(name)) if n in stored), None)
        if tensor is None or tensor.shape != shape:
            found = "is missing" if tensor is None else f"has shape {list(tensor.shape)}, expected {list(shape)}"
            faults.append(f"{name} {found}")
            return np.zeros(shape[::-1], np.float32)
        return tensor.T.astype(np.float32)

    for key in _KEYS:
        module, (*lead, into, out) = _module(model, key), _variable(root, key).get_value().shape
        names = [module.format(i) for i in range(*lead or (1,))]
        if any(PREFIX + n in stored for name in names for n in (f"{name}.lora_A.weight", older_name(f"{name}.lora_A.weight"))):
            a, b = (
                np.stack([read(f"{name}.lora_{half}.weight", shape) for name in names]).reshape(*lead, *shape[::-1])
                for half, shape in (("A", (rank, into)), ("B", (out, rank)))
            )
            _put(root, key, jnp.asarray(a), jnp.asarray(b), scale)
    faults += [f"{name} belongs to nothing that can be adapted here" for name in sorted(stored)]
    if faults:
        more = f"; and {len(faults) - 8} more" if len(faults) > 8 else ""
        raise ValueError(f"{folder}: the adapter does not fit the model: {'; '.join(faults[:8])}{more}.")
    return _split(model, root)


def _place(root: nnx.Module, key: str) -> tuple[nnx.Module, str]:
    """Return the module that owns a parameter, and the attribute's name."""
    *path, name = key.split(".")
    return functools.reduce(getattr, path, root), name


def _variable(root: nnx.Module, key: str) -> nnx.Param:
    return getattr(*_place(root, key))


def _put(root: nnx.Module, key: str, a, b, scale: float) -> None:
    owner, name = _place(root, key)
    *lead, into, out = getattr(owner, name).get_metadata()["logical_axes"]
    setattr(owner, f"{name}_lora_a", nnx.LoRAParam(a, logical_axes=(*lead, into, "rank")))
    setattr(owner, f"{name}_lora_b", nnx.LoRAParam(b, logical_axes=(*lead, "rank", out), scale=scale))


def _adapters(root: nnx.Module) -> Iterator[tuple[str, nnx.LoRAParam, nnx.LoRAParam]]:
    """Yield the path of every adapted matrix, its A and its B."""
    for key in _KEYS:
        owner, name = _place(root, key)
        if hasattr(owner, f"{name}_lora_a"):
            yield key, getattr(owner, f"{name}_lora_a"), getattr(owner, f"{name}_lora_b")


def _scale(b: nnx.LoRAParam) -> float:
    return b.get_metadata()["scale"]


def _split(model: Model, root: nnx.Module) -> tuple[Model, nnx.State]:
    graphdef, params = nnx.split(root)
    return model._replace(graphdef=graphdef), params


def _module(model: Model, key: str) -> str:
    """Return Hugging Face's module name of a matrix ({}: layer index)."""
    return family_of(model.cfg).tensors[key][0].removesuffix(".weight")


def _pattern(names: Sequence[str]) -> str:
    """Return PEFT's `target_modules` as a regular expression; plain names would also match the tower's matrices."""
    layers = "|".join(name for name in names if name in TARGETS)
    parts = [rf".*\.layers\.\d+\.\w+\.({layers})"] if layers else []
    return "|".join(parts + [rf".*\.{re.escape(name)}" for name in names if name not in TARGETS])
