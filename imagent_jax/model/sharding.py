"""Where parameters live: the mesh, and one table from the logical axes that parameters declare to its axes."""

import math
from collections.abc import Sequence

import jax
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from imagent_jax.model.config import Qwen2VLConfig

LOGICAL_TO_MESH: dict[str, str | None] = {
    "vocab": "tensor",
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "merged": "tensor",
    "patch": None,
    "layers": None,
    "norm": None,
    "rank": None,
}
"""Where each logical axis of a parameter lives on the mesh (None: replicated)."""


def make_mesh(data: int = 1, fsdp: int = 1, tensor: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with axes data, fsdp and tensor over the first data * fsdp * tensor devices; -1 takes what is left.

    Args:
        devices: default all of `jax.devices()`.
    Raises:
        ValueError: the sizes do not divide the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    asked = ", ".join(f"mesh.{axis}={size}" for axis, size in sizes.items())
    if [axis for axis, size in sizes.items() if size < 1 and size != -1] or list(sizes.values()).count(-1) > 1:
        raise ValueError(f"{asked} is no mesh; every axis must be at least 1, and at most one may be -1 (what is left).")
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if len(devices) % fixed:
        raise ValueError(
            f"{asked} needs {fixed} devices a copy, which does not divide the {len(devices)} there are; choose sizes whose "
            f"product divides {len(devices)}, or -1 for one axis."
        )
    shape = [len(devices) // fixed if size == -1 else size for size in sizes.values()]
    return jax.make_mesh(shape, tuple(sizes), (AxisType.Auto,) * 3, devices=devices[: math.prod(shape)])


def check_heads(cfg: Qwen2VLConfig, mesh: Mesh) -> None:
    """Attention is split by whole heads.

    Raises:
        ValueError: `mesh.tensor` does not divide the heads of the decoder or of the vision tower.
    """
    text, vision, size = cfg.text, cfg.vision, mesh.shape["tensor"]
    common = math.gcd(text.num_heads, text.num_kv_heads, vision.num_heads)
    for heads, what in (
        (text.num_heads, "query heads of the decoder"),
        (text.num_kv_heads, "key heads of the decoder"),
        (vision.num_heads, "heads of the vision tower"),
    ):
        if heads % size:
            fits = ", ".join(str(n) for n in range(1, common + 1) if common % n == 0)
            raise ValueError(f"mesh.tensor={size} does not divide the {heads} {what}; choose mesh.tensor from {fits}.")


def shardings(params: nnx.State, mesh: Mesh) -> nnx.State:
    """The `NamedSharding` of every parameter, by `LOGICAL_TO_MESH`.

    Raises:
        ValueError: a parameter's axis does not divide by its mesh axis (both named).
    """

    def one(path, param: nnx.Param):
        spec = tuple(LOGICAL_TO_MESH[a] for a in param.get_metadata()["logical_axes"])
        for size, logical, axis in zip(param.get_value().shape, param.get_metadata()["logical_axes"], spec, strict=True):
            if axis is not None and size % mesh.shape[axis]:
                name = ".".join(str(getattr(p, "key", p)) for p in path)
                raise ValueError(
                    f"{name}: axis {logical!r} of size {size} does not divide by mesh.{axis}={mesh.shape[axis]}; "
                    f"choose a mesh.{axis} that divides it."
                )
        return param.replace(NamedSharding(mesh, PartitionSpec(*spec)))

    return jax.tree_util.tree_map_with_path(one, params, is_leaf=lambda x: isinstance(x, nnx.Variable))
