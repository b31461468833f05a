"""Qwen3-VL, dense: interleaved M-RoPE, q/k norms, learned positions in the tower, and DeepStack features."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from imagent_jax.model import text, vision
from imagent_jax.model.config import TextConfig, VisionConfig, read_text, read_vision
from imagent_jax.model.families import Family
from imagent_jax.model.params import Maker, gathered, layer_of, tensor_names, weights


class DeepMergers(nnx.Module):
    """Parameters of the mergers of the DeepStack blocks, stacked on a leading `layers` axis."""

    def __init__(self, cfg: VisionConfig, make: Maker):
        merged = cfg.embed_dim * cfg.merge_unit
        self.norm, self.norm_bias = make.ones(merged), make.zeros(merged)
        self.fc1, self.fc1_bias = make((merged, merged), ("embed", "merged")), make.zeros(merged, "merged")
        self.fc2, self.fc2_bias = make((merged, cfg.hidden_size), ("merged", "embed")), make.zeros(cfg.hidden_size)


def interpolation(coords: jax.Array, image: jax.Array, side: int) -> tuple[jax.Array, jax.Array]:
    """Return where each patch lies in a `side` x `side` grid that is stretched over its image, corners on corners.

    Args:
        coords: (h, w) of every patch in its image, int [B S 2].
        image: id of each patch's image in its block, [B S]; -1 for padding.
    Returns:
        Flat indices [B S 4] of the four nearest grid points, and their bilinear weights [B S 4]. Equals
        `get_vision_interpolation_indices_and_weights` of transformers.
    """

    def last(coords, image):  # largest (h, w) of each patch's image
        count = len(image)
        number = jnp.unique(image, return_inverse=True, size=count)[1].reshape(-1)
        return jax.ops.segment_max(coords, number, num_segments=count)[number]

    at = coords * (side - 1) / jnp.maximum(jax.vmap(last)(coords, image), 1)
    low = jnp.clip(jnp.floor(at).astype(int), 0, side - 1)
    fraction, high = at - low, jnp.minimum(low + 1, side - 1)
    rows, columns = (jnp.stack([low[..., i], high[..., i]], -1) for i in (0, 1))
    by_row, by_column = (jnp.stack([1 - fraction[..., i], fraction[..., i]], -1) for i in (0, 1))
    indices, shares = rows[..., :, None] * side + columns[..., None, :], by_row[..., :, None] * by_column[..., None, :]
    return indices.reshape(*image.shape, 4), shares.reshape(*image.shape, 4)


class Tower(vision.VisionTower):
    """The vision tower. Equals transformers' `Qwen3VLVisionModel`."""

    BLOCKS = vision.MlpBlocks

    def __init__(self, cfg: VisionConfig, rngs: nnx.Rngs, dtype):
        super().__init__(cfg, rngs, dtype)
        make = Maker(rngs, dtype)
        self.patch_embed_bias = make.zeros(cfg.embed_dim)
        self.position = make((cfg.position_side**2, cfg.embed_dim), ("patch", "embed"))
        self.deep = DeepMergers(cfg, Maker(rngs, dtype, layers=len(cfg.deepstack)))

    @staticmethod
    def feed_forward(w, x):
        return vision.two_layers(w, ("fc1", "fc2"), jax.nn.gelu, x)  # the tanh approximation

    def embed(self, w, x, coords, image):
        indices, shares = interpolation(coords, image, self.cfg.position_side)
        position = jnp.einsum("bsk,bskd->bsd", shares, w["position"].astype(jnp.float32)[indices])
        return x @ w["patch_embed"] + w["patch_embed_bias"] + position.astype(x.dtype)

    def merge_deep(self, index, x):
        w = gathered(self.deep, layer_of(weights(self.deep, x.dtype), index))
        x = vision.norm(w, "norm", x.reshape(x.shape[0], -1, x.shape[-1] * self.cfg.merge_unit))
        return vision.two_layers(w, ("fc1", "fc2"), vision.gelu, x)


def read_decoder(hf: dict[str, Any]) -> TextConfig:
    """Return the decoder's configuration.

    Raises:
        ValueError: attention has biases, or see `read_text`.
    """
    own = hf.get("text_config") or {}
    if own.get("attention_bias"):
        raise ValueError("attention_bias is true; Qwen3-VL's published sizes have no biases, and none are supported.")
    hf = hf | {"text_config": {"head_dim": 128, "rms_norm_eps": 1e-6} | own}
    section, theta = (24, 20, 20), 500000.0
    return read_text(hf, section, theta, qkv_bias=False, qk_norm=True, interleaved_mrope=True)


def read_tower(hf: dict[str, Any]) -> VisionConfig:
    """Return the tower's configuration.

    Raises:
        ValueError: the learned positions form no square.
    """
    positions = hf.get("num_position_embeddings", 2304)
    side = round(positions**0.5)
    if side**2 != positions:
        raise ValueError(f"num_position_embeddings {positions} is no square number.")
    return read_vision(
        {"depth": 27, "patch_size": 16} | hf,
        embed_dim=hf.get("hidden_size", 1152),
        hidden_size=hf.get("out_hidden_size", 3584),
        intermediate_size=hf.get("intermediate_size", 4304),
        position_side=side,
        deepstack=tuple(hf.get("deepstack_visual_indexes", (8, 16, 24))),
    )


def _size(width: int, mlp: int, layers: int, heads: int, tied: bool, tower: dict[str, Any]) -> dict[str, Any]:
    """Return the `config.json` of a published size."""
    return {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "model_type": "qwen3_vl",
        "tie_word_embeddings": tied,
        "image_token_id": 151655,
        "video_token_id": 151656,
        "vision_start_token_id": 151652,
        "vision_end_token_id": 151653,
        "text_config": {
            "model_type": "qwen3_vl_text",
            "vocab_size": 151936,
            "hidden_size": width,
            "intermediate_size": mlp,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-6,
            "rope_theta": 5000000,
            "tie_word_embeddings": tied,
            "rope_scaling": {"rope_type": "default", "mrope_interleaved": True, "mrope_section": [24, 20, 20]},
        },
        "vision_config": {
            "model_type": "qwen3_vl_vision",
            "hidden_act": "gelu_pytorch_tanh",
            "in_channels": 3,
            "patch_size": 16,
            "num_heads": 16,
            "num_position_embeddings": 2304,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "out_hidden_size": width,
            **tower,
        },
    }


_SMALL = {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "deepstack_visual_indexes": [5, 11, 17]}
_LARGE = {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "deepstack_visual_indexes": [8, 16, 24]}
_DEEP = "model.visual.deepstack_merger_list.{}"

FAMILY = Family(
    model_type="qwen3_vl",
    architecture="Qwen3VLForConditionalGeneration",
    title="Qwen3-VL",
    vision_act="gelu_pytorch_tanh",
    text=read_decoder,
    vision=read_tower,
    tower=Tower,
    older_names=False,
    tensors=text.TENSORS
    | vision.TENSORS
    | {
        "vision.patch_embed_bias": ("model.visual.patch_embed.proj.bias", False),
        "vision.position": ("model.visual.pos_embed.weight", False),
    }
    | tensor_names("vision.blocks.", "model.visual.blocks.{}.mlp.linear_", {"fc1": "fc1", "fc2": "fc2"}, transposed=True)
    | tensor_names("vision.merge_", "model.visual.merger.", {"norm": "norm"})
    | tensor_names("vision.merge_", "model.visual.merger.linear_", {"fc1": "fc1", "fc2": "fc2"}, transposed=True)
    | tensor_names("vision.deep.", f"{_DEEP}.", {"norm": "norm"})
    | tensor_names("vision.deep.", f"{_DEEP}.linear_", {"fc1": "fc1", "fc2": "fc2"}, transposed=True),
    sizes={
        "Qwen3-VL-2B": _size(2048, 6144, 28, 16, True, _SMALL),
        "Qwen3-VL-4B": _size(2560, 9728, 36, 32, True, _SMALL),
        "Qwen3-VL-8B": _size(4096, 12288, 36, 32, False, _LARGE),
        "Qwen3-VL-32B": _size(5120, 25600, 64, 64, False, _LARGE),
    },
)
