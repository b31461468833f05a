"""One declaration per parameter: shape, dtype, logical axes (see `sharding`) and initialiser."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from imagent_jax.distributed.mesh import constrain
from imagent_jax.model.sharding import LOGICAL_TO_MESH


class Maker:
    """Declares parameters: `make(shape, axes)` gives an `nnx.Param` that knows its logical axes.

    Args:
        rngs: source of keys for the initialisers.
        dtype: storage dtype of every parameter.
        layers: leading axis of stacked layers, or None for a single one.
    """

    def __init__(self, rngs: nnx.Rngs, dtype, layers: int | None = None):
        self.rngs, self.dtype, self.layers = rngs, dtype, layers

    def __call__(self, shape: Sequence[int], axes: Sequence[str], init: Callable | None = None) -> nnx.Param:
        """A parameter of `shape`; by default normal with deviation 1/sqrt(inputs), where axis -2 counts inputs."""
        init = init or nnx.initializers.normal(shape[-2] ** -0.5)
        if self.layers is not None:
            shape, axes = (self.layers, *shape), ("layers", *axes)
        return nnx.Param(init(self.rngs.params(), tuple(shape), self.dtype), logical_axes=tuple(axes))

    def ones(self, width: int, axis: str = "norm") -> nnx.Param:
        return self((width,), (axis,), nnx.initializers.ones)

    def zeros(self, width: int, axis: str = "norm") -> nnx.Param:
        return self((width,), (axis,), nnx.initializers.zeros)


def weights(module: nnx.Module, dtype) -> dict[str, jax.Array | tuple[jax.Array, ...]]:
    """The module's own parameters by attribute name, times their `scale` if they have one, cast to the compute dtype. Those of
    layers are stacked, or a tuple (`sharding.rollout_params`)."""

    def cast(param: nnx.Param):
        scale = param.get_metadata().get("scale")
        return jax.tree.map(lambda x: jnp.asarray(x if scale is None else x * scale, dtype), param.get_value())

    return {name: cast(param) for name, param in vars(module).items() if isinstance(param, nnx.Param)}


def layer_of(w: dict[str, jax.Array | tuple[jax.Array, ...]], index: int) -> dict[str, jax.Array]:
    """One layer of `weights`."""
    return {name: x[index] for name, x in w.items()}


def gathered(module: nnx.Module, w: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """One layer of the module's `weights` as the layer uses them: whole over the mesh's `fsdp`, so that weights travel, not
    activations. The gradient is summed over the devices of groups before it is split again."""

    def axes(name):
        return (None if LOGICAL_TO_MESH[a] == "fsdp" else LOGICAL_TO_MESH[a] for a in places[name] if a != "layers")

    places = {name: param.get_metadata()["logical_axes"] for name, param in vars(module).items() if name in w}
    return {name: constrain(x, *axes(name)) for name, x in w.items()}


def pad_to(x: Array, axis: int, multiple: int, value=0) -> Array:
    """`x` with `axis` filled up to a multiple."""
    width = [(0, 0)] * x.ndim
    width[axis] = (0, -x.shape[axis] % multiple)
    return jnp.pad(x, width, constant_values=value)


def linear(w: dict[str, jax.Array], name: str, x: Float[Array, "*b in"]) -> Float[Array, "*b out"]:
    """`x @ w[name]`, plus the low-rank path of its adapter where there is one (`model.lora`)."""
    y = x @ w[name]
    if f"{name}_lora_a" in w:
        y = y + (x @ w[f"{name}_lora_a"]) @ w[f"{name}_lora_b"]
    return y
