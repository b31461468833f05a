"""Qwen2-VL (arXiv 2409.12191): a tower with LayerNorm, quick GELU and full attention over an image in every block."""

from typing import Any

import jax

from imagent_jax.model import text, vision
from imagent_jax.model.config import VisionConfig, read_text, read_vision
from imagent_jax.model.families import Family, PublishedDecoder, hub_config
from imagent_jax.model.params import tensor_names


class Tower(vision.VisionTower):
    """The vision tower. Equals transformers' `Qwen2VisionTransformerPretrainedModel`."""

    BLOCKS = vision.MlpBlocks

    @staticmethod
    def feed_forward(w, x):
        return vision.two_layers(w, ("fc1", "fc2"), lambda h: h * jax.nn.sigmoid(1.702 * h), x)


def read_tower(hf: dict[str, Any]) -> VisionConfig:
    """Return the tower's configuration. `hidden_size` is the decoder's width in this family's files."""
    embed = hf.get("embed_dim", 1280)
    own = {"embed_dim": embed, "hidden_size": hf.get("hidden_size", 3584)}
    return read_vision(hf, intermediate_size=int(embed * hf.get("mlp_ratio", 4)), **own)


_TOWER = {"depth": 32, "embed_dim": 1280, "mlp_ratio": 4, "num_heads": 16, "in_chans": 3, "spatial_patch_size": 14}

FAMILY = Family(
    model_type="qwen2_vl",
    architecture="Qwen2VLForConditionalGeneration",
    title="Qwen2-VL",
    vision_act="quick_gelu",
    text=read_text,
    vision=read_tower,
    tower=Tower,
    older_names=True,
    tensors=text.TENSORS
    | vision.TENSORS
    | tensor_names("vision.blocks.", "model.visual.blocks.{}.mlp.", {"fc1": "fc1", "fc2": "fc2"}, transposed=True)
    | tensor_names("vision.", "model.visual.merger.", {"merge_norm": "ln_q"})
    | tensor_names("vision.", "model.visual.merger.", {"merge_fc1": "mlp.0", "merge_fc2": "mlp.2"}, transposed=True),
    sizes={
        name: hub_config("qwen2_vl", "Qwen2VLForConditionalGeneration", decoder, _TOWER | {"hidden_size": decoder.width})
        for name, decoder in {
            "Qwen2-VL-2B": PublishedDecoder(1536, 8960, 28, 12, 2, 151936, True),
            "Qwen2-VL-7B": PublishedDecoder(3584, 18944, 28, 28, 4, 152064),
            "Qwen2-VL-72B": PublishedDecoder(8192, 29568, 80, 64, 8, 152064),
        }.items()
    },
)
