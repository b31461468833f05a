"""Configuration of a Qwen2-VL model, read from and written to Hugging Face's `config.json`."""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class VisionConfig:
    """The vision tower: patches of `patch_size` pixels, `depth` blocks of width `embed_dim`, merged 2x2 into `hidden_size`."""

    depth: int
    embed_dim: int
    hidden_size: int
    num_heads: int
    mlp_ratio: int = 4
    in_channels: int = 3
    patch_size: int = 14
    spatial_merge_size: int = 2
    temporal_patch_size: int = 2
    rope_theta: float = 10000.0

    @property
    def head_dim(self) -> int:
        return self.embed_dim // self.num_heads

    @property
    def patch_dim(self) -> int:
        """C: values in one flattened patch (channels x frames x height x width)."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    @property
    def merge_unit(self) -> int:
        """Patches merged into one language-model token."""
        return self.spatial_merge_size**2


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
    """Text and vision configuration, the ids of the vision markers, and the `config.json` (`hf`) and folder they came from."""

    text: TextConfig
    vision: VisionConfig
    image_token_id: int
    vision_start_token_id: int
    vision_end_token_id: int
    hf: str = field(repr=False, compare=False, default="{}")
    folder: str = field(repr=False, compare=False, default="")

    @classmethod
    def from_hf(cls, hf: dict[str, Any]) -> "Qwen2VLConfig":
        """From the dictionary of a `config.json`, in the hub's older flat form or the newer one with `text_config`.

        Raises:
            ValueError: another architecture, or a setting this implementation does not honour (named in the sentence).
        """
        if hf.get("model_type") != "qwen2_vl":
            raise ValueError(f"model_type is {hf.get('model_type')!r}; this loader reads 'qwen2_vl' checkpoints only.")
        text, vision = {**hf, **(hf.get("text_config") or {})}, hf["vision_config"]
        if text.get("use_sliding_window"):
            raise ValueError("use_sliding_window is true; sliding-window attention is not supported, set it to false.")
        if text.get("hidden_act", "silu") != "silu" or vision.get("hidden_act", "quick_gelu") != "quick_gelu":
            raise ValueError("hidden_act differs from Qwen2-VL's (silu for text, quick_gelu for vision).")
        rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        if rope_type not in ("default", "mrope"):
            raise ValueError(f"rope type {rope_type!r} is not supported; Qwen2-VL uses 'mrope'.")
        heads, width = text["num_attention_heads"], text["hidden_size"]
        section = tuple(rope.get("mrope_section", (16, 24, 24)))
        if sum(section) * 2 != width // heads:
            raise ValueError(f"mrope_section {list(section)} must sum to half the head width {width // heads}.")
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
            vision=VisionConfig(
                depth=vision["depth"],
                embed_dim=vision["embed_dim"],
                hidden_size=vision["hidden_size"],
                num_heads=vision["num_heads"],
                mlp_ratio=vision.get("mlp_ratio", 4),
                in_channels=vision.get("in_channels", vision.get("in_chans", 3)),
                patch_size=vision.get("patch_size", vision.get("spatial_patch_size", 14)),
                spatial_merge_size=vision.get("spatial_merge_size", 2),
                temporal_patch_size=vision.get("temporal_patch_size", 2),
                rope_theta=(vision.get("rope_parameters") or {}).get("rope_theta", 10000.0),
            ),
            image_token_id=hf["image_token_id"],
            vision_start_token_id=hf["vision_start_token_id"],
            vision_end_token_id=hf["vision_end_token_id"],
            hf=json.dumps(hf),
        )

    @classmethod
    def from_folder(cls, folder: str | Path) -> "Qwen2VLConfig":
        """From a folder that holds `config.json`.

        Raises:
            ValueError: no such file, or see `from_hf`.
        """
        path = Path(folder) / "config.json"
        if not path.is_file():
            raise ValueError(f"{folder} holds no config.json; name a folder in Hugging Face's checkpoint form.")
        try:
            return replace(cls.from_hf(json.loads(path.read_text())), folder=str(folder))
        except KeyError as error:
            raise ValueError(f"{path} has no {error}; name a complete Qwen2-VL checkpoint.") from error
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
