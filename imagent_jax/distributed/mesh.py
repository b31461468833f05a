"""The device mesh, and how code says in passing where its arrays go.

What is said in passing is about the current mesh (`jax.set_mesh`). On one device, and without a mesh, it says nothing.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.experimental.mesh_utils import create_device_mesh
from jax.sharding import AxisType, Mesh, PartitionSpec, get_abstract_mesh

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
