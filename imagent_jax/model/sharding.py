"""Where parameters live: one table from their logical axes to mesh axes, and the copies that are whole over `fsdp`."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec, get_abstract_mesh

from imagent_jax.distributed.mesh import several_devices
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
