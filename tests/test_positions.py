"""M-RoPE positions equal those transformers computes, in one piece or continued turn by turn."""

import hf_oracle
import numpy as np
import pytest
from hf_oracle import IMAGE, VISION_END, VISION_START

from imagent_jax.model.positions import mrope_positions


@pytest.fixture(scope="module", params=["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def model(request):
    """Qwen2.5-VL counts a video's time in seconds; an image is one moment, whatever `tokens_per_second` says."""
    extra = {"tokens_per_second": 25} if request.param == "qwen2_5_vl" else {}
    return hf_oracle.tiny_model(family=request.param, **extra)


def sample(rng, images: int, leading: bool = True):
    """Ids and grids of random texts with images between them."""
    ids, grids = rng.integers(1, 100, rng.integers(1, 9)).tolist() if leading else [], []
    for _ in range(images):
        h, w = 2 * rng.integers(1, 9, 2)
        grids.append((int(h), int(w)))
        ids += [VISION_START, *[IMAGE] * (h * w // 4), VISION_END, *rng.integers(1, 100, rng.integers(0, 6)).tolist()]
    return ids, grids


@pytest.mark.parametrize("images", [0, 1, 2, 3, 5])
def test_positions_equal_the_reference(model, images):
    rng = np.random.default_rng(images)
    for leading in (True, False) if images else (True,):
        ids, grids = sample(rng, images, leading)
        ours, following = mrope_positions(np.asarray(ids), IMAGE, grids, 2)
        theirs = hf_oracle.positions(model, ids, grids)
        np.testing.assert_array_equal(ours, theirs)
        assert following == theirs.max() + 1 and ours.dtype == np.int32 and ours.shape == (3, len(ids))


def test_text_counts_up_and_an_image_spreads_over_its_grid():
    positions, following = mrope_positions(np.array([5, IMAGE, IMAGE, IMAGE, IMAGE, IMAGE, IMAGE, 6]), IMAGE, [(4, 6)], 2)
    assert positions.tolist() == [[0, 1, 1, 1, 1, 1, 1, 4], [0, 1, 1, 1, 2, 2, 2, 4], [0, 1, 2, 3, 1, 2, 3, 4]]
    assert following == 5


def test_turns_encoded_one_by_one_continue_the_positions_of_the_whole(model):
    rng = np.random.default_rng(7)
    ids, grids, parts, following = [], [], [], 0
    for images in (2, 0, 1, 3):
        turn, turn_grids = sample(rng, images)
        positions, following = mrope_positions(np.asarray(turn), IMAGE, turn_grids, 2, start=following)
        parts.append(positions)
        ids, grids = ids + turn, grids + turn_grids
    np.testing.assert_array_equal(np.concatenate(parts, 1), hf_oracle.positions(model, ids, grids))


def test_two_images_without_text_between_them_are_told_apart():
    positions, following = mrope_positions(np.full(8, IMAGE), IMAGE, [(2, 4), (4, 6)], 2)
    assert positions[0].tolist() == [0, 0, 2, 2, 2, 2, 2, 2] and following == 5


def test_an_empty_sequence_has_no_positions():
    positions, following = mrope_positions(np.array([], np.int32), IMAGE, [], 2, start=9)
    assert positions.shape == (3, 0) and following == 9


@pytest.mark.parametrize("grids", [[], [(2, 2)], [(2, 4), (2, 2)]])
def test_placeholders_that_do_not_match_the_images_are_refused(grids):
    with pytest.raises(ValueError, match=f"2 image placeholders in the text, but {len(grids)} images need"):
        mrope_positions(np.array([1, IMAGE, IMAGE, 2]), IMAGE, grids, 2)


def test_an_image_whose_placeholders_are_torn_apart_is_refused():
    with pytest.raises(ValueError, match="do not stand together"):
        mrope_positions(np.array([IMAGE, 1, IMAGE]), IMAGE, [(2, 4)], 2)
