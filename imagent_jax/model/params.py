"""One declaration per parameter: shape, dtype, logical axes (see `sharding`) and initialiser."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx


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


def weights(module: nnx.Module, dtype) -> dict[str, jax.Array]:
    """The module's own parameters by attribute name, cast to the compute dtype."""
    return {k: jnp.asarray(v[...], dtype) for k, v in vars(module).items() if isinstance(v, nnx.Param)}
