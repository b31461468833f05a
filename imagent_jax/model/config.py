"""Configuration of a Qwen2-VL or Qwen2.5-VL model, read from and written to Hugging Face's `config.json`."""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from imagent_jax.images.prepare import CLIP_MEAN, CLIP_STD, image_settings

ARCHITECTURES = {"qwen2_vl": "Qwen2VLForConditionalGeneration", "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration"}
"""Supported families: `model_type` and architecture as in `config.json`."""

PUBLISHED = {
    ("qwen2_vl", 1536, 28): "Qwen2-VL-2B",
    ("qwen2_vl", 3584, 28): "Qwen2-VL-7B",
    ("qwen2_vl", 8192, 80): "Qwen2-VL-72B",
    ("qwen2_5_vl", 2048, 36): "Qwen2.5-VL-3B",
    ("qwen2_5_vl", 3584, 28): "Qwen2.5-VL-7B",
    ("qwen2_5_vl", 5120, 64): "Qwen2.5-VL-32B",
    ("qwen2_5_vl", 8192, 80): "Qwen2.5-VL-72B",
}
"""Published sizes by family, decoder width and number of decoder layers."""


@dataclass(frozen=True)
class VisionConfig:
    """The vision tower: patches of `patch_size` pixels, `depth` blocks of width `embed_dim`, 2x2 merge into `hidden_size`.

    Qwen2-VL: LayerNorm, a quick-GELU MLP, and full attention over an image in every block. Qwen2.5-VL (`gated`): RMSNorm and a
    SwiGLU MLP with biases; attention covers the whole image in `full_attention_blocks`, and windows of `window_size` pixels in
    the other blocks.
    """

    depth: int
    embed_dim: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    gated: bool = False
    window_size: int = 0
    full_attention_blocks: tuple[int, ...] = ()
    in_channels: int = 3
    patch_size: int = 14
    spatial_merge_size: int = 2
    temporal_patch_size: int = 2
    rope_theta: float = 10000.0
    image_mean: tuple[float, ...] = CLIP_MEAN
    image_std: tuple[float, ...] = CLIP_STD

    @property
    def head_dim(self) -> int:
        return self.embed_dim // self.num_heads

    @property
    def patch_bytes(self) -> int:
        """Bytes of one patch of a still image (channels x height x width)."""
        return self.in_channels * self.patch_size**2

    @property
    def patch_dim(self) -> int:
        """C: values of one flattened patch (channels x frames x height x width)."""
        return self.temporal_patch_size * self.patch_bytes

    @property
    def merge_unit(self) -> int:
        """Patches merged into one decoder token."""
        return self.spatial_merge_size**2

    @property
    def window_side(self) -> int:
        """Patches along a window's side, a multiple of `spatial_merge_size`; 0 without windowed attention."""
        return self.window_size // self.patch_size // self.spatial_merge_size * self.spatial_merge_size


@dataclass(frozen=True)
class TextConfig:
    """The decoder: grouped-query attention with `num_heads` query and `num_kv_heads` key heads, M-RoPE, SwiGLU."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    rope_theta: float
    mrope_section: tuple[int, int, int]
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads


@dataclass(frozen=True)
class Qwen2VLConfig:
    """Configuration of the decoder and the vision tower, and the token ids of the vision markers.

    Attributes:
        hf: the `config.json` as read.
        folder: the folder it was read from.
    """

    text: TextConfig
    vision: VisionConfig
    image_token_id: int
    vision_start_token_id: int
    vision_end_token_id: int
    model_type: str = "qwen2_vl"
    hf: str = field(repr=False, compare=False, default="{}")
    folder: str = field(repr=False, compare=False, default="")

    @property
    def architecture(self) -> str:
        """Name of the model's class in transformers."""
        return ARCHITECTURES[self.model_type]

    @property
    def name(self) -> str:
        """Name of the published size, such as "Qwen2.5-VL-7B"; for other sizes, the family with "of another size"."""
        size = PUBLISHED.get((self.model_type, self.text.hidden_size, self.text.num_layers))
        return size or {"qwen2_vl": "Qwen2-VL", "qwen2_5_vl": "Qwen2.5-VL"}[self.model_type] + " of another size"

    @classmethod
    def from_hf(cls, hf: dict[str, Any]) -> "Qwen2VLConfig":
        """Return the configuration of a parsed `config.json`, in the hub's older flat form or the newer form with `text_config`.

        Keys missing in `vision_config` take the defaults of transformers, on which the hub's large sizes rely.

        Raises:
            ValueError: another architecture, or an unsupported setting (named in the message).
        """
        family = hf.get("model_type")
        names = hf.get("architectures") or [ARCHITECTURES.get(family)]
        if family not in ARCHITECTURES or names != [ARCHITECTURES[family]]:
            named = f" with architectures {names}" if hf.get("architectures") else ""
            raise ValueError(
                f"model_type is {family!r}{named}; this loader reads "
                + " and ".join(f"{architecture} ({kind!r})" for kind, architecture in ARCHITECTURES.items())
                + " checkpoints only."
            )
        text = {**hf, **(hf.get("text_config") or {})}
        if text.get("use_sliding_window"):
            raise ValueError("use_sliding_window is true; sliding-window attention is not supported, set it to false.")
        gated = family == "qwen2_5_vl"
        act = "silu" if gated else "quick_gelu"
        if text.get("hidden_act", "silu") != "silu" or hf["vision_config"].get("hidden_act", act) != act:
            raise ValueError(f"hidden_act differs from that of {ARCHITECTURES[family]} (silu for text, {act} for vision).")
        rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        if rope_type not in ("default", "mrope"):
            raise ValueError(f"rope type {rope_type!r} is not supported; Qwen2-VL uses 'mrope'.")
        heads, width = text["num_attention_heads"], text["hidden_size"]
        section = tuple(rope.get("mrope_section", (16, 24, 24)))
        if sum(section) * 2 != width // heads:
            raise ValueError(f"mrope_section {list(section)} must sum to half the head width {width // heads}.")
        vision = _vision(hf["vision_config"], gated)
        if vision.hidden_size != width:
            raise ValueError(f"The vision tower gives features of width {vision.hidden_size}; the decoder's is {width}.")
        return cls(
            text=TextConfig(
                vocab_size=text["vocab_size"],
                hidden_size=width,
                intermediate_size=text["intermediate_size"],
                num_layers=text["num_hidden_layers"],
                num_heads=heads,
                num_kv_heads=text.get("num_key_value_heads") or heads,
                rope_theta=float(rope.get("rope_theta", text.get("rope_theta", 1e6))),
                mrope_section=section,
                rms_norm_eps=text.get("rms_norm_eps", 1e-5),
                tie_word_embeddings=bool(hf.get("tie_word_embeddings") or text.get("tie_word_embeddings")),
            ),
            vision=vision,
            image_token_id=hf["image_token_id"],
            vision_start_token_id=hf["vision_start_token_id"],
            vision_end_token_id=hf["vision_end_token_id"],
            model_type=family,
            hf=json.dumps(hf),
        )

    @classmethod
    def from_folder(cls, folder: str | Path) -> "Qwen2VLConfig":
        """Return the configuration of a folder with a `config.json`. Image mean and std come from its image settings, if any.

        Raises:
            ValueError: the file is missing or unreadable, or see `from_hf`.
        """
        path = Path(folder) / "config.json"
        if not path.is_file():
            raise ValueError(f"{folder} holds no config.json; name a folder in Hugging Face's checkpoint form.")
        try:
            cfg = replace(cls.from_hf(json.loads(path.read_text())), folder=str(folder))
        except KeyError as error:
            raise ValueError(f"{path} has no {error}; name a complete Qwen2-VL checkpoint.") from error
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        settings = image_settings(path.parent, {})
        own = {name: tuple(settings[name]) for name in ("image_mean", "image_std") if settings.get(name)}
        return replace(cfg, vision=replace(cfg.vision, **own))


def _vision(hf: dict[str, Any], gated: bool) -> VisionConfig:
    """Return the vision configuration of either family.

    `hidden_size` is the decoder's width in Qwen2-VL's file and the tower's width in Qwen2.5-VL's file.

    Raises:
        ValueError: a window is smaller than a merge unit.
    """
    width = hf.get("hidden_size", 3584)
    if gated:
        own = {
            "embed_dim": width,
            "hidden_size": hf.get("out_hidden_size", 3584),
            "intermediate_size": hf.get("intermediate_size", 3420),
            "gated": True,
            "window_size": hf.get("window_size", 112),
            "full_attention_blocks": tuple(hf.get("fullatt_block_indexes", (7, 15, 23, 31))),
        }
    else:
        embed = hf.get("embed_dim", 1280)
        own = {"embed_dim": embed, "hidden_size": width, "intermediate_size": int(embed * hf.get("mlp_ratio", 4))}
    cfg = VisionConfig(
        depth=hf.get("depth", 32),
        num_heads=hf.get("num_heads", 16),
        in_channels=hf.get("in_channels", hf.get("in_chans", 3)),
        patch_size=hf.get("patch_size", hf.get("spatial_patch_size", 14)),
        spatial_merge_size=hf.get("spatial_merge_size", 2),
        temporal_patch_size=hf.get("temporal_patch_size", 2),
        rope_theta=(hf.get("rope_parameters") or {}).get("rope_theta", 10000.0),
        **own,
    )
    if gated and not cfg.window_side:
        raise ValueError(f"window_size {cfg.window_size} holds no {cfg.spatial_merge_size} patches of {cfg.patch_size}.")
    return cfg
