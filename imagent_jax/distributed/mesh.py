"""The device mesh and sharding constraints inside jitted code.

Constraints refer to the current mesh (`jax.set_mesh`). On one device, or without a mesh, they are no-ops.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.experimental.mesh_utils import create_device_mesh
from jax.sharding import AxisType, Mesh, PartitionSpec, get_abstract_mesh

GROUPS = ("data", "fsdp")
"""Mesh axes over which groups are split, prompts together with their responses."""


def make_mesh(data: int = 1, fsdp: int = 1, tensor: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Create a mesh with axes data, fsdp and tensor over the first data * fsdp * tensor devices.

    Args:
        data, fsdp, tensor: axis sizes; at most one may be -1, which takes all remaining devices.
        devices: default: all of `jax.devices()`.
    Raises:
        ValueError: invalid sizes, or the sizes do not divide the number of devices.
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
    # on some TPUs `jax.make_mesh` rejects axes that are no products of the physical axes: 8 x 8 on 4 x 4 x 4
    placed = create_device_mesh(shape, devices[: math.prod(shape)], allow_split_physical_axes=True)
    return Mesh(placed, tuple(sizes), (AxisType.Auto,) * 3)


def several_devices() -> bool:
    """Return whether the current mesh has more than one device."""
    return get_abstract_mesh().size > 1


def shard_count(axes: str | Sequence[str] | None) -> int:
    """Return the number of shards into which the current mesh splits an array axis that is sharded over `axes`."""
    sizes = get_abstract_mesh().shape
    return math.prod(sizes.get(axis, 1) for axis in ((axes,) if isinstance(axes, str) else axes or ()))


def fitting(x: jax.Array | jax.ShapeDtypeStruct, *axes: str | tuple[str, ...] | None) -> PartitionSpec:
    """Return `PartitionSpec(*axes)` for `x`, with None for every axis of `x` whose size is not divisible."""
    return PartitionSpec(*(axis if n % shard_count(axis) == 0 else None for n, axis in zip(x.shape, axes, strict=False)))


def constrain(x: jax.Array, *axes: str | tuple[str, ...] | None) -> jax.Array:
    """Constrain the leading axes of `x` to be sharded over `axes`. Axes of indivisible size and all others are replicated."""
    return jax.lax.with_sharding_constraint(x, fitting(x, *axes)) if several_devices() else x


def per_device(function: Callable, inputs: Any, outputs: Any, axes: Sequence[str] = ()) -> Callable:
    """Run `function` on every device's own shard (`jax.shard_map`). Without several devices, return `function` itself.

    Use it where no device needs another device's shard but the compiler cannot infer that.

    Args:
        inputs, outputs: `PartitionSpec`s (see `fitting`). Gradients of replicated inputs are summed over devices once.
        axes: mesh axes handled manually, the others by the compiler; default: all.
    """
    if shard_count(axes or tuple(get_abstract_mesh().shape)) == 1:
        return function
    return jax.shard_map(function, in_specs=inputs, out_specs=outputs, axis_names=set(axes), check_vma=False)
