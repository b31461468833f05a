"""Hugging Face checkpoints: loading, saving, and one table from our parameters to their tensors.

A parameter of stacked layers, [L, ...], is one tensor per layer in the files. Loading copies only each device's shard from
memory-mapped files; saving gathers one tensor at a time. Neither holds the whole model in host memory.
"""

import json
import math
import shutil
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from huggingface_hub import snapshot_download, split_state_dict_into_shards_factory
from jax.experimental.multihost_utils import process_allgather
from jax.sharding import Mesh, NamedSharding
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors import safe_open

from imagent_jax.config import import_path
from imagent_jax.model.config import untied
from imagent_jax.model.families import family_of, read_folder
from imagent_jax.model.sharding import check_heads, shardings
from imagent_jax.model.vlm import VLM, Model, abstract


def older_name(name: str) -> str:
    """Return the name used in the hub's files: `model.layers.*` and `visual.*`."""
    return name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")


COMPANIONS = (
    "tokenizer*",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template*",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "generation_config.json",
)
"""Files of a complete checkpoint besides weights and config.json: tokenizer, processor and generation settings."""

EMBEDDED = {"tiny": "imagent_jax.tiny.base:base_folder", "tiny_tools": "imagent_jax.tiny.base:tools_folder"}
"""Models shipped with the package: import path of the function that returns the model's folder, imported on use."""

_ROWS = 256  # rows of a stored matrix copied per read
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # safetensors' dtype names


class Tensor(NamedTuple):
    """A tensor to be written: shape and dtype, and a function that returns its content on demand."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def resolve(path: str | Path, weights: bool = True) -> Path:
    """Return a local folder for an embedded model, a folder, or a hub id (huggingface_hub downloads the needed files).

    Raises:
        ValueError: neither a folder nor a hub id that can be downloaded.
    """
    if str(path) in EMBEDDED:
        return import_path(EMBEDDED[str(path)], "model.path")()
    if Path(path).expanduser().is_dir():
        return Path(path).expanduser()
    needed = ["config.json", *COMPANIONS] + ["model*.safetensors", "model.safetensors.index.json"] * weights
    try:
        return Path(snapshot_download(str(path), allow_patterns=needed, ignore_patterns=["*/*"]))
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{str(path)!r} is neither a folder nor a hub id that can be downloaded: {reason}") from error


def _flat(params: nnx.State) -> dict[str, Any]:
    """Return parameter values by dotted path."""
    return {".".join(map(str, path)): leaf.get_value() for path, leaf in nnx.to_flat_state(params)}


# ---- loading --------------------------------------------------------------------------------------------------------


def _open(path: Path):
    try:
        return safe_open(path, framework="numpy")
    except Exception as error:
        raise ValueError(f"{path} is not a readable safetensors file ({error}); download it again.") from error


def _stored(folder: Path) -> dict[str, tuple[Path, list[int], str]]:
    """Return file, shape and dtype of every tensor in a folder, from a single file or a sharded index; reads headers only."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if index.is_file():
        paths = sorted({folder / file for file in json.loads(index.read_text())["weight_map"].values()})
        if missing := [path.name for path in paths if not path.is_file()]:
            raise ValueError(f"{folder}: the index names {', '.join(missing)}, which is not there; download it again.")
    elif single.is_file():
        paths = [single]
    else:
        raise ValueError(f"{folder} holds neither model.safetensors nor model.safetensors.index.json.")
    found = {}
    for path in paths:
        with _open(path) as file:
            parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (it has no iterator)
            found |= {name: (path, part.get_shape(), part.get_dtype()) for name, part in parts.items()}
    return found


def _own_head(stored: Mapping[str, tuple[Path, list[int], str]], embedding: str) -> bool:
    """Return whether the files hold an output matrix `lm_head.weight` that differs from the tensor `embedding`."""
    names = {name.replace("model.model.", "model."): name for name in stored}
    head, table = names.get("lm_head.weight"), names.get(embedding) or names.get(older_name(embedding))
    if head is None or table is None:
        return False
    if stored[head][1] != stored[table][1]:
        return True
    with _open(stored[head][0]) as a, _open(stored[table][0]) as b:
        one, other = a.get_slice(head), b.get_slice(table)
        count = stored[head][1][0]
        blocks = [slice(i, min(i + _ROWS, count)) for i in range(0, count, _ROWS)]
        return not all(np.array_equal(one[block], other[block], equal_nan=True) for block in blocks)


def _match(
    folder: Path, stored: Mapping[str, tuple], shapes: nnx.State, tensors: Mapping[str, tuple[str, bool]]
) -> dict[str, list[tuple[Path, str]]]:
    """Return file and tensor name of every parameter, one pair per layer.

    Raises:
        ValueError: missing, unexpected or mis-shaped tensors, by name.
    """
    stored = {name.replace("model.model.", "model."): (name, *rest) for name, rest in stored.items()}
    sources, faults = {}, []
    for key, leaf in _flat(shapes).items():
        name, transposed = tensors[key]
        want = leaf.shape[1:] if "{}" in name else leaf.shape
        want, sources[key] = list(want[::-1] if transposed else want), []
        for i in range(leaf.shape[0] if "{}" in name else 1):
            asked = name.format(i)
            if not (found := stored.pop(asked, None) or stored.pop(older_name(asked), None)):
                faults.append(f"missing {asked}")
                continue
            own_name, path, shape, kind = found
            if key == "vision.patch_embed":
                shape = [shape[0], math.prod(shape[1:])]
            if kind not in _DTYPES:
                faults.append(f"{asked} is stored as {kind}, expected one of {', '.join(_DTYPES)}")
            if shape != want:
                faults.append(f"{asked} has shape {shape}, expected {want}")
            sources[key].append((path, own_name))
    faults += [f"unexpected {name}" for name, *_ in stored.values() if name != "lm_head.weight"]  # stored though tied
    if faults:
        listed = "; ".join(faults[:8]) + (f"; and {len(faults) - 8} more" if len(faults) > 8 else "")
        raise ValueError(f"{folder}: the weights do not fit config.json: {listed}.")
    return sources


def _copy(out: np.ndarray, tensor, index: tuple[slice, ...], transposed: bool) -> None:
    """Copy the slice `index` of a stored tensor into `out` in blocks of rows, transposing and casting if needed."""
    if transposed:
        out, index = out.T, index[::-1]
    shape, (rows, *rest) = tensor.get_shape(), index
    start, stop, _ = rows.indices(shape[0])
    for i in range(start, stop, _ROWS):
        block = slice(i, min(i + _ROWS, stop))
        folded = len(shape) > out.ndim  # the patch embedding is a convolution in the files
        part = tensor[block].reshape(block.stop - i, -1)[:, *rest] if folded else tensor[(block, *rest)]
        out[i - start : block.stop - start] = part


def _read(key: str, form: tuple[str, bool], sources: list[tuple[Path, str]], leaf, index: tuple[slice, ...]) -> np.ndarray:
    """Return the slice `index` of the parameter `key`. Files are memory-mapped during the call only.

    Args:
        form: tensor name in a checkpoint, and whether it is stored transposed.
        sources: file and tensor name of every layer.
        leaf: shape and dtype of the parameter.
    """
    name, transposed = form
    out = np.empty([len(range(n)[part]) for n, part in zip(leaf.shape, index, strict=True)], leaf.dtype)
    parts, within, sources = (out, index[1:], sources[index[0]]) if "{}" in name else (out[None], index, sources)
    with ExitStack() as mapped:
        files = {path: mapped.enter_context(_open(path)) for path in {path for path, _ in sources}}
        for part, (path, tensor) in zip(parts, sources, strict=True):
            _copy(part, files[path].get_slice(tensor), within, transposed)
    return out


def _place(read: Callable[[tuple[slice, ...]], np.ndarray], shape: tuple[int, ...], sharding: NamedSharding | None) -> jax.Array:
    """Return a parameter on its devices. The host holds one shard at a time; replicated shards are read once.

    (`jax.make_array_from_callback` requests every shard before it places the first.)
    """
    if sharding is None:
        return jax.device_put(read((slice(None),) * len(shape)), may_alias=False).block_until_ready()
    placed: dict[tuple, jax.Array] = {}
    shards = []
    for device, index in sharding.devices_indices_map(shape).items():
        if device not in sharding.addressable_devices:
            continue
        span = tuple(part.indices(n) for part, n in zip(index, shape, strict=True))
        shard = jax.device_put(placed[span] if span in placed else read(index), device, may_alias=False)
        placed.setdefault(span, shard.block_until_ready())
        shards.append(shard)
    return jax.make_array_from_single_device_arrays(shape, sharding, shards)


def load(
    folder: str | Path, *, param_dtype="float32", mesh: Mesh | None = None, progress: bool = False, **settings
) -> tuple[Model, nnx.State]:
    """Load a model and its parameters from a folder in Hugging Face's format.

    A stored output matrix is used where it differs from the embedding, whatever config.json says, as transformers does.

    Args:
        param_dtype: storage dtype of the parameters; None: as in the files.
        mesh: mesh over which the parameters are sharded (`distributed.mesh.make_mesh`); default: the default device.
        progress: show a progress bar on the terminal.
        settings: fields of `Model`.
    Raises:
        ValueError: missing config, unsupported architecture, unreadable files, missing, unexpected or mis-shaped tensors (named),
            or a mesh that does not divide the model. All checks run before the first weight is read.
    """
    folder = Path(folder)
    cfg, stored = read_folder(folder), _stored(folder)
    tensors = family_of(cfg).tensors
    if cfg.text.tie_word_embeddings and _own_head(stored, tensors["text.embed"][0]):
        cfg = untied(cfg)
    if param_dtype is None:
        param_dtype = _DTYPES.get(next(iter(stored.values()))[2], "float32")
    model, shapes = abstract(cfg, jnp.dtype(param_dtype), **settings)
    sources, where = _match(folder, stored, shapes, tensors), {}
    if mesh is not None:
        check_heads(cfg, mesh)
        where = _flat(shardings(shapes, mesh))
    sizes = {key: leaf.size * leaf.dtype.itemsize for key, leaf in _flat(shapes).items()}
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn()
    leaves = []
    with Progress(*columns, transient=True, disable=not progress) as bar:
        task = bar.add_task("Loading weights", total=sum(sizes.values()))
        for path, variable in nnx.to_flat_state(shapes):
            key, leaf = ".".join(map(str, path)), variable.get_value()
            value = _place(partial(_read, key, tensors[key], sources[key], leaf), leaf.shape, where.get(key))
            leaves.append((path, variable.replace(value)))
            bar.advance(task, sizes[key])
    return model, nnx.from_flat_state(leaves)


def from_pretrained(path: str | Path, *, mesh: Mesh | None = None, dtype=None, progress: bool = True) -> VLM:
    """Load a model from a folder in Hugging Face's format or from a hub id, which is downloaded.

    Args:
        mesh: mesh over which the parameters are sharded (`distributed.mesh.make_mesh`); default: the default device.
        dtype: storage dtype of the parameters; default: as in the files.
        progress: show a progress bar on the terminal.
    Raises:
        ValueError: no such model, or see `load`.
    """
    model, params = load(resolve(path), param_dtype=dtype, mesh=mesh, progress=progress)
    return model.bind(params)


# ---- saving ---------------------------------------------------------------------------------------------------------


def _gather(value: jax.Array, layer: int | None, transposed: bool, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Return one tensor on the host, assembled from the shards of all devices and processes."""
    one = value if layer is None else value[layer]
    one = (one.T if transposed else one).astype(dtype)
    return np.asarray(one if one.is_fully_addressable else process_allgather(one, tiled=True)).reshape(shape)


def to_tensors(model: Model, params: nnx.State, dtype=None) -> dict[str, Tensor]:
    """Return the parameters as Hugging Face tensors (newer names), cast to `dtype` if given. Each is gathered when it is read."""
    tensors, vision, names = {}, model.cfg.vision, family_of(model.cfg).tensors
    for key, value in _flat(params).items():
        name, transposed = names[key]
        layers, shape = (range(value.shape[0]), value.shape[1:]) if "{}" in name else ((None,), value.shape)
        shape = shape[::-1] if transposed else shape
        if key == "vision.patch_embed":
            shape = (shape[0], vision.in_channels, vision.temporal_patch_size, vision.patch_size, vision.patch_size)
        form = shape, jnp.dtype(dtype or value.dtype)
        for i in layers:
            tensors[name.format(i)] = Tensor(*form, partial(_gather, value, i, transposed, *form))
    return tensors


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file with one tensor in memory at a time (safetensors' own writer needs all of them)."""
    header: dict[str, dict[str, Any]] = {"__metadata__": {"format": "pt"}}
    end = 0
    names = {dtype: name for name, dtype in _DTYPES.items()}
    for name, tensor in tensors.items():
        offsets = [end, end := end + tensor.nbytes]
        header[name] = {"dtype": names[tensor.dtype.name], "shape": list(tensor.shape), "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            file.write(np.ascontiguousarray(tensor.read()).reshape(-1).view(np.uint8).data)


def save(
    folder: str | Path,
    model: Model,
    params: nnx.State,
    *,
    source: str | Path | None = None,
    dtype=None,
    max_shard_size: int | str = "5GB",
) -> None:
    """Write a folder that Hugging Face loads: config, safetensors, tokenizer, processor and generation settings.

    Tensors have the names of the hub's files.

    Large weights are sharded with an index. Weights of an earlier save in the folder are replaced only after all new files are
    complete. All processes must call this function; process 0 writes.

    Args:
        source: folder of the tokenizer and processor files; default: the folder the model was loaded from.
        dtype: dtype of the stored tensors; default: that of the parameters.
        max_shard_size: maximum bytes per weight file, a number or a string such as "5GB".
    """
    folder, source = Path(folder), Path(source or model.cfg.folder or folder)
    tensors = to_tensors(model, params, dtype)
    if family_of(model.cfg).older_names:
        tensors = {older_name(name): tensor for name, tensor in tensors.items()}
    if jax.process_index() > 0:  # process 0 writes; the others take part in gathering
        for tensor in tensors.values():
            tensor.read()
        return
    folder.mkdir(parents=True, exist_ok=True)
    plan = split_state_dict_into_shards_factory(
        tensors, get_storage_size=lambda t: t.nbytes, filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_size
    )
    unfinished = {name: folder / f"{name}.partial" for name in plan.filename_to_tensors}
    try:
        for name, path in unfinished.items():
            write_tensors(path, {tensor: tensors[tensor] for tensor in plan.filename_to_tensors[name]})
        for name, path in unfinished.items():
            path.replace(folder / name)
    finally:
        for path in unfinished.values():
            path.unlink(missing_ok=True)
    index = folder / "model.safetensors.index.json"
    if plan.is_sharded:
        index.write_text(json.dumps({"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}, indent=2))
    else:
        index.unlink(missing_ok=True)
    for path in folder.glob("model*.safetensors"):  # weights of an earlier save, which a reader would load
        if path.name not in plan.filename_to_tensors:
            path.unlink()
    hf = json.loads(model.cfg.hf) | {"dtype": next(iter(tensors.values())).dtype.name}
    if "torch_dtype" in hf:  # older name of dtype
        hf["torch_dtype"] = hf["dtype"]
    hf["architectures"] = [family_of(model.cfg).architecture]
    (folder / "config.json").write_text(json.dumps(hf, indent=2))
    for pattern in COMPANIONS:
        for path in source.glob(pattern):
            if path.parent.resolve() != folder.resolve():
                shutil.copy(path, folder / path.name)


def save_pretrained(module: VLM, folder: str | Path, **options) -> None:
    """Write a folder that `from_pretrained` and Hugging Face load. `options`: see `save`."""
    save(folder, *module.split(), **options)
