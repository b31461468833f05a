"""The reference: tiny random Qwen2-VL, Qwen2.5-VL and Qwen3-VL models of transformers, saved as checkpoints in float32 and run in
float64 (`exact`)."""

import copy
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from imagent_jax.images.prepare import PreparedImage, pack_images

torch.set_num_threads(1)  # the models are tiny; more threads only wait for each other

VOCAB, IMAGE, VISION_START, VISION_END = 120, 110, 112, 113
PATCH, MERGE = 4, 2
BUDGET = {"min_pixels": 64, "max_pixels": 1600}  # at 8 pixels a token: 1 to 25 tokens an image
ODD_SIZES = ((17, 45), (61, 23), (24, 24))  # (height, width): wide, tall, square


Reference = Qwen2VLForConditionalGeneration | Qwen2_5_VLForConditionalGeneration | Qwen3VLForConditionalGeneration
FAMILIES = {
    "qwen2_vl": (Qwen2VLConfig, Qwen2VLForConditionalGeneration),
    "qwen2_5_vl": (Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration),
    "qwen3_vl": (Qwen3VLConfig, Qwen3VLForConditionalGeneration),
}


def tiny_model(
    heads: int = 4, kv_heads: int = 2, tied: bool = False, seed: int = 0, family: str = "qwen2_vl", **vision
) -> Reference:
    """A random model with head width 16, in float32. Weights are large enough that logits spread by several units.

    `vision` changes settings of the tower; that of Qwen2.5-VL has windows of 2x2 merged patches and full attention in its
    second block of three, that of Qwen3-VL a 5x5 grid of positions and DeepStack after its first and third block of four.
    """
    width = heads * 16
    towers = {
        "qwen2_vl": {"depth": 2, "embed_dim": 32, "hidden_size": width, "mlp_ratio": 2},
        "qwen2_5_vl": {
            "depth": 3, "hidden_size": 32, "out_hidden_size": width, "intermediate_size": 44,
            "window_size": 16, "fullatt_block_indexes": [1], "tokens_per_second": 2,
        },
        "qwen3_vl": {
            "depth": 4, "hidden_size": 32, "out_hidden_size": width, "intermediate_size": 44,
            "num_position_embeddings": 25, "deepstack_visual_indexes": [0, 2],
        },
    }  # fmt: skip
    own = {"head_dim": 24} if family == "qwen3_vl" else {}  # other than width / heads
    section = [5, 4, 3] if family == "qwen3_vl" else [2, 3, 3]
    config, architecture = FAMILIES[family]
    cfg = config(
        text_config={
            "vocab_size": VOCAB, "hidden_size": width, "intermediate_size": 80, "num_hidden_layers": 3,
            "num_attention_heads": heads, "num_key_value_heads": kv_heads, "rms_norm_eps": 0.01,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": section},
            **own, "max_position_embeddings": 1024, "bos_token_id": None, "eos_token_id": None,
        },
        vision_config={"num_heads": 2, "patch_size": PATCH, **towers[family], **vision},
        image_token_id=IMAGE, video_token_id=111, vision_start_token_id=VISION_START, vision_end_token_id=VISION_END,
        tie_word_embeddings=tied,
    )  # fmt: skip
    model = architecture(cfg).float().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                fan_in = parameter[0].numel()
                parameter.normal_(0.0, 1.5 * fan_in**-0.5, generator=generator)
            else:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
        model.lm_head.weight[IMAGE : VISION_END + 1] = 0.0  # a logit of 0 is never the largest: no marker is generated
    return model


def packed_in_order(images: Sequence[PreparedImage], block: int, n_blocks: int):
    """`pack_images` with the images in their order, each block filled before the next begins."""
    blocks, room = [], 0
    for image in images:
        if len(image.patches) > room:
            blocks.append([])
            room = block
        blocks[-1].append(image)
        room -= len(image.patches)
    return pack_images(blocks, block, n_blocks, merge=MERGE, patch_bytes=3 * PATCH**2)


def exact(model: Reference) -> Reference:
    """A copy that computes in float64 (transformers rounds to float32 in norms, softmax and rotary embeddings)."""
    return copy.deepcopy(model).double()


def terms(model: Reference, tokens: int = 100) -> int:
    """Products that are summed on the way to a logit, layer after layer, where a token sees `tokens` others."""
    text, vision = model.config.text_config, model.config.vision_config
    width, tower = text.hidden_size, getattr(vision, "embed_dim", vision.hidden_size)
    hidden = getattr(vision, "intermediate_size", 2 * tower)
    decoder = text.num_hidden_layers * (3 * width + 16 + tokens + text.intermediate_size) + width
    return decoder + vision.depth * (3 * tower + 16 + tokens + hidden) + 2 * MERGE**2 * tower + 6 * PATCH**2


def tensors(model: Reference, older: bool = False) -> dict[str, torch.Tensor]:
    """The weights by name: the newer names of transformers' modules, or the hub's older ones."""
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    if older:
        swaps = (("model.language_model.", "model."), ("model.visual.", "visual."))
        for new, old in swaps:
            state = {old + name[len(new) :] if name.startswith(new) else name: t for name, t in state.items()}
    return state


def config_json(model: Reference, older: bool = False) -> dict:
    """`config.json` of the model: as transformers writes it, or as the hub's files are (flat for the older families)."""
    hf = json.loads(model.config.to_json_string(use_diff=False))
    hf["architectures"] = [type(model).__name__]
    if not older:
        return hf
    text, vision = hf["text_config"], hf["vision_config"]
    rope = text["rope_parameters"]
    if hf["model_type"] == "qwen3_vl":
        del text["rope_parameters"]
        rope_scaling = {"mrope_interleaved": True, "mrope_section": rope["mrope_section"], "rope_type": "default"}
        return hf | {"text_config": text | {"rope_theta": rope["rope_theta"], "rope_scaling": rope_scaling}}
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
             "num_key_value_heads", "rms_norm_eps", "hidden_act", "use_sliding_window", "max_position_embeddings")  # fmt: skip
    tower = ("depth", "embed_dim", "hidden_size", "num_heads", "mlp_ratio", "patch_size", "intermediate_size",
             "out_hidden_size", "window_size", "fullatt_block_indexes", "tokens_per_second")  # fmt: skip
    markers = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id", "tie_word_embeddings")
    return {
        "architectures": hf["architectures"],
        "model_type": hf["model_type"],
        **{name: text[name] for name in names},
        **{name: hf[name] for name in markers},
        "rope_theta": rope["rope_theta"],
        "rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]},
        "torch_dtype": "float32",
        "vision_config": {
            **{name: vision[name] for name in tower if name in vision},
            "in_chans": 3, "spatial_patch_size": PATCH, "spatial_merge_size": MERGE, "temporal_patch_size": 2,
        },
    }  # fmt: skip


def save_checkpoint(model: Reference, folder: Path, *, older: bool = False, shards: int = 1, dtype=torch.float32) -> Path:
    """Writes `config.json` and safetensors: one file, or `shards` files with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config_json(model, older)))
    state = {name: tensor.to(dtype) for name, tensor in tensors(model, older).items()}
    if shards == 1:
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    weight_map = {}
    for i in range(shards):
        part, file = dict(list(state.items())[i::shards]), f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def random_image(rng: np.random.Generator, size: tuple[int, int]) -> Image.Image:
    """Noise of `size` (height, width)."""
    return Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8))


def pixel_values(images: Sequence[Image.Image]) -> tuple[torch.Tensor, torch.Tensor] | tuple[None, None]:
    """(pixel_values, image_grid_thw) of the images by transformers' own processor."""
    if not images:
        return None, None
    out = Qwen2VLImageProcessorPil(patch_size=PATCH, merge_size=MERGE, **BUDGET)(list(images), return_tensors="pt")
    return out["pixel_values"], out["image_grid_thw"]


def interleave(parts: Sequence[Sequence[int] | Image.Image]) -> list[int]:
    """Token ids of interleaved ids and images, with the placeholders transformers expects."""
    ids: list[int] = []
    for part in parts:
        if isinstance(part, Image.Image):
            count = int(pixel_values([part])[1].prod()) // MERGE**2
            ids += [VISION_START, *[IMAGE] * count, VISION_END]
        else:
            ids += part
    return ids


@torch.no_grad()
def positions(model: Reference, ids: Sequence[int], grids: Sequence[tuple[int, int]]) -> np.ndarray:
    """M-RoPE positions [3 S] by `get_rope_index`."""
    row = torch.tensor([ids])
    grid = torch.tensor([[1, h, w] for h, w in grids]).reshape(-1, 3)
    return model.model.get_rope_index(row, (row == IMAGE).int(), image_grid_thw=grid)[0][:, 0].numpy()


@torch.no_grad()
def logits(model: Reference, samples: Sequence[tuple[Sequence[int], Sequence[Image.Image]]]):
    """Logits [B S V] of (ids, images) samples, right-padded in one batch; and the attention mask [B S]."""
    longest = max(len(ids) for ids, _ in samples)
    rows = torch.zeros(len(samples), longest, dtype=torch.long)
    mask = torch.zeros(len(samples), longest, dtype=torch.long)
    for b, (ids, _) in enumerate(samples):
        rows[b, : len(ids)], mask[b, : len(ids)] = torch.tensor(ids), 1
    patches, grid = pixel_values([image for _, images in samples for image in images])
    model.model.rope_deltas = None
    out = model(
        input_ids=rows, attention_mask=mask, pixel_values=patches, image_grid_thw=grid,
        mm_token_type_ids=(rows == IMAGE).int(), use_cache=False,
    )  # fmt: skip
    return out.logits.numpy(), mask.numpy().astype(bool)


@torch.no_grad()
def vision_features(model: Reference, images: Sequence[Image.Image]) -> np.ndarray:
    """Features [F E] of the images, one after another: merged, and beside them those of DeepStack."""
    patches, grid = pixel_values(images)
    out = model.model.visual(patches, grid_thw=grid)
    return torch.cat([out.pooler_output, *getattr(out, "deepstack_features", ())], dim=-1).numpy()


def greedy(
    model: Reference, samples: Sequence[tuple[Sequence[int], Sequence[Image.Image]]], steps: int
) -> tuple[list[list[int]], float]:
    """`steps` greedy tokens of every sample, a full forward for every token, no cache; and the least by which a chosen
    logit lay above the second largest."""
    rows, least = [list(ids) for ids, _ in samples], np.inf
    for _ in range(steps):
        out, mask = logits(model, [(row, images) for row, (_, images) in zip(rows, samples, strict=True)])
        for b, row in enumerate(rows):
            last = out[b, mask[b].sum() - 1]
            second, first = np.sort(last)[-2:]
            least = min(least, first - second)
            row.append(int(last.argmax()))
    return [row[-steps:] for row in rows], float(least)
