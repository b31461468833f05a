"""The vision tower over packed patches. Image sizes and counts are data, not static arguments."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Shaped, UInt8

from imagent_jax.distributed.mesh import GROUPS, constrain
from imagent_jax.model.attention import Packed, attend, attention
from imagent_jax.model.config import VisionConfig
from imagent_jax.model.params import Maker, gathered, linear, tensor_names, weights
from imagent_jax.model.rope import rope_2d, rotate
from imagent_jax.model.text import rms_norm

TENSORS: dict[str, tuple[str, bool]] = {
    "vision.patch_embed": ("model.visual.patch_embed.proj.weight", True),
    **tensor_names("vision.blocks.", "model.visual.blocks.{}.", {"norm1": "norm1", "norm2": "norm2"}),
    **tensor_names("vision.blocks.", "model.visual.blocks.{}.", {"qkv": "attn.qkv", "proj": "attn.proj"}, transposed=True),
}
"""Tensor of every parameter that the towers of all families have: see `families.Family.tensors`."""


def layer_norm(x, scale, bias, eps: float = 1e-6):
    """Return LayerNorm over the last axis, computed in float32."""
    y = x.astype(jnp.float32)
    y = y - y.mean(-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + eps)
    return (y * scale + bias).astype(x.dtype)


def norm(w: dict[str, jax.Array], name: str, x: Float[Array, "*b D"]) -> Float[Array, "*b D"]:
    """Apply LayerNorm if the norm `name` of the parameters `w` has a bias, else RMSNorm."""
    return layer_norm(x, w[name], w[f"{name}_bias"]) if f"{name}_bias" in w else rms_norm(x, w[name], 1e-6)


def normalise(cfg: VisionConfig, patches: UInt8[Array | np.ndarray, "*b bytes"]) -> Float[Array, "*b C"]:
    """Return patches normalised per channel, (x / 255 - mean) / std, in float32, repeated over the temporal patch axis.

    Equals transformers' processor within rounding.
    """
    std = 255 * np.asarray(cfg.image_std)
    scale, shift = (x.astype(np.float32)[:, None, None] for x in (1 / std, np.asarray(cfg.image_mean) / std * 255))
    x = patches.reshape(*patches.shape[:-1], cfg.in_channels, 1, -1).astype(jnp.float32) * scale - shift
    return jnp.repeat(x, cfg.temporal_patch_size, axis=-2).reshape(*patches.shape[:-1], -1)


def two_layers(
    w: dict[str, jax.Array], names: tuple[str, str], act: Callable[[Array], Array], x: Float[Array, "*b D"]
) -> Float[Array, "*b E"]:
    """Apply two matrices with biases, by their names in the parameters `w`, with an activation between them."""
    first, second = names
    return linear(w, second, act(linear(w, first, x) + w[f"{first}_bias"])) + w[f"{second}_bias"]


gelu = partial(jax.nn.gelu, approximate=False)


def window_order(
    coords: Int[Array, "*b S 2"], image: Int[Array, "*b S"], side: int, unit: int
) -> tuple[Int[Array, "*b U"], Int[Array, "*b S 3"]]:
    """Return the merge units of a block sorted by window, and each patch's window in that order.

    A window is `side` x `side` patches, fewer at the right and lower edges of an image. Units keep their order within a window.
    Equals `get_vision_window_index` of transformers, computed from data.

    Args:
        side: patches along a window's side.
        unit: patches per merge unit.
    Returns:
        Order of the U = S / `unit` merge units, and the window (image, row, column) of every patch in that order.
    """
    window = jnp.concatenate([image[..., None], coords // side], axis=-1)
    units = window[..., ::unit, :]
    order = jnp.lexsort((units[..., 2], units[..., 1], units[..., 0]), axis=-1)
    return order, reorder(window, order, unit)


def reorder(x: Shaped[Array, "*b S D"], order: Int[Array, "*b U"], unit: int = 1) -> Shaped[Array, "*b S D"]:
    """Return `x` with its rows, in groups of `unit`, permuted by `order`."""
    *lead, s, d = x.shape
    grouped = x.reshape(*lead, s // unit, unit * d)
    return jnp.take_along_axis(grouped, order[..., None], axis=-2).reshape(x.shape)


def attend_windows(
    q: Float[Array, "B S X H"],
    k: Float[Array, "B S X H"],
    v: Float[Array, "B S X H"],
    window: Int[Array, "B S 3"],
    area: int,
) -> Float[Array, "B S X H"]:
    """Compute attention within windows of at most `area` patches. The patches of a window are adjacent.

    The sequence is cut into tiles of `area` patches, so that a window lies in one tile or in two adjacent tiles. The queries of a
    tile attend to the keys of the previous, the own and the next tile under a mask: 3 * `area` keys per query for any image size.
    """
    b, s = window.shape[:2]
    tiles = -(-s // area)

    def tiled(x, fill=0):
        x = jnp.pad(x, ((0, 0), (0, tiles * area - s), *((0, 0),) * (x.ndim - 2)), constant_values=fill)
        return x.reshape(b, tiles, area, *x.shape[2:])

    def neighbours(x, fill=0):
        x = jnp.pad(x, ((0, 0), (1, 1), *((0, 0),) * (x.ndim - 2)), constant_values=fill)
        return jnp.concatenate([x[:, :-2], x[:, 1:-1], x[:, 2:]], axis=2)

    q, k, v, window = tiled(q), tiled(k), tiled(v), tiled(window, -1)
    mask = jnp.all(window[:, :, :, None] == neighbours(window, -1)[:, :, None], axis=-1)
    return attend(q, neighbours(k), neighbours(v), mask).reshape(b, tiles * area, *q.shape[3:])[:, :s]


class VisionBlocks(nnx.Module):
    """Parameters of all blocks, stacked on a leading `layers` axis: norms and attention. A family adds its MLP.

    Args:
        make: declares stacked parameters.
        layer_norm: the norms have biases (LayerNorm); else RMSNorm.
    """

    def __init__(self, cfg: VisionConfig, make: Maker, layer_norm: bool):
        d = cfg.embed_dim
        self.norm1, self.norm2 = make.ones(d), make.ones(d)
        if layer_norm:
            self.norm1_bias, self.norm2_bias = make.zeros(d), make.zeros(d)
        self.qkv, self.qkv_bias = make((d, 3 * d), ("embed", "heads")), make.zeros(3 * d, "heads")
        self.proj, self.proj_bias = make((d, d), ("heads", "embed")), make.zeros(d)


class MlpBlocks(VisionBlocks):
    """Parameters of all blocks with LayerNorm and an MLP of two matrices."""

    def __init__(self, cfg: VisionConfig, make: Maker):
        super().__init__(cfg, make, layer_norm=True)
        d, hidden = cfg.embed_dim, cfg.intermediate_size
        self.fc1, self.fc1_bias = make((d, hidden), ("embed", "mlp")), make.zeros(hidden, "mlp")
        self.fc2, self.fc2_bias = make((hidden, d), ("mlp", "embed")), make.zeros(d)


class VisionTower(nnx.Module):
    """Vision transformer from patches to features of the decoder's width, one feature per merge unit.

    A family subclasses it with its `BLOCKS` and its `feed_forward`, and where it differs `embed` and `merge_deep`; packing,
    attention and merging are shared.
    Windowed attention cost: a window of 112 pixels has 64 patches, so a patch attends to 192 keys (`attend_windows`) instead of
    2560 at 640 features per image. At width 1280 that is 1 MFLOP per patch instead of 13; the block's matrices cost 39.
    """

    BLOCKS: Callable[[VisionConfig, Maker], VisionBlocks]

    def __init__(self, cfg: VisionConfig, rngs: nnx.Rngs, dtype):
        self.cfg = cfg
        make, merged = Maker(rngs, dtype), cfg.embed_dim * cfg.merge_unit
        self.patch_embed = make((cfg.patch_dim, cfg.embed_dim), ("patch", "embed"))
        self.blocks = self.BLOCKS(cfg, Maker(rngs, dtype, layers=cfg.depth))
        self.merge_norm = make.ones(cfg.embed_dim)
        if hasattr(self.blocks, "norm1_bias"):
            self.merge_norm_bias = make.zeros(cfg.embed_dim)
        self.merge_fc1, self.merge_fc1_bias = make((merged, merged), ("embed", "merged")), make.zeros(merged, "merged")
        self.merge_fc2 = make((merged, cfg.hidden_size), ("merged", "embed"))
        self.merge_fc2_bias = make.zeros(cfg.hidden_size)

    def embed(
        self, w: dict[str, jax.Array], x: Float[Array, "B S C"], coords: Int[Array, "B S 2"], image: Int[Array, "B S"]
    ) -> Float[Array, "B S D"]:
        """Return the input of the first block, given normalised patches and the tower's own parameters `w`."""
        return x @ w["patch_embed"]

    @staticmethod
    def feed_forward(w: dict[str, jax.Array], x: Float[Array, "*b D"]) -> Float[Array, "*b D"]:
        """Apply the MLP of one block, given its parameters."""
        raise NotImplementedError

    def merge_deep(self, index: int, x: Float[Array, "B S D"]) -> Float[Array, "B U E"]:
        """Return the features of `cfg.deepstack[index]`, given the output of that block; only of a family with DeepStack."""
        raise NotImplementedError

    def __call__(
        self,
        patches: UInt8[Array, "M bytes"],
        coords: Int[Array, "M 2"],
        image: Int[Array, " M"],
        *,
        block: int,
        dtype=jnp.float32,
        remat: bool = False,
        backend: str = "xla",
    ) -> Float[Array, "F E"]:
        """Encode a pack of images.

        Args:
            patches: as `images.prepare_image` returns them, images one after another.
            coords: (h, w) of every patch in its image.
            image: id of each patch's image, -1 for padding. Patches attend to their own image only.
            block: patches per attention block; no image crosses a block boundary.
            dtype: compute dtype.
            remat: recompute the layers in the backward pass.
            backend: see `attention`.
        Returns:
            One feature per merge unit, in the order of the patches; padding gives finite, meaningless features. With DeepStack a
            row is `cfg.feature_dim` wide: the last block's feature, then those of the blocks `cfg.deepstack`.
        Raises:
            ValueError: M is not a multiple of `block`.
        """
        cfg, w = self.cfg, gathered(self, weights(self, dtype))  # ty: ignore[invalid-argument-type] - no layers, no tuples
        m = patches.shape[0]
        if m % block or block % cfg.merge_unit:
            raise ValueError(f"{m} patches do not fill blocks of {block}; pad the pack to a multiple.")
        blocks, unit, side = (m // block, block), cfg.merge_unit, cfg.window_side
        coords, image = coords.reshape(*blocks, 2), image.reshape(blocks)
        x = constrain(self.embed(w, normalise(cfg, patches).astype(dtype).reshape(*blocks, -1), coords, image), GROUPS)
        if side:
            order, window = window_order(coords, image, side, unit)
            x, coords, image = reorder(x, order, unit), reorder(coords, order, unit), window[..., 0]
        cos, sin = rope_2d(coords, cfg.head_dim, cfg.rope_theta)

        def attend_block(q, k, v, full):
            def all_to_all(q, k, v):
                return attention(q, k, v, Packed(image), backend=backend)

            if not side:
                return all_to_all(q, k, v)
            return jax.lax.cond(full, all_to_all, lambda *qkv: attend_windows(*qkv, window, side**2), q, k, v)

        def layer(x, inputs):
            w, full = gathered(self.blocks, inputs[0]), inputs[1]
            h = norm(w, "norm1", x)
            q, k, v = jnp.split((linear(w, "qkv", h) + w["qkv_bias"]).reshape(*blocks, 3 * cfg.num_heads, -1), 3, axis=-2)
            out = attend_block(rotate(q, cos, sin), rotate(k, cos, sin), v, full)
            x = x + linear(w, "proj", out.reshape(*blocks, -1)) + w["proj_bias"]
            return constrain(x + self.feed_forward(w, norm(w, "norm2", x)), GROUPS), None

        full = jnp.isin(jnp.arange(cfg.depth), jnp.asarray(cfg.full_attention_blocks, int))
        inputs, deep, done = (weights(self.blocks, dtype), full), [], 0
        for end in (*(index + 1 for index in cfg.deepstack), cfg.depth):
            part = inputs if not cfg.deepstack else jax.tree.map(lambda x: x[done:end], inputs)  # noqa: B023 (called here)
            x, _ = jax.lax.scan(jax.checkpoint(layer) if remat else layer, x, part)
            deep, done = [*deep, x], end
        deep = [self.merge_deep(index, x) for index, x in enumerate(deep[:-1])]
        x = norm(w, "merge_norm", x).reshape(blocks[0], block // unit, -1)
        x = jnp.concatenate([two_layers(w, ("merge_fc1", "merge_fc2"), gelu, x), *deep], axis=-1)
        return (reorder(x, jnp.argsort(order, axis=-1)) if side else x).reshape(m // unit, -1)
