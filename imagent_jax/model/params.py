"""Parameter declarations: shape, dtype, logical axes (see `sharding`) and initialiser in one place."""

from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from imagent_jax.distributed.mesh import constrain
from imagent_jax.model.sharding import LOGICAL_TO_MESH


class Maker:
    """Declares parameters: `make(shape, axes)` returns an `nnx.Param` with its logical axes as metadata.

    Args:
        rngs: random keys of the initialisers.
        dtype: storage dtype of every parameter.
        layers: number of stacked layers (a leading axis), or None for a single layer.
    """

    def __init__(self, rngs: nnx.Rngs, dtype, layers: int | None = None):
        self.rngs, self.dtype, self.layers = rngs, dtype, layers

    def __call__(self, shape: Sequence[int], axes: Sequence[str], init: Callable | None = None) -> nnx.Param:
        """Return a parameter of `shape`. The default initialiser is normal with standard deviation shape[-2] ** -0.5."""
        init = init or nnx.initializers.normal(shape[-2] ** -0.5)
        if self.layers is not None:
            shape, axes = (self.layers, *shape), ("layers", *axes)
        return nnx.Param(init(self.rngs.params(), tuple(shape), self.dtype), logical_axes=tuple(axes))

    def ones(self, width: int, axis: str = "norm") -> nnx.Param:
        return self((width,), (axis,), nnx.initializers.ones)

    def zeros(self, width: int, axis: str = "norm") -> nnx.Param:
        return self((width,), (axis,), nnx.initializers.zeros)


def weights(module: nnx.Module, dtype) -> dict[str, jax.Array | tuple[jax.Array, ...]]:
    """Return the module's own parameters by attribute name, cast to the compute dtype and multiplied by their `scale`, if any.

    Values of layers are stacked arrays, or tuples of arrays (`sharding.rollout_params`).
    """

    def cast(param: nnx.Param):
        scale = param.get_metadata().get("scale")
        return jax.tree.map(lambda x: jnp.asarray(x if scale is None else x * scale, dtype), param.get_value())

    return {name: cast(param) for name, param in vars(module).items() if isinstance(param, nnx.Param)}


def layer_of(w: dict[str, jax.Array | tuple[jax.Array, ...]], index: int) -> dict[str, jax.Array]:
    """Return one layer of `weights`."""
    return {name: x[index] for name, x in w.items()}


def gathered(module: nnx.Module, w: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Return one layer of `weights` replicated over `fsdp`: weights are communicated, not activations.

    The gradient is summed over the data-parallel devices before it is sharded again.
    """

    def axes(name):
        return (None if LOGICAL_TO_MESH[a] == "fsdp" else LOGICAL_TO_MESH[a] for a in places[name] if a != "layers")

    places = {name: param.get_metadata()["logical_axes"] for name, param in vars(module).items() if name in w}
    return {name: constrain(x, *axes(name)) for name, x in w.items()}


def pad_to(x: Array, axis: int, multiple: int, value=0) -> Array:
    """Pad `axis` of `x` at its end to a multiple of `multiple`, with `value`."""
    width = [(0, 0)] * x.ndim
    width[axis] = (0, -x.shape[axis] % multiple)
    return jnp.pad(x, width, constant_values=value)


def linear(w: dict[str, jax.Array], name: str, x: Float[Array, "*b in"]) -> Float[Array, "*b out"]:
    """Return `x @ w[name]`, plus the adapter's low-rank product if there is one (`model.lora`)."""
    y = x @ w[name]
    if f"{name}_lora_a" in w:
        y = y + (x @ w[f"{name}_lora_a"]) @ w[f"{name}_lora_b"]
    return y


def tensor_names(ours: str, theirs: str, modules: Mapping[str, str], transposed: bool = False) -> dict[str, tuple[str, bool]]:
    """Return entries of `families.Family.tensors` for modules with a weight and a bias.

    Args:
        ours, theirs: prefixes of our dotted paths and of Hugging Face's names.
        modules: our parameter -> Hugging Face's module; our bias has the suffix `_bias`.
        transposed: the weights are stored as [out, in].
    """
    weights = {f"{ours}{name}": (f"{theirs}{module}.weight", transposed) for name, module in modules.items()}
    return weights | {f"{ours}{name}_bias": (f"{theirs}{module}.bias", False) for name, module in modules.items()}
