"""The vision tower over packed patches: image sizes and counts are data, never static arguments."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from imagent_jax.model.attention import Packed, attention
from imagent_jax.model.config import VisionConfig
from imagent_jax.model.params import Maker, linear, weights
from imagent_jax.model.rope import rope_2d, rotate


def layer_norm(x, scale, bias, eps: float = 1e-6):
    """LayerNorm over the last axis in float32."""
    y = x.astype(jnp.float32)
    y = y - y.mean(-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + eps)
    return (y * scale + bias).astype(x.dtype)


class VisionBlocks(nnx.Module):
    """All blocks, stacked on a leading `layers` axis."""

    def __init__(self, cfg: VisionConfig, rngs: nnx.Rngs, dtype):
        d, hidden = cfg.embed_dim, cfg.embed_dim * cfg.mlp_ratio
        make = Maker(rngs, dtype, layers=cfg.depth)
        self.norm1, self.norm1_bias = make.ones(d), make.zeros(d)
        self.norm2, self.norm2_bias = make.ones(d), make.zeros(d)
        self.qkv, self.qkv_bias = make((d, 3 * d), ("embed", "heads")), make.zeros(3 * d, "heads")
        self.proj, self.proj_bias = make((d, d), ("heads", "embed")), make.zeros(d)
        self.fc1, self.fc1_bias = make((d, hidden), ("embed", "mlp")), make.zeros(hidden, "mlp")
        self.fc2, self.fc2_bias = make((hidden, d), ("mlp", "embed")), make.zeros(d)


class VisionTower(nnx.Module):
    """Patches -> features in the decoder's width, one per 2x2 patches. Equals `Qwen2VisionTransformerPretrainedModel`."""

    def __init__(self, cfg: VisionConfig, rngs: nnx.Rngs, dtype):
        self.cfg = cfg
        make, merged = Maker(rngs, dtype), cfg.embed_dim * cfg.merge_unit
        self.patch_embed = make((cfg.patch_dim, cfg.embed_dim), ("patch", "embed"))
        self.blocks = VisionBlocks(cfg, rngs, dtype)
        self.merge_norm, self.merge_norm_bias = make.ones(cfg.embed_dim), make.zeros(cfg.embed_dim)
        self.merge_fc1, self.merge_fc1_bias = make((merged, merged), ("embed", "merged")), make.zeros(merged, "merged")
        self.merge_fc2 = make((merged, cfg.hidden_size), ("merged", "embed"))
        self.merge_fc2_bias = make.zeros(cfg.hidden_size)

    def __call__(
        self,
        patches: Float[Array, "M C"],
        coords: Int[Array, "M 2"],
        image: Int[Array, " M"],
        *,
        block: int,
        dtype=jnp.float32,
        remat: bool = False,
        backend: str = "xla",
    ) -> Float[Array, "F D"]:
        """Encodes a pack of images.

        Args:
            patches: flattened patches, in 2x2 merge order, images one after another.
            coords: (h, w) of every patch in its image.
            image: id of the image a patch belongs to, -1 for padding. Patches see their own image only.
            block: attention is computed within consecutive blocks of this many patches; no image straddles one.
        Returns:
            One feature per 4 patches (F = M / 4), in the order of the patches; padding gives finite garbage.
        Raises:
            ValueError: M is not a multiple of `block`.
        """
        cfg, w = self.cfg, weights(self, dtype)
        m = patches.shape[0]
        if m % block or block % cfg.merge_unit:
            raise ValueError(f"{m} patches do not fill blocks of {block}; pad the pack to a multiple.")
        blocks = (m // block, block)
        image = image.reshape(blocks)
        cos, sin = (t.reshape(*blocks, -1) for t in rope_2d(coords, cfg.head_dim, cfg.rope_theta))

        def layer(x, w):
            h = layer_norm(x, w["norm1"], w["norm1_bias"])
            q, k, v = jnp.split((h @ w["qkv"] + w["qkv_bias"]).reshape(*blocks, 3 * cfg.num_heads, -1), 3, axis=-2)
            out = attention(rotate(q, cos, sin), rotate(k, cos, sin), v, Packed(image), backend=backend)
            x = x + out.reshape(*blocks, -1) @ w["proj"] + w["proj_bias"]
            h = layer_norm(x, w["norm2"], w["norm2_bias"]) @ w["fc1"] + w["fc1_bias"]
            return x + (h * jax.nn.sigmoid(1.702 * h)) @ w["fc2"] + w["fc2_bias"], None

        x = patches.astype(dtype).reshape(*blocks, -1) @ w["patch_embed"]
        x, _ = jax.lax.scan(jax.checkpoint(layer) if remat else layer, x, weights(self.blocks, dtype))
        x = layer_norm(x, w["merge_norm"], w["merge_norm_bias"]).reshape(m // cfg.merge_unit, -1)
        x = jax.nn.gelu(linear(w, "merge_fc1", x) + w["merge_fc1_bias"], approximate=False)
        return linear(w, "merge_fc2", x) + w["merge_fc2_bias"]
