"""Published model sizes of both families: shapes are known without checkpoint files and without a network."""

from imagent_jax.model.config import Qwen2VLConfig

_TOWER_2 = {"depth": 32, "embed_dim": 1280, "mlp_ratio": 4, "num_heads": 16, "in_chans": 3, "spatial_patch_size": 14}
_TOWER_25 = {
    "depth": 32, "hidden_act": "silu", "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "in_chans": 3,
    "spatial_patch_size": 14, "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31], "tokens_per_second": 2,
}  # fmt: skip
_TOWER_LARGE = {
    "hidden_size": 1280,
    "in_chans": 3,
    "intermediate_size": 3456,
    "spatial_patch_size": 14,
    "tokens_per_second": 2,
}
SIZES = {  # width, MLP width, layers, query heads, key heads, vocabulary, tied embeddings, tower
    "Qwen2-VL-2B": (1536, 8960, 28, 12, 2, 151936, True, _TOWER_2),
    "Qwen2-VL-7B": (3584, 18944, 28, 28, 4, 152064, False, _TOWER_2),
    "Qwen2-VL-72B": (8192, 29568, 80, 64, 8, 152064, False, _TOWER_2),
    "Qwen2.5-VL-3B": (2048, 11008, 36, 16, 2, 151936, True, _TOWER_25),
    "Qwen2.5-VL-7B": (3584, 18944, 28, 28, 4, 152064, False, _TOWER_25),
    "Qwen2.5-VL-32B": (5120, 27648, 64, 40, 8, 152064, False, _TOWER_LARGE),
    "Qwen2.5-VL-72B": (8192, 29568, 80, 64, 8, 152064, False, _TOWER_LARGE),
}
"""Sizes by name, from the `config.json` files on the hub. Tests compare them with transformers' shapes and parameter counts."""


def hub_config(name: str) -> dict:
    """Return the `config.json` of a size in the hub's flat form. Large sizes omit keys that equal transformers' defaults."""
    width, mlp, layers, heads, kv_heads, vocab, tied, tower = SIZES[name]
    newer = "2.5" in name
    return {
        "architectures": [f"Qwen2{'_5_' if newer else ''}VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl" if newer else "qwen2_vl",
        "vocab_size": vocab, "hidden_size": width, "intermediate_size": mlp, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "hidden_act": "silu", "rms_norm_eps": 1e-6,
        "rope_theta": 1e6, "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}, "use_sliding_window":
        False, "sliding_window": 32768, "max_window_layers": layers, "tie_word_embeddings": tied,
        "image_token_id": 151655, "video_token_id": 151656, "vision_start_token_id": 151652, "vision_end_token_id":
        151653, "vision_config": {**tower, ("out_hidden_size" if newer else "hidden_size"): width},
    }  # fmt: skip


def published_config(path: str) -> Qwen2VLConfig:
    """Return the configuration of a hub id such as "Qwen/Qwen2.5-VL-7B-Instruct".

    Raises:
        ValueError: the id is not in `SIZES`.
    """
    name = path.rpartition("/")[2].removesuffix("-Instruct")
    if name not in SIZES:
        raise ValueError(f"{path!r} is neither a folder nor a published size; name a folder, or one of {', '.join(SIZES)}.")
    return Qwen2VLConfig.from_hf(hub_config(name))
