"""Hugging Face checkpoints in and out: one table from our parameters to their tensors, both name styles."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import save_file

from imagent_jax.model.config import Qwen2VLConfig
from imagent_jax.model.qwen2_vl import Model, abstract

# parameter -> tensor name ({} is the layer), and whether the matrix is stored transposed ([out, in])
_TEXT_LAYER = {
    "input_norm": ("input_layernorm.weight", False),
    "post_norm": ("post_attention_layernorm.weight", False),
    **{f"{p}": (f"self_attn.{p}_proj.weight", True) for p in "qkvo"},
    **{f"{p}_bias": (f"self_attn.{p}_proj.bias", False) for p in "qkv"},
    **{p: (f"mlp.{p}_proj.weight", True) for p in ("gate", "up", "down")},
}
_VISION_LAYER = {
    **{f"norm{i}": (f"norm{i}.weight", False) for i in (1, 2)},
    **{f"norm{i}_bias": (f"norm{i}.bias", False) for i in (1, 2)},
    **{p: (f"attn.{p}.weight", True) for p in ("qkv", "proj")},
    **{f"{p}_bias": (f"attn.{p}.bias", False) for p in ("qkv", "proj")},
    **{p: (f"mlp.{p}.weight", True) for p in ("fc1", "fc2")},
    **{f"{p}_bias": (f"mlp.{p}.bias", False) for p in ("fc1", "fc2")},
    **{p: (f"mlp.{p}_proj.weight", True) for p in ("gate", "up", "down")},
    **{f"{p}_bias": (f"mlp.{p}_proj.bias", False) for p in ("gate", "up", "down")},
}
TENSORS: dict[str, tuple[str, bool]] = {
    "text.embed": ("model.language_model.embed_tokens.weight", False),
    "text.norm": ("model.language_model.norm.weight", False),
    "text.lm_head": ("lm_head.weight", True),
    **{f"text.layers.{k}": ("model.language_model.layers.{}." + n, t) for k, (n, t) in _TEXT_LAYER.items()},
    "vision.patch_embed": ("model.visual.patch_embed.proj.weight", True),
    **{f"vision.blocks.{k}": ("model.visual.blocks.{}." + n, t) for k, (n, t) in _VISION_LAYER.items()},
    "vision.merge_norm": ("model.visual.merger.ln_q.weight", False),
    "vision.merge_norm_bias": ("model.visual.merger.ln_q.bias", False),
    **{f"vision.merge_fc{i + 1}": (f"model.visual.merger.mlp.{2 * i}.weight", True) for i in (0, 1)},
    **{f"vision.merge_fc{i + 1}_bias": (f"model.visual.merger.mlp.{2 * i}.bias", False) for i in (0, 1)},
}
"""Every parameter of either family by dotted path, and its tensor in a Hugging Face checkpoint (newer name style)."""


def older_name(name: str) -> str:
    """The name the hub's own files use: `model.layers.*` and `visual.*`."""
    return name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")


def _flat(params: nnx.State) -> dict[str, jax.Array]:
    return {".".join(map(str, path)): leaf[...] for path, leaf in nnx.to_flat_state(params)}


def _index(folder: Path) -> dict[str, Path]:
    """Tensor name -> file, for a single file or a sharded index."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if index.is_file():
        files = {name: folder / file for name, file in json.loads(index.read_text())["weight_map"].items()}
        if missing := sorted({str(f.name) for f in files.values() if not f.is_file()}):
            raise ValueError(f"{folder}: the index names {', '.join(missing)}, which is not there; download it again.")
        return files
    if not single.is_file():
        raise ValueError(f"{folder} holds neither model.safetensors nor model.safetensors.index.json.")
    with _open(single) as file:
        return {name: single for name in file.keys()}  # noqa: SIM118 (it has no iterator)


def _open(path: Path):
    try:
        return safe_open(path, framework="numpy")
    except Exception as error:
        raise ValueError(f"{path} is not a readable safetensors file ({error}); download it again.") from error


def resolve(path: str) -> Path:
    """A local folder for a folder or a hub id (downloaded by huggingface_hub, resumable).

    Raises:
        ValueError: neither a folder nor a reachable hub id.
    """
    if Path(path).expanduser().is_dir():
        return Path(path).expanduser()
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(path, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]))
    except Exception as error:
        raise ValueError(f"model.path {path!r} is neither a folder nor a hub id that can be downloaded: {error}") from error


def load(
    folder: str | Path,
    *,
    param_dtype="float32",
    place: Callable[[str, np.ndarray], jax.Array] | None = None,
    **settings,
) -> tuple[Model, nnx.State]:
    """A model and its parameters from a folder in Hugging Face's form.

    Args:
        param_dtype: storage dtype of the parameters.
        place: puts a finished parameter (dotted path, array) on devices; default `jnp.asarray`.
        settings: fields of `Model`.
    Raises:
        ValueError: no or another architecture's config, unreadable files, missing, extra or mis-shaped tensors (named).
    """
    folder = Path(folder)
    cfg = Qwen2VLConfig.from_folder(folder)
    files = _index(folder)
    model, shapes = abstract(cfg, jnp.dtype(param_dtype), **settings)
    handles = {path: _open(path) for path in set(files.values())}
    stored = {name.replace("model.model.", "model."): name for name in files}
    used, faults, flat = set(), [], nnx.to_flat_state(shapes)

    def read(name: str) -> np.ndarray | None:
        for candidate in (name, older_name(name)):
            if candidate in stored:
                used.add(stored[candidate])
                return handles[files[stored[candidate]]].get_tensor(stored[candidate])
        faults.append(f"missing {name}")
        return None

    leaves = []
    for path, variable in flat:
        key = ".".join(map(str, path))
        name, transposed = TENSORS[key]
        shape, layered = variable.get_value().shape, "{}" in name
        want = shape[1:] if layered else shape
        out = np.empty(shape, jnp.dtype(param_dtype))
        for i in range(shape[0]) if layered else (None,):
            tensor = read(name.format(i) if layered else name)
            if tensor is None:
                continue
            if key == "vision.patch_embed":
                tensor = tensor.reshape(tensor.shape[0], -1)
            tensor = tensor.T if transposed else tensor
            if tensor.shape != want:
                stored_shape, wanted = (tensor.shape[::-1], want[::-1]) if transposed else (tensor.shape, want)
                faults.append(f"{name.format(i)} has shape {list(stored_shape)}, expected {list(wanted)}")
                continue
            out[... if i is None else i] = tensor
        leaves.append((path, variable.replace(place(key, out) if place else jnp.asarray(out))))
    extra = sorted(set(files) - used - {"lm_head.weight"})
    faults += [f"unexpected {name}" for name in extra]
    if faults:
        listed = "; ".join(faults[:8]) + (f"; and {len(faults) - 8} more" if len(faults) > 8 else "")
        raise ValueError(f"{folder}: the weights do not fit config.json: {listed}.")
    return model, nnx.from_flat_state(leaves)


def to_tensors(params: nnx.State, dtype=None) -> dict[str, np.ndarray]:
    """Hugging Face tensors (newer names) of the parameters, cast to `dtype` if given."""
    tensors = {}
    for key, value in _flat(params).items():
        name, transposed = TENSORS[key]
        array = np.asarray(value if dtype is None else value.astype(dtype))
        for i in range(array.shape[0]) if "{}" in name else (None,):
            one = array if i is None else array[i]
            tensors[name.format(i)] = np.ascontiguousarray(one.T if transposed else one)
    return tensors


def save(
    folder: str | Path,
    model: Model,
    params: nnx.State,
    *,
    source: str | Path | None = None,
    dtype=None,
    max_shard_bytes: int = 5 * 2**30,
    older_names: bool = False,
) -> None:
    """Writes a folder that Hugging Face loads: config, safetensors (sharded with an index when large) and, from
    `source`, the tokenizer and preprocessor files. Weights of an earlier save in that folder are replaced.

    Args:
        dtype: of the stored tensors; default the parameters' own.
        older_names: name tensors as the hub's older files do (`model.layers.*`, `visual.*`), for older readers.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = to_tensors(params, dtype)
    vision = model.cfg.vision
    patch = tensors["model.visual.patch_embed.proj.weight"]
    tensors["model.visual.patch_embed.proj.weight"] = patch.reshape(
        -1, vision.in_channels, vision.temporal_patch_size, vision.patch_size, vision.patch_size
    )
    if older_names:
        tensors = {older_name(name): tensor for name, tensor in tensors.items()}
    shards: list[dict[str, np.ndarray]] = [{}]
    for name, tensor in tensors.items():
        if shards[-1] and sum(t.nbytes for t in shards[-1].values()) + tensor.nbytes > max_shard_bytes:
            shards.append({})
        shards[-1][name] = tensor
    stale = {*folder.glob("model*.safetensors"), folder / "model.safetensors.index.json"}
    if len(shards) == 1:
        save_file(shards[0], folder / "model.safetensors", metadata={"format": "pt"})
        stale.discard(folder / "model.safetensors")
    else:
        weight_map = {}
        for i, shard in enumerate(shards, 1):
            file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
            save_file(shard, folder / file, metadata={"format": "pt"})
            weight_map |= {name: file for name in shard}
            stale.discard(folder / file)
        total = sum(t.nbytes for t in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
        stale.discard(folder / "model.safetensors.index.json")
    for path in stale:  # weights of an earlier save with other shards: a reader would take them for these
        path.unlink(missing_ok=True)
    stored = str(next(iter(tensors.values())).dtype)
    hf = json.loads(model.cfg.hf) | {"dtype": stored, "architectures": [model.cfg.architecture]}
    (folder / "config.json").write_text(json.dumps(hf, indent=2))
    for pattern in ("tokenizer*", "preprocessor_config.json", "processor_config.json", "special_tokens_map.json",
                    "vocab.json", "merges.txt", "chat_template*", "generation_config.json", "added_tokens.json"):  # fmt: skip
        for path in Path(source).glob(pattern) if source else ():
            if path.parent.resolve() != folder.resolve():
                shutil.copy(path, folder / path.name)
