"""Where arrays live: the mesh, one table from the logical axes that parameters declare to its axes, and how the model says
in passing where its activations go.

What is said in passing is about the current mesh (`jax.set_mesh`). On one device, and without a mesh, it says nothing.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
from flax import nnx
from jax.experimental.mesh_utils import create_device_mesh
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec, get_abstract_mesh

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
GROUPS = ("data", "fsdp")
"""The mesh axes that groups are split over, prompts and responses together."""


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
    # `jax.make_mesh` refuses, on some TPUs, axes that are not products of the slice's own: 8 x 8 on 4 x 4 x 4
    placed = create_device_mesh(shape, devices[: math.prod(shape)], allow_split_physical_axes=True)
    return Mesh(placed, tuple(sizes), (AxisType.Auto,) * 3)


def check_heads(cfg: Qwen2VLConfig, mesh: Mesh | AbstractMesh) -> None:
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


def shardings(params: Any, mesh: Mesh | AbstractMesh, whole: Sequence[str] = ()) -> Any:
    """The `NamedSharding` of every leaf of a tree: a parameter's, or that of a moment kept for it, by `LOGICAL_TO_MESH`;
    anything else (the optimizer's count) is replicated.

    Args:
        whole: mesh axes that nothing is split over.
    Raises:
        ValueError: a parameter's axis does not divide by its mesh axis (both named).
    """

    def one(path, param):
        if not isinstance(param, nnx.Variable):
            return NamedSharding(mesh, PartitionSpec())
        logical_axes, value, apart = param.get_metadata()["logical_axes"], param.get_value(), None
        if isinstance(value, tuple):  # layers apart
            logical_axes, value, apart = logical_axes[1:], value[0], len(value)
        spec = tuple(None if LOGICAL_TO_MESH[a] in whole else LOGICAL_TO_MESH[a] for a in logical_axes)
        for size, logical, axis in zip(value.shape, logical_axes, spec, strict=True):
            if axis is not None and size % mesh.shape[axis]:
                name = ".".join(str(getattr(p, "key", p)) for p in path)
                raise ValueError(
                    f"{name}: axis {logical!r} of size {size} does not divide by mesh.{axis}={mesh.shape[axis]}; "
                    f"choose a mesh.{axis} that divides it."
                )
        place = NamedSharding(mesh, PartitionSpec(*spec))
        return param.replace(place if apart is None else (place,) * apart)

    return jax.tree_util.tree_map_with_path(one, params, is_leaf=lambda x: isinstance(x, nnx.Variable))


# ---- said in passing, about the current mesh ---------------------------------------------------------------------------


def several_devices() -> bool:
    """Whether the current mesh has more than one device."""
    return get_abstract_mesh().size > 1


def ways(axes: str | Sequence[str] | None) -> int:
    """Over how many devices the current mesh splits what is over `axes`."""
    sizes = get_abstract_mesh().shape
    return math.prod(sizes.get(axis, 1) for axis in ((axes,) if isinstance(axes, str) else axes or ()))


def fitting(x: jax.Array | jax.ShapeDtypeStruct, *axes: str | tuple[str, ...] | None) -> PartitionSpec:
    """`PartitionSpec(*axes)` for `x`, less what does not divide: such an axis of `x` stays whole."""
    return PartitionSpec(*(axis if n % ways(axis) == 0 else None for n, axis in zip(x.shape, axes, strict=False)))


def constrain(x: jax.Array, *axes: str | tuple[str, ...] | None) -> jax.Array:
    """`x`, its leading axes split over `axes` as far as they divide, the others whole."""
    return jax.lax.with_sharding_constraint(x, fitting(x, *axes)) if several_devices() else x


def constrain_params(params: Any, whole: Sequence[str] = ()) -> Any:
    """Parameters, or what is kept for each of them, where `shardings` says."""
    if not several_devices():
        return params
    return jax.lax.with_sharding_constraint(params, shardings(params, get_abstract_mesh(), whole))


_gather = jax.jit(partial(constrain_params, whole=("fsdp",)))


def gather_params(params: nnx.State) -> nnx.State:
    """Parameters whole over `fsdp`. One compiled program moves them, where any moves."""
    return _gather(params) if get_abstract_mesh().shape.get("fsdp", 1) > 1 else params


@partial(jax.jit, static_argnums=0)
def rollout_params(dtype: str, params: nnx.State) -> nnx.State:
    """The copy of the parameters that rollouts read, once a token: whole over `fsdp`, in the compute dtype (to which every use
    of them casts), the decoder's layers apart, as not every backend reads a layer of stacked ones without copying it."""

    def cast(path, param):
        value = param.get_value()
        if not isinstance(param, nnx.LoRAParam):  # what is scaled first, is cast then
            value = value.astype(dtype)
        return param.replace(tuple(value) if path[:2] == ("text", "layers") else value)

    copied = nnx.from_flat_state([(path, cast(path, param)) for path, param in nnx.to_flat_state(params)])
    return constrain_params(copied, whole=("fsdp",))


def locally(function: Callable, inputs: Any, outputs: Any, axes: Sequence[str] = ()) -> Callable:
    """`function` run by every device on its own part (`jax.shard_map`): for work that needs no other device's part, where the
    compiler could not tell, or would exchange more than it must.

    Args:
        inputs, outputs: their `PartitionSpec`s (see `fitting`); what is whole on the way in has its gradient summed once.
        axes: mesh axes that this is about, the others being the compiler's; default all.
    """
    if ways(axes or tuple(get_abstract_mesh().shape)) == 1:
        return function
    return jax.shard_map(function, in_specs=inputs, out_specs=outputs, axis_names=set(axes), check_vma=False)
