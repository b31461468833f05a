"""Qwen2.5-VL (arXiv 2502.13923): a tower with RMSNorm, a SwiGLU MLP with biases, and windowed attention in most blocks."""

from typing import Any

import jax

from imagent_jax.model import text, vision
from imagent_jax.model.config import VisionConfig, read_text, read_vision
from imagent_jax.model.families import Family, PublishedDecoder, hub_config
from imagent_jax.model.params import Maker, linear, tensor_names


class Blocks(vision.VisionBlocks):
    """Parameters of all blocks, stacked on a leading `layers` axis."""

    def __init__(self, cfg: VisionConfig, make: Maker):
        super().__init__(cfg, make, layer_norm=False)
        d, hidden = cfg.embed_dim, cfg.intermediate_size
        self.gate, self.gate_bias = make((d, hidden), ("embed", "mlp")), make.zeros(hidden, "mlp")
        self.up, self.up_bias = make((d, hidden), ("embed", "mlp")), make.zeros(hidden, "mlp")
        self.down, self.down_bias = make((hidden, d), ("mlp", "embed")), make.zeros(d)


class Tower(vision.VisionTower):
    """The vision tower. Equals transformers' `Qwen2_5_VisionTransformerPretrainedModel`."""

    BLOCKS = Blocks

    @staticmethod
    def feed_forward(w, x):
        gate, up = (linear(w, name, x) + w[f"{name}_bias"] for name in ("gate", "up"))
        return linear(w, "down", jax.nn.silu(gate) * up) + w["down_bias"]


def read_tower(hf: dict[str, Any]) -> VisionConfig:
    """Return the tower's configuration. `hidden_size` is the tower's width in this family's files.

    Raises:
        ValueError: a window is smaller than a merge unit.
    """
    cfg = read_vision(
        hf,
        embed_dim=hf.get("hidden_size", 3584),
        hidden_size=hf.get("out_hidden_size", 3584),
        intermediate_size=hf.get("intermediate_size", 3420),
        window_size=hf.get("window_size", 112),
        full_attention_blocks=tuple(hf.get("fullatt_block_indexes", (7, 15, 23, 31))),
    )
    if not cfg.window_side:
        raise ValueError(f"window_size {cfg.window_size} holds no {cfg.spatial_merge_size} patches of {cfg.patch_size}.")
    return cfg


_LARGE = {"hidden_size": 1280, "in_chans": 3, "intermediate_size": 3456, "spatial_patch_size": 14, "tokens_per_second": 2}
_SMALL = _LARGE | {
    "depth": 32, "hidden_act": "silu", "intermediate_size": 3420, "num_heads": 16, "window_size": 112,
    "fullatt_block_indexes": [7, 15, 23, 31],
}  # fmt: skip

FAMILY = Family(
    model_type="qwen2_5_vl",
    architecture="Qwen2_5_VLForConditionalGeneration",
    title="Qwen2.5-VL",
    vision_act="silu",
    text=read_text,
    vision=read_tower,
    tower=Tower,
    older_names=True,
    tensors=text.TENSORS
    | vision.TENSORS
    | tensor_names(
        "vision.blocks.",
        "model.visual.blocks.{}.mlp.",
        {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"},
        transposed=True,
    )
    | tensor_names("vision.", "model.visual.merger.", {"merge_norm": "ln_q"})
    | tensor_names("vision.", "model.visual.merger.", {"merge_fc1": "mlp.0", "merge_fc2": "mlp.2"}, transposed=True),
    sizes={
        name: hub_config("qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration", decoder, tower | {"out_hidden_size": decoder.width})
        for name, (decoder, tower) in {
            "Qwen2.5-VL-3B": (PublishedDecoder(2048, 11008, 36, 16, 2, 151936, True), _SMALL),
            "Qwen2.5-VL-7B": (PublishedDecoder(3584, 18944, 28, 28, 4, 152064), _SMALL),
            "Qwen2.5-VL-32B": (PublishedDecoder(5120, 27648, 64, 40, 8, 152064), _LARGE),
            "Qwen2.5-VL-72B": (PublishedDecoder(8192, 29568, 80, 64, 8, 152064), _LARGE),
        }.items()
    },
)
