"""Qwen2.5-VL's own: windows of the vision tower as data, and the published sizes of every family."""

import dataclasses
import json

import hf_oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hf_oracle import BUDGET, MERGE, ODD_SIZES, PATCH, random_image
from rounding import assert_rounded

from imagent_jax.images.prepare import patch_coords, prepare_image
from imagent_jax.model import checkpoint, vision
from imagent_jax.model.families import families, family_of, read_config
from imagent_jax.model.vlm import abstract, encode_images
from imagent_jax.runs.resources import CompileCounter

BLOCK, BLOCKS = 100, 12  # neither a multiple of a window's 16 or 36 patches
SIZES = (*ODD_SIZES, (8, 8), (200, 9), (40, 40), (33, 70))


def prepared(sizes, seed=3):
    rng = np.random.default_rng(seed)
    images = [random_image(rng, size) for size in sizes]
    return images, [prepare_image(image, patch_size=PATCH, merge_size=MERGE, **BUDGET) for image in images]


def loaded(folder, **vision_settings):
    reference = hf_oracle.tiny_model(family="qwen2_5_vl", **vision_settings)
    folder = hf_oracle.save_checkpoint(reference, folder)
    return hf_oracle.exact(reference), *checkpoint.load(folder, vision_block=BLOCK)


def features(model, params, images):
    """Features of every image, one after another."""
    *packed, first = hf_oracle.packed_in_order(images, BLOCK, BLOCKS)
    out = np.asarray(jax.jit(encode_images, static_argnums=0)(model, params, *packed))
    return np.concatenate([out[row // 4 : row // 4 + len(image.patches) // 4] for image, row in zip(images, first, strict=True)])


# ---- windows --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", [2, 4, 6, 10])
def test_window_order_equals_the_references(side):
    """Blocks of images with partial windows; each block alone is a `grid_thw` of the reference."""
    from transformers.vision_utils import get_vision_window_index

    blocks = [[(4, 12), (6, 6)], [(16, 6)], [(2, 2), (10, 4), (2, 14)]]
    coords, image = np.zeros((3, BLOCK, 2), np.int32), np.full((3, BLOCK), 99, np.int32)  # padding comes last
    for b, grids in enumerate(blocks):
        rows = np.concatenate([patch_coords(grid, MERGE) for grid in grids])
        coords[b, : len(rows)] = rows
        image[b, : len(rows)] = np.repeat(np.arange(len(grids)), [h * w for h, w in grids])
    order, window = map(np.asarray, jax.jit(vision.window_order, static_argnums=(2, 3))(coords, image, side, 4))
    for b, grids in enumerate(blocks):
        theirs, edges = get_vision_window_index(torch.tensor([[1, h, w] for h, w in grids]), MERGE, side * PATCH, PATCH)
        np.testing.assert_array_equal(order[b, : len(theirs)], theirs)
        changes = np.flatnonzero((window[b, 1:] != window[b, :-1]).any(-1)) + 1
        np.testing.assert_array_equal(changes, edges[1 : len(changes) + 1])
        assert len(changes) + 1 >= len(edges) - 1


def dense(q, k, v, mask):
    """Attention in float64."""
    scores = np.einsum("bsxh,btxh->bxst", *(x.astype(np.float64) for x in (q, k))) / q.shape[-1] ** 0.5
    weights = np.exp(np.where(mask[:, None], scores, -np.inf))
    return np.einsum("bxst,btxh->bsxh", weights / weights.sum(-1, keepdims=True), v)


@pytest.mark.parametrize("area", [1, 4, 16, 36])
def test_tiles_equal_masked_attention_wherever_windows_begin(area):
    rng = np.random.default_rng(area)
    q, k, v = rng.normal(size=(3, 2, 50, 3, 8)).astype(np.float32)
    lengths = rng.integers(1, area + 1, (2, 50))
    window = np.stack([np.repeat(np.arange(50), row)[:50] for row in lengths])
    window = np.stack([window * 0, window, window % 3], -1).astype(np.int32)
    mask = (window[:, :, None] == window[:, None, :]).all(-1)
    tiled = jax.jit(vision.attend_windows, static_argnums=4)(q, k, v, window, area)
    assert_rounded(tiled, dense(q, k, v, mask), 8 + 50, scale=v)


@pytest.mark.parametrize(
    "settings",
    [
        {"window_size": 24},
        {"window_size": 40},
        {"window_size": 20, "fullatt_block_indexes": [0, 2]},
        {"fullatt_block_indexes": []},
        {"fullatt_block_indexes": [0, 1, 2]},
    ],
    ids=str,
)
def test_features_equal_the_reference_for_other_windows_and_full_blocks(settings, tmp_path):
    reference, model, params = loaded(tmp_path, **settings)
    images, ours = prepared(SIZES)
    assert_rounded(features(model, params, ours), hf_oracle.vision_features(reference, images), hf_oracle.terms(reference))


@pytest.mark.parametrize("changes", [{"window_size": 24}, {"full_attention_blocks": (0,)}, {"window_size": 0}], ids=str)
def test_other_windows_would_be_noticed(changes, tmp_path):
    """The parity above would fail if windows or full blocks were others, or all blocks had full attention."""
    _, model, params = loaded(tmp_path)
    wrong = dataclasses.replace(model.cfg, vision=dataclasses.replace(model.cfg.vision, **changes))
    wrong = model._replace(graphdef=abstract(wrong)[0].graphdef, cfg=wrong)
    _, images = prepared(SIZES)
    assert np.abs(features(model, params, images) - features(wrong, params, images)).max() > 1e-2


def test_other_image_sizes_and_counts_compile_nothing_new(tmp_path):
    _, model, params = loaded(tmp_path)
    model = model._replace(logprob_chunk=77)  # no other test has compiled this one
    encode, counter, packs = jax.jit(encode_images, static_argnums=0), CompileCounter(), []
    for sizes in (((17, 45),), ((61, 23), (24, 24)), SIZES, ((8, 8),) * 9):
        *packed, _ = hf_oracle.packed_in_order(prepared(sizes)[1], BLOCK, BLOCKS)
        before = counter.count
        jax.block_until_ready(encode(model, params, *packed))
        packs.append(counter.count - before)
    assert packs[0] >= 1 and packs[1:] == [0, 0, 0]


@pytest.mark.slow(20)
def test_gradients_through_windows_equal_the_reference(tmp_path):
    """d(sum of squared features) / d(first block's parameters)."""
    reference, model, params = loaded(tmp_path)
    images, ours = prepared(SIZES)
    *packed, first = hf_oracle.packed_in_order(ours, BLOCK, BLOCKS)
    real = np.zeros(BLOCK * BLOCKS // 4, bool)
    for image, row in zip(ours, first, strict=True):
        real[row // 4 : row // 4 + len(image.patches) // 4] = True

    def loss(params, remat):
        return ((encode_images(model._replace(remat=remat), params, *map(jnp.asarray, packed)) * real[:, None]) ** 2).sum()

    patches, grid = hf_oracle.pixel_values(images)
    (reference.model.visual(patches, grid_thw=grid).pooler_output ** 2).sum().backward()
    block = reference.model.visual.blocks[0]
    theirs = {"qkv": block.attn.qkv.weight.grad.T, "gate": block.mlp.gate_proj.weight.grad.T, "norm1": block.norm1.weight.grad}
    for remat in ("none", "full"):
        gradient = jax.jit(jax.grad(loss), static_argnums=1)(params, remat)["vision"]["blocks"]
        for name, expected in theirs.items():
            terms = 2 * hf_oracle.terms(reference) + real.sum()  # forward, back, and the sum over the patches
            assert_rounded(gradient[name][...][0], expected, terms, note=(remat, name))


# ---- published sizes ------------------------------------------------------------------------------------------------

PUBLISHED = {name: hf for family in families().values() for name, hf in family.sizes.items()}
PARAMETERS = {
    "Qwen2-VL-2B": 2_208_985_600,
    "Qwen2-VL-7B": 8_291_375_616,
    "Qwen2-VL-72B": 73_405_560_320,
    "Qwen2.5-VL-3B": 3_754_622_976,
    "Qwen2.5-VL-7B": 8_292_166_656,
    "Qwen2.5-VL-32B": 33_452_718_336,
    "Qwen2.5-VL-72B": 73_410_777_344,
    "Qwen3-VL-2B": 2_127_532_032,
    "Qwen3-VL-4B": 4_437_815_808,
    "Qwen3-VL-8B": 8_767_123_696,
    "Qwen3-VL-32B": 33_357_390_064,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_published_sizes_are_recognised_and_have_the_references_tensors(name):
    hf = PUBLISHED[name]
    cfg = read_config(hf)
    third = cfg.model_type == "qwen3_vl"
    assert cfg.name == name and cfg.text.head_dim == 128 and cfg.vision.head_dim == (cfg.vision.embed_dim // 16 if third else 80)
    assert (cfg.vision.window_side, cfg.vision.full_attention_blocks) == ((8, (7, 15, 23, 31)) if "2.5" in name else (0, ()))

    config, architecture = hf_oracle.FAMILIES[cfg.model_type]
    with torch.device("meta"):
        reference = architecture(config.from_dict(json.loads(json.dumps(hf))))
    theirs = {key: tuple(tensor.shape) for key, tensor in hf_oracle.tensors(reference).items()}
    assert reference.config.vision_config.num_heads == cfg.vision.num_heads

    ours = {}
    for path, variable in abstract(cfg)[1].flat_state():
        tensor, transposed = family_of(cfg).tensors[".".join(map(str, path))]
        shape = variable.get_value().shape
        for i in range(shape[0]) if "{}" in tensor else (None,):
            one = shape if i is None else shape[1:]
            ours[tensor.format(i)] = one[::-1] if transposed else one
    patch = "model.visual.patch_embed.proj.weight"
    assert int(np.prod(theirs[patch][1:])) == ours[patch][1]
    assert ours | {patch: theirs[patch]} == theirs
    assert sum(int(np.prod(shape)) for shape in ours.values()) == PARAMETERS[name]


def test_a_size_of_ones_own_has_the_familys_name():
    assert read_config(PUBLISHED["Qwen2.5-VL-7B"] | {"num_hidden_layers": 2}).name == "Qwen2.5-VL of another size"
