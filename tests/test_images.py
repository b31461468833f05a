"""Images are prepared exactly as transformers' own Qwen2-VL processor prepares them."""

import json
import math

import numpy as np
import pytest
from PIL import Image
from rounding import assert_rounded
from transformers.models.qwen2_vl import image_processing_pil_qwen2_vl as reference

from imagent_jax.images.prepare import (
    PreparedImage,
    first_fit,
    fit_budget,
    image_settings,
    pack_images,
    patch_coords,
    prepare_image,
    smart_resize,
)  # fmt: skip
from imagent_jax.model.config import VisionConfig
from imagent_jax.model.vision import normalise

BUDGET = {"min_pixels": 3136, "max_pixels": 12544}
PATCHES = {"patch_size": 14, "merge_size": 2}


def noise(size, seed=0, channels=3):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, channels), dtype=np.uint8))


def assert_equal_to_reference(image, **settings):
    settings = BUDGET | settings
    theirs = reference.Qwen2VLImageProcessorPil(**settings)([image])
    frames = settings.pop("temporal_patch_size", 2)
    ours = prepare_image(image, **PATCHES | settings)
    assert theirs["image_grid_thw"].tolist() == [[1, *ours.grid]]
    assert_normalised(ours, theirs, temporal_patch_size=frames)
    return ours


def assert_normalised(ours, theirs, **settings):
    """The bytes are the reference's to the last; normalised they differ from it by rounding only."""
    cfg = VisionConfig(depth=1, embed_dim=8, hidden_size=8, intermediate_size=8, num_heads=1, **settings)
    assert ours.patches.dtype == np.uint8 and ours.patches.shape[1] * cfg.temporal_patch_size == theirs["pixel_values"].shape[1]
    assert_rounded(normalise(cfg, ours.patches), theirs["pixel_values"], 4)


SIZES = [(28, 28), (56, 56), (84, 112), (1, 1), (3, 200), (500, 7), (77, 133), (133, 77), (301, 299), (1023, 769)]


@pytest.mark.parametrize("size", SIZES)
def test_patches_equal_the_reference(size):
    assert_equal_to_reference(noise(size))


def test_every_pixel_value_is_normalised_as_the_reference_does():
    ramp = np.stack([np.arange(3136, dtype=np.uint32).reshape(56, 56) % 256] * 3, -1).astype(np.uint8)
    assert assert_equal_to_reference(Image.fromarray(ramp)).size == (56, 56)


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "1", "CMYK"])
def test_other_colour_modes_equal_the_reference(mode):
    image = noise((61, 90), channels=4) if mode == "RGBA" else noise((61, 90)).convert(mode)
    assert image.mode == mode
    assert_equal_to_reference(image)


@pytest.mark.parametrize(
    "settings",
    [
        {"patch_size": 16},
        {"patch_size": 4},
        {"temporal_patch_size": 1},
        {"merge_size": 1},
        {"min_pixels": 50000, "max_pixels": 60000},
        {"min_pixels": 784, "max_pixels": 784},
    ],
)
def test_other_geometries_equal_the_reference(settings):
    assert_equal_to_reference(noise((61, 149)), **settings)


def test_other_means_and_deviations_equal_the_reference():
    mean, std = (0.5, 0.25, 0.1), (0.5, 0.3, 0.7)
    theirs = reference.Qwen2VLImageProcessorPil(image_mean=mean, image_std=std, **BUDGET)([noise((61, 149))])
    assert_normalised(prepare_image(noise((61, 149)), **BUDGET | PATCHES), theirs, image_mean=mean, image_std=std)


def test_smart_resize_equals_the_reference_on_random_sizes_and_budgets():
    rng = np.random.default_rng(0)
    for _ in range(3000):
        h, w = (int(side) for side in np.exp(rng.uniform(0, 8, 2)))
        low = int(rng.integers(1, 8000))
        args = (int(rng.choice([8, 28, 32])), low, low + int(rng.integers(0, 10**6)))
        if max(h, w) / min(h, w) <= 200:
            assert smart_resize(h, w, *args) == reference.smart_resize(h, w, *args)


def test_a_budget_is_lowered_only_where_the_reference_goes_beyond_what_a_block_holds():
    def eighths(low, high):
        while True:
            yield min(low, high), high
            high = high * 7 // 8

    rng, lowered = np.random.default_rng(1), 0
    for _ in range(3000):
        size = tuple(int(side) for side in np.exp(rng.uniform(0, 8, 2)))
        low = int(rng.integers(1, 20_000))
        high = low + int(rng.integers(0, 20_000))
        most = high + int(rng.integers(0, 2000))
        if max(size) / min(size) <= 200:
            shown, *budget = fit_budget(size, 28, low, high, most)
            sizes = ((reference.smart_resize(*size, 28, *asked), *asked) for asked in eighths(low, high))
            assert (shown, *budget) == next(found for found in sizes if math.prod(found[0]) <= max(most, 28 * 28))
            lowered += budget != [low, high]
    assert lowered == 642


def test_a_block_of_just_an_images_size_holds_it():
    """At 28 x 28 pixels, the least an image is shown at, and at exactly the most."""
    assert fit_budget((28, 28), 28, 1, 784, 100) == ((28, 28), 1, 784)
    assert fit_budget((56, 84), 28, 1, 4704, 4704) == ((56, 84), 1, 4704)
    assert fit_budget((56, 84), 28, 1, 4704, 4703) == ((28, 56), 1, 4116)


@pytest.mark.parametrize("size", [(201, 1), (1, 201), (0, 5)])
def test_a_side_more_than_200_times_the_other_is_refused(size):
    with pytest.raises(ValueError, match="at most 200 times the shorter"):
        smart_resize(*size)


def test_patch_coords_name_where_each_patch_was_cut():
    pixels = np.zeros((3 * 56, 2 * 56, 3), np.uint8)
    rows, columns = np.indices(pixels.shape[:2])
    pixels[..., 0], pixels[..., 1] = rows // 14, columns // 14
    image = prepare_image(Image.fromarray(pixels), min_pixels=1, max_pixels=10**6, patch_size=14, merge_size=2)
    patches = image.patches.reshape(len(image.patches), 3, -1)
    np.testing.assert_array_equal(patch_coords(image.grid, 2), patches[:, :2, 0])
    assert patch_coords((2, 4), 2).tolist() == [[0, 0], [0, 1], [1, 0], [1, 1], [0, 2], [0, 3], [1, 2], [1, 3]]


def blank(grid):
    return PreparedImage(np.full((grid[0] * grid[1], 6), grid[0] * 10 + grid[1], np.uint8), grid, (0, 0))


def pack(grids, block, n_blocks, merge=2):
    images = [[blank(grid) for grid in one] for one in grids]
    return pack_images(images, block, n_blocks, merge=merge, patch_bytes=6)


def test_images_stand_in_the_blocks_they_are_assigned_to_and_pads_are_marked():
    grids = [[(2, 4)], [(4, 4), (2, 2)], [(2, 6)]]
    patches, coords, image_id, first = pack(grids, block=20, n_blocks=4)
    assert first == [0, 20, 36, 40]
    assert patches.shape == (80, 6) and coords.shape == (80, 2)
    for number, (grid, row) in enumerate(zip([grid for one in grids for grid in one], first, strict=True)):
        image = blank(grid)
        rows = slice(row, row + len(image.patches))
        assert (image_id[rows] == number).all()
        np.testing.assert_array_equal(patches[rows], image.patches)
        np.testing.assert_array_equal(coords[rows], patch_coords(grid, 2))
    assert (image_id == -1).sum() == 80 - 8 - 16 - 4 - 12 and not patches[image_id == -1].any()


def test_no_images_give_a_pack_of_padding():
    patches, _, image_id, first = pack([], block=16, n_blocks=2)
    assert first == [] and (image_id == -1).all() and len(image_id) == 32 and patches.shape == (32, 6)


def test_images_that_just_fill_their_blocks_fit():
    _, coords, image_id, first = pack([[(4, 4)], [(2, 4), (4, 2)]], block=16, n_blocks=2)
    assert first == [0, 16, 24] and image_id.tolist() == [0] * 16 + [1] * 8 + [2] * 8
    _, coords, _, _ = pack([[(2, 3)]], block=6, n_blocks=1, merge=1)
    assert coords.tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]]


def test_images_are_assigned_to_the_first_block_with_room_largest_first():
    rng = np.random.default_rng(0)
    assert first_fit([4, 8, 4, 2, 6], 10) == [[1, 3], [4, 0], [2]] and first_fit([], 10) == []
    for _ in range(50):
        counts = rng.integers(1, 17, rng.integers(1, 30)).tolist()
        blocks = first_fit(counts, 16)
        assert sorted(i for one in blocks for i in one) == list(range(len(counts)))
        loads = [sum(counts[i] for i in one) for one in blocks]
        assert max(loads) <= 16
        for at, i in ((at, i) for at, one in enumerate(blocks) for i in one):
            for earlier in blocks[:at]:  # none of them had room when image i came
                before = [counts[j] for j in earlier if (-counts[j], j) < (-counts[i], i)]
                assert sum(before) + counts[i] > 16
    with pytest.raises(ValueError, match="An image of 17 patches does not fit images.vision_block=16; raise it, or lower"):
        first_fit([3, 17], 16)


def test_image_settings_are_those_of_the_older_file_then_of_the_newer(tmp_path):
    assert image_settings(tmp_path, {"patch_size": 1}) == {"patch_size": 1}
    (tmp_path / "processor_config.json").write_text(json.dumps({"processor_class": "Qwen2VLProcessor"}))
    assert image_settings(tmp_path, {}) == {}
    with pytest.raises(ValueError, match="holds no preprocessor_config.json"):
        image_settings(tmp_path)
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": {"patch_size": 2}}))
    assert image_settings(tmp_path) == {"patch_size": 2}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"patch_size": 3}))
    assert image_settings(tmp_path, {}) == {"patch_size": 3}


def test_more_blocks_than_a_pack_has_are_refused():
    with pytest.raises(ValueError, match="3 images need 3 blocks of 16 patches; there are 2."):
        pack([[(4, 4)], [(4, 4)], [(2, 2)]], block=16, n_blocks=2)
