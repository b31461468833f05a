"""Low-rank adapters (LoRA, arXiv 2106.09685) of decoder, vision tower and merger, in PEFT's file format.

A matrix `q` [L in out] is adapted by two parameters of the same module, `q_lora_a` [L in r] and `q_lora_b` [L r out], of type
`nnx.LoRAParam` and dtype float32 regardless of the base's dtype. `params.linear` adds their product. A module that is saved whole
(PEFT's `modules_to_save`) has parameters of type `Saved`. An adapted `(model, params)` is used like a plain one;
`nnx.split_state(params, nnx.LoRAParam, ...)` separates what is trained from the base.
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

from imagent_jax.config import LoraConfig
from imagent_jax.model.checkpoint import older_name, to_tensors
from imagent_jax.model.families import family_of
from imagent_jax.model.vlm import Model

PREFIX = "base_model.model."  # prefix of every tensor name in PEFT's files
_UNSUPPORTED = ("use_dora", "rank_pattern", "alpha_pattern", "lora_bias", "fan_in_fan_out")


class Saved(nnx.LoRAParam):
    """A parameter of the base that is trained and saved whole beside the adapters. Its metadata names the module."""


def attach(model: Model, params: nnx.State, cfg: LoraConfig, seed: int = 0) -> tuple[Model, nnx.State]:
    """Return the model with new adapters. A is uniform in ±1/sqrt(in), as in PEFT, and B is zero, so outputs do not change.

    Args:
        cfg: its rank, alpha, targets, tower, merger and modules_to_save.
        seed: seed of A.
    Raises:
        ValueError: a target or a module that the model does not have, one that is adapted and saved whole, or nothing to adapt.
    """
    root, rngs = model.bind(params), nnx.Rngs(seed)
    adapted, whole = _chosen(model, cfg), _modules(model, params, cfg.modules_to_save)
    if both := [key for key in adapted if key in whole]:
        raise ValueError(f"lora.modules_to_save holds {whole[both[0]]!r}, which is adapted too; leave out one of the two.")
    for key in adapted:
        *lead, into, out = _variable(root, key).get_value().shape
        a = jax.random.uniform(rngs.params(), (*lead, into, cfg.rank), minval=-(into**-0.5), maxval=into**-0.5)
        _put(root, key, a, jnp.zeros((*lead, cfg.rank, out)), cfg.alpha / cfg.rank)
    for key, module in whole.items():
        _put_whole(root, key, module, _variable(root, key).get_value())
    return _split(model, root)


def adapts_vision(params: nnx.State) -> bool:
    """Return whether parameters of the vision tower or its merger are trained beside a frozen base."""
    return any(path[0] == "vision" and isinstance(leaf, nnx.LoRAParam) for path, leaf in nnx.to_flat_state(params))


def merge(model: Model, params: nnx.State) -> tuple[Model, nnx.State]:
    """Return the plain model with matrices base + scale A B in the base's dtype. A model without adapters is unchanged."""
    root = model.bind(params)
    for key, a, b in _adapters(model, root):
        owner, name = _place(root, key)
        base = _variable(root, key)
        setattr(owner, name, base.replace(_merged(base.get_value(), a.get_value(), b.get_value(), _scale(b))))
        delattr(owner, f"{name}_lora_a")
        delattr(owner, f"{name}_lora_b")
    for path, leaf in nnx.to_flat_state(params):
        if isinstance(leaf, Saved):
            owner, name = _place(root, ".".join(map(str, path)))
            held = leaf.get_metadata()
            setattr(owner, name, nnx.Param(leaf.get_value().astype(held["dtype"]), logical_axes=held["logical_axes"]))
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
    folder, modules = Path(folder), _matrices(model)
    saved, _ = nnx.split_state(params, Saved, ...)
    tensors = {f"{PREFIX}{name}": tensor.read() for name, tensor in to_tensors(model, saved).items()}
    adapted = []
    for key, a, b in _adapters(model, model.bind(params)):
        module, rank, scale = modules[key], a.get_value().shape[-1], _scale(b)
        adapted.append(module)
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
        "target_modules": _pattern(adapted),
        "modules_to_save": sorted({leaf.get_metadata()["module"] for _, leaf in nnx.to_flat_state(saved)}) or None,
        "inference_mode": True,
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2))


def load(folder: str | Path, model: Model, params: nnx.State) -> tuple[Model, nnx.State]:
    """Return the model with the adapters of a folder in PEFT's format. Older tensor names are supported.

    Whatever is in the files is adapted, also in the tower: PEFT's `gate_proj`, `up_proj` and `down_proj` are matrices of the
    decoder and of Qwen2.5-VL's tower.

    Raises:
        ValueError: missing folder or file, a LoRA variant other than plain LoRA, or tensors that are missing, mis-shaped, or of
            modules that cannot be adapted.
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
    files, root = _Tensors(load_file(folder / "adapter_model.safetensors")), model.bind(params)
    for key, module in _modules(model, params, config.get("modules_to_save") or ()).items():
        name, transposed = family_of(model.cfg).tensors[key]
        _put_whole(root, key, module, files.stack(name, _variable(root, key).get_value().shape, transposed))
    for key, module in _matrices(model).items():
        *lead, into, out = _variable(root, key).get_value().shape
        if files.holds(f"{module}.lora_A.weight", *lead):
            a = files.stack(f"{module}.lora_A.weight", (*lead, into, rank))
            _put(root, key, a, files.stack(f"{module}.lora_B.weight", (*lead, rank, out)), scale)
    faults = files.faults + [f"{name} belongs to nothing that can be adapted here" for name in sorted(files.stored)]
    if faults:
        more = f"; and {len(faults) - 8} more" if len(faults) > 8 else ""
        raise ValueError(f"{folder}: the adapter does not fit the model: {'; '.join(faults[:8])}{more}.")
    return _split(model, root)


class _Tensors:
    """Tensors of a file by name, taken out as they are read; `faults` collects what is missing or mis-shaped."""

    def __init__(self, stored: dict[str, np.ndarray]):
        self.stored, self.faults = stored, []

    def holds(self, name: str, layers: int = 1) -> bool:
        """Return whether there is a tensor of any layer."""
        found = (name.format(i) for i in range(layers))
        return any(PREFIX + form in self.stored for one in found for form in (one, older_name(one)))

    def stack(self, name: str, shape: Sequence[int], transposed: bool = True) -> jax.Array:
        """Return the tensors of all layers ({} in the name) as a parameter of `shape`, in float32."""
        each = shape[1:] if "{}" in name else shape
        layers = [self._take(name.format(i), each, transposed) for i in range(shape[0] if "{}" in name else 1)]
        return jnp.asarray(np.stack(layers).reshape(shape))

    def _take(self, name: str, shape: Sequence[int], transposed: bool) -> np.ndarray:
        tensor = next((self.stored.pop(n) for n in (PREFIX + name, PREFIX + older_name(name)) if n in self.stored), None)
        if tensor is not None and name.endswith("patch_embed.proj.weight"):  # a convolution in the files
            tensor = tensor.reshape(len(tensor), -1)
        want = shape[::-1] if transposed else shape
        if tensor is None or tensor.shape != tuple(want):
            found = "is missing" if tensor is None else f"has shape {list(tensor.shape)}, expected {list(want)}"
            self.faults.append(f"{name} {found}")
            return np.zeros(shape, np.float32)
        return (tensor.T if transposed else tensor).astype(np.float32)


# ---- what is adapted --------------------------------------------------------------------------------------------------


def _matrices(model: Model) -> dict[str, str]:
    """Return Hugging Face's module ({}: layer) of every matrix that can be adapted: of decoder, tower, then merger."""
    forms = family_of(model.cfg).tensors.items()
    return {
        key: name.removesuffix(".weight")
        for key, (name, transposed) in forms
        if transposed and key not in ("text.lm_head", "vision.patch_embed")
    }


def _chosen(model: Model, cfg: LoraConfig) -> list[str]:
    """Return the matrices that a configuration adapts."""
    found, parts = {}, ("text.", "vision.blocks.") if cfg.tower else ("text.",)
    for key, module in _matrices(model).items():
        if key.startswith(parts):
            found.setdefault(module.rpartition(".")[2], []).append(key)
    if unknown := [name for name in cfg.targets if name not in found]:
        tower = "" if cfg.tower else "; those of the vision tower need lora.tower"
        title = family_of(model.cfg).title
        raise ValueError(f"lora.targets holds {unknown[0]!r}; for {title}, choose from {', '.join(found)}{tower}.")
    chosen = [key for name in cfg.targets for key in found[name]]
    if cfg.merger:
        chosen += [key for key in _matrices(model) if not key.startswith(("text.", "vision.blocks."))]
    if not chosen:
        raise ValueError("There is nothing to adapt; name lora.targets, or set lora.merger.")
    return chosen


def _modules(model: Model, params: nnx.State, names: Sequence[str]) -> dict[str, str]:
    """Return the parameters of modules, given by the ends of Hugging Face's names, each with the name that chose it."""
    tensors, chosen = family_of(model.cfg).tensors, {}
    keys = [".".join(map(str, path)) for path, _ in nnx.to_flat_state(params)]
    for name in names:
        inside = [key for key in keys if key in tensors and f".{name}." in f".{tensors[key][0].rpartition('.')[0]}."]
        if not inside:
            raise ValueError(f"modules_to_save holds {name!r}, which {family_of(model.cfg).title} has not; name its modules.")
        if "text.embed" in inside and model.cfg.text.tie_word_embeddings:
            raise ValueError(f"modules_to_save holds {name!r}, but this model's output matrix is tied to it; leave it out.")
        chosen |= dict.fromkeys(inside, name)
    return chosen


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


def _put_whole(root: nnx.Module, key: str, module: str, value: jax.Array) -> None:
    owner, name = _place(root, key)
    base = getattr(owner, name)
    axes, dtype = base.get_metadata()["logical_axes"], base.get_value().dtype.name
    setattr(owner, name, Saved(jnp.asarray(value, jnp.float32), logical_axes=axes, dtype=dtype, module=module))


def _adapters(model: Model, root: nnx.Module) -> Iterator[tuple[str, nnx.LoRAParam, nnx.LoRAParam]]:
    """Yield the path of every adapted matrix, its A and its B."""
    for key in _matrices(model):
        owner, name = _place(root, key)
        if hasattr(owner, f"{name}_lora_a"):
            yield key, getattr(owner, f"{name}_lora_a"), getattr(owner, f"{name}_lora_b")


def _scale(b: nnx.LoRAParam) -> float:
    return b.get_metadata()["scale"]


def _split(model: Model, root: nnx.Module) -> tuple[Model, nnx.State]:
    graphdef, params = nnx.split(root)
    return model._replace(graphdef=graphdef), params


def _pattern(modules: Sequence[str]) -> str:
    """Return PEFT's `target_modules` as a regular expression; plain names would also match matrices that are not adapted."""
    tails = [re.sub(r"^model\.(language_model\.)?", "", module) for module in modules]
    return "|".join(r"(.*\.)?" + re.escape(tail).replace(r"\{\}", r"\d+") for tail in tails)
