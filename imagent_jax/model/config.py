"""Configuration of a vision-language model: the decoder, the vision tower and the token ids of the vision markers."""

import json
from dataclasses import dataclass, field, replace
from typing import Any

from imagent_jax.images.prepare import CLIP_MEAN, CLIP_STD


@dataclass(frozen=True)
class VisionConfig:
    """The vision tower: patches of `patch_size` pixels, `depth` blocks of width `embed_dim`, merged into `hidden_size`.

    Attributes:
        spatial_merge_size: patches along a side of a merge unit, which becomes one token of the decoder.
        window_size: side of an attention window in pixels; 0: every block attends over the whole image.
        full_attention_blocks: blocks that attend over the whole image although there are windows.
        position_side: side of the square grid of learned position embeddings, interpolated to an image's grid; 0: none.
        deepstack: blocks whose output also becomes features, which the first decoder layers add (arXiv 2406.04334).
    """

    depth: int
    embed_dim: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    window_size: int = 0
    full_attention_blocks: tuple[int, ...] = ()
    position_side: int = 0
    deepstack: tuple[int, ...] = ()
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
    def feature_dim(self) -> int:
        """Width of a feature row: the decoder's width, once for the last block and once for every block of `deepstack`."""
        return self.hidden_size * (1 + len(self.deepstack))

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
    """The decoder: grouped-query attention with `num_heads` query and `num_kv_heads` key heads of `head_dim`, M-RoPE, SwiGLU.

    Attributes:
        qkv_bias: queries, keys and values have biases.
        qk_norm: queries and keys are normalised by head (RMSNorm).
        interleaved_mrope: frequencies take t, h and w in turn, not section by section; see `rope.mrope`.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float
    mrope_section: tuple[int, int, int]
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    qkv_bias: bool = True
    qk_norm: bool = False
    interleaved_mrope: bool = False


@dataclass(frozen=True)
class VLMConfig:
    """Configuration of a vision-language model.

    Attributes:
        model_type: name of the family (`model.families`), as in `config.json`.
        name: published size, such as "Qwen2.5-VL-7B", or the family's name with "of another size".
        hf: the `config.json` as read.
        folder: the folder it was read from.
    """

    text: TextConfig
    vision: VisionConfig
    image_token_id: int
    vision_start_token_id: int
    vision_end_token_id: int
    model_type: str
    name: str = field(compare=False, default="")
    hf: str = field(repr=False, compare=False, default="{}")
    folder: str = field(repr=False, compare=False, default="")


def untied(cfg: VLMConfig) -> VLMConfig:
    """Return the configuration of the same model with an output matrix of its own, apart from the embedding."""
    hf = json.loads(cfg.hf)
    for part in (hf, hf.get("text_config") or {}):
        if part.get("tie_word_embeddings"):
            part["tie_word_embeddings"] = False
    return replace(cfg, text=replace(cfg.text, tie_word_embeddings=False), hf=json.dumps(hf))


def read_text(
    hf: dict[str, Any], mrope_section: tuple[int, int, int] = (16, 24, 24), rope_theta: float = 1e6, **own: Any
) -> TextConfig:
    """Return the decoder's configuration from a parsed `config.json`, in the hub's older flat form or with `text_config`.

    Args:
        mrope_section, rope_theta: of a file that does not say.
        own: fields that the family fixes.
    Raises:
        ValueError: an unsupported setting (named in the message).
    """
    text = {**hf, **(hf.get("text_config") or {})}
    if text.get("use_sliding_window"):
        raise ValueError("use_sliding_window is true; sliding-window attention is not supported, set it to false.")
    if text.get("hidden_act", "silu") != "silu":
        raise ValueError(f"hidden_act of the decoder is {text['hidden_act']!r}; only 'silu' is supported.")
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type not in ("default", "mrope"):
        raise ValueError(f"rope type {rope_type!r} is not supported; only 'mrope' is.")
    heads, width = text["num_attention_heads"], text["hidden_size"]
    head_dim = text.get("head_dim") or width // heads
    section = tuple(rope.get("mrope_section", mrope_section))
    if sum(section) * 2 != head_dim:
        raise ValueError(f"mrope_section {list(section)} must sum to half the head width {head_dim}.")
    return TextConfig(
        vocab_size=text["vocab_size"],
        hidden_size=width,
        intermediate_size=text["intermediate_size"],
        num_layers=text["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=text.get("num_key_value_heads") or heads,
        head_dim=head_dim,
        rope_theta=float(rope.get("rope_theta", text.get("rope_theta", rope_theta))),
        mrope_section=section,
        rms_norm_eps=text.get("rms_norm_eps", 1e-5),
        tie_word_embeddings=bool(hf.get("tie_word_embeddings") or text.get("tie_word_embeddings")),
        **own,
    )


def read_vision(hf: dict[str, Any], **own: Any) -> VisionConfig:
    """Return the tower's configuration from a parsed `vision_config`. Missing keys take the defaults of transformers.

    Args:
        own: fields that the family names in its own way.
    """
    return VisionConfig(
        depth=hf.get("depth", 32),
        num_heads=hf.get("num_heads", 16),
        in_channels=hf.get("in_channels", hf.get("in_chans", 3)),
        patch_size=hf.get("patch_size", hf.get("spatial_patch_size", 14)),
        spatial_merge_size=hf.get("spatial_merge_size", 2),
        temporal_patch_size=hf.get("temporal_patch_size", 2),
        rope_theta=(hf.get("rope_parameters") or {}).get("rope_theta", 10000.0),
        **own,
    )
