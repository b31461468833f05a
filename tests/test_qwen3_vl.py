"""Qwen3-VL's own: positions interpolated as data, and the gradient of a tower whose features enter several layers."""

import hf_oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from hf_oracle import BUDGET, IMAGE, MERGE, ODD_SIZES, PATCH, VISION_END, VISION_START, random_image
from rounding import assert_rounded
from transformers.vision_utils import get_vision_interpolation_indices_and_weights

from imagent_jax.images.prepare import patch_coords, prepare_image
from imagent_jax.model import checkpoint
from imagent_jax.model.positions import mrope_positions
from imagent_jax.model.qwen3_vl import interpolation
from imagent_jax.model.rope import mrope
from imagent_jax.model.vlm import at_tokens, encode_images, response_logprobs

BLOCK, BLOCKS = 100, 6


@pytest.mark.parametrize("side", [2, 5, 48])
def test_positions_are_interpolated_as_the_reference_does(side):
    """Blocks with several images, whose numbers need not begin at 0, and padding."""
    grids = [[(2, 2), (4, 12), (6, 6)], [(10, 4), (2, 24)], [(10, 10)]]
    coords, image = np.zeros((3, 110, 2), np.int32), np.full((3, 110), -1, np.int32)
    expected, number = [], 0
    for b, one in enumerate(grids):
        at = 0
        for grid in one:
            rows = slice(at, at := at + grid[0] * grid[1])
            coords[b, rows], image[b, rows], number = patch_coords(grid, MERGE), number + 3, number + 1
        grid = torch.tensor([[1, *grid] for grid in one])
        expected.append(get_vision_interpolation_indices_and_weights(grid, side, "bilinear", True, MERGE))
    indices, shares = jax.jit(interpolation, static_argnums=2)(coords, image, side)
    table = np.random.default_rng(0).normal(size=(side**2, 3))
    for b, (theirs, weights) in enumerate(expected):
        n = len(theirs)
        ours = (table[indices[b, :n]] * np.asarray(shares[b, :n])[..., None]).sum(1)
        reference = (table[theirs.numpy()] * weights.numpy()[..., None]).sum(1)
        assert_rounded(ours, reference, 4, scale=table)


def test_frequencies_of_interleaved_positions_take_turns():
    """Frequency i uses t, h or w as i % 3 says, up to the number of h and of w; then t."""
    positions = np.array([1, 10, 100])[:, None, None]
    cos, _ = mrope(jnp.asarray(positions), 24, 1e4, (5, 4, 3), interleaved=True)
    of = [10 if i % 3 == 1 and i < 12 else 100 if i % 3 == 2 and i < 9 else 1 for i in range(12)]
    angles = np.array([p / 1e4 ** (2 * i / 24) for i, p in enumerate(of)])
    assert_rounded(np.asarray(cos)[0, 0], np.tile(np.cos(angles), 2), 1, scale=100 * np.ones(1))
    assert (sum(p == 1 for p in of), sum(p == 10 for p in of), sum(p == 100 for p in of)) == (5, 4, 3)


def test_the_towers_gradient_through_all_its_features_equals_the_references(tmp_path):
    """Of the sum of log-probabilities of a response with an image in its middle, in our two streams."""
    reference = hf_oracle.tiny_model(6, 2, False, 1, "qwen3_vl")
    model, params = checkpoint.load(hf_oracle.save_checkpoint(reference, tmp_path), vision_block=BLOCK)
    rng = np.random.default_rng(1)
    images = [random_image(rng, size) for size in ODD_SIZES[1:]]
    prepared = [prepare_image(image, patch_size=PATCH, merge_size=MERGE, **BUDGET) for image in images]
    *pack, first = hf_oracle.packed_in_order(prepared, BLOCK, BLOCKS)
    pack = [jnp.asarray(x) for x in pack]
    units = [len(image.patches) // MERGE**2 for image in prepared]
    text = [rng.integers(0, 100, n).tolist() for n in (5, 4, 6)]
    shown = [[VISION_START, *[IMAGE] * n, VISION_END] for n in units]
    prompt, response = [*text[0], *shown[0]], [*text[1], *shown[1], *text[2]]
    ids = np.asarray(prompt + response)
    positions = mrope_positions(ids, IMAGE, [image.grid for image in prepared], MERGE)[0]
    rows = np.full(len(ids), -1)
    rows[ids == IMAGE] = np.concatenate([row // MERGE**2 + np.arange(n) for row, n in zip(first, units, strict=True)])
    p, scored = len(prompt), np.asarray(response) < 100

    def total(vision):
        whole = nnx.State({**params, "vision": vision})
        features = encode_images(model, whole, *pack)
        shown = tuple(jax.jit(at_tokens)(features, part) for part in (rows[None, :p], rows[None, None, p:]))
        logprobs, _ = response_logprobs(
            model, whole, *map(jnp.asarray, (
                ids[None, :p], positions[:, None, :p], rows[None, :p], np.array([p]),
                ids[None, None, p:], positions[:, None, None, p:], rows[None, None, p:],
            )), shown,
        )  # fmt: skip
        return jnp.sum(logprobs[0, 0] * scored)

    value, gradient = jax.value_and_grad(total)(params["vision"])
    exact = hf_oracle.exact(reference)
    patches, grid = hf_oracle.pixel_values(images)
    tokens = torch.tensor(ids)[None]
    out = exact(input_ids=tokens, attention_mask=torch.ones_like(tokens), pixel_values=patches, image_grid_thw=grid,
                mm_token_type_ids=(tokens == IMAGE).int(), use_cache=False)  # fmt: skip
    logprobs = torch.log_softmax(out.logits[0, p - 1 : -1], -1).gather(1, tokens[0, p:, None])[:, 0]
    expected = (logprobs * torch.tensor(scored)).sum()
    expected.backward()
    terms = hf_oracle.terms(reference)
    assert_rounded(np.asarray(value), expected.item(), terms, scale=expected.item() * np.ones(1))
    theirs = dict(exact.model.visual.named_parameters())
    for ours, name in (
        (gradient["position"][...], "pos_embed.weight"),
        (gradient["patch_embed_bias"][...], "patch_embed.proj.bias"),
        (gradient["deep"]["fc1"][...][0].T, "deepstack_merger_list.0.linear_fc1.weight"),
        (gradient["deep"]["norm"][...][1], "deepstack_merger_list.1.norm.weight"),
        (gradient["blocks"]["qkv"][...][1].T, "blocks.1.attn.qkv.weight"),
        (gradient["merge_fc2"][...].T, "merger.linear_fc2.weight"),
    ):
        reference_gradient = theirs[name].grad.numpy()
        assert_rounded(np.asarray(ours), reference_gradient, 10 * terms, scale=reference_gradient, note=name)
        assert np.abs(reference_gradient).max() > 1e-3
