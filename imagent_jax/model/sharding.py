"""Parameter sharding: one table from logical axes to mesh axes, and copies replicated over `fsdp`."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec, get_abstract_mesh

from imagent_jax.distributed.mesh import several_devices
from imagent_jax.model.config import VLMConfig

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
"""Mesh axis of each logical parameter axis (None: replicated)."""


def check_heads(cfg: VLMConfig, mesh: Mesh | AbstractMesh) -> None:
    """Check that attention can be split by whole heads.

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
    """Return the `NamedSharding` of every leaf by `LOGICAL_TO_MESH`: of parameters, and of optimizer moments like them.

    Leaves without logical axes (the optimizer's step count) are replicated.

    Args:
        whole: mesh axes over which nothing is split.
    Raises:
        ValueError: a parameter axis is not divisible by its mesh axis; the message names both.
    """

    def one(path, param):
        if not isinstance(param, nnx.Variable):
            return NamedSharding(mesh, PartitionSpec())
        logical_axes, value, apart = param.get_metadata()["logical_axes"], param.get_value(), None
        if isinstance(value, tuple):  # unstacked layers
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


# ---- sharding constraints on the current mesh --------------------------------------------------------------------------


def constrain_params(params: Any, whole: Sequence[str] = ()) -> Any:
    """Constrain parameters, or trees of the same structure, to `shardings` on the current mesh."""
    if not several_devices():
        return params
    return jax.lax.with_sharding_constraint(params, shardings(params, get_abstract_mesh(), whole))


_gather = jax.jit(partial(constrain_params, whole=("fsdp",)))


def gather_params(params: nnx.State) -> nnx.State:
    """Return the parameters replicated over `fsdp`. One compiled program moves them; without `fsdp` nothing moves."""
    return _gather(params) if get_abstract_mesh().shape.get("fsdp", 1) > 1 else params


@partial(jax.jit, static_argnums=0)
def rollout_params(dtype: str, params: nnx.State) -> nnx.State:
    """Return the copy of the parameters that decoding reads: replicated over `fsdp` and cast to the compute dtype.

    LoRA parameters keep their dtype, because they are scaled before they are cast. The decoder's layers are unstacked, since some
    backends copy a layer of a stacked array on every read.
    """

    def cast(path, param):
        value = param.get_value()
        if not isinstance(param, nnx.LoRAParam):  # scaled first, cast afterwards
            value = value.astype(dtype)
        return param.replace(tuple(value) if path[:2] == ("text", "layers") else value)

    copied = nnx.from_flat_state([(path, cast(path, param)) for path, param in nnx.to_flat_state(params)])
    return constrain_params(copied, whole=("fsdp",))
