"""The store of encoded images: each image once, counts, packs, and its gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imagent_jax.images.prepare import PreparedImage
from imagent_jax.model.features import FeatureStore


def test_the_vision_tower_runs_once_per_distinct_image(parts, rollout, tasks):
    given = sum(len(task.images) for task in tasks)
    crops = sum(len(t.images) - len(t.task.images) for group in rollout.trajectories for t in group)
    assert given < rollout.store.encoded <= given + crops
    store = FeatureStore(parts.model, parts.params, 4)
    images = rollout.prompts[0].images
    first = store.add(images)
    assert store.add(images[::-1]) == first[::-1] and store.encoded == len(images) and store.shown == 2 * len(images)


def test_the_store_keeps_every_image_once_and_counts_and_grows(parts):
    """Blocks of 96 patches, 24 rows: the largest image first, each in the first block with room."""
    rng, model, params = np.random.default_rng(0), parts.model, parts.params

    def picture(h, w):
        return PreparedImage(rng.integers(0, 256, (h * w, model.cfg.vision.patch_bytes), np.uint8), (h, w), (14 * h, 14 * w))

    def counts(store):
        return store.encoded, store.shown, store.patches, store.packed, store.features.shape[0]

    a, b, c, d, whole = picture(6, 6), picture(6, 10), picture(4, 10), picture(6, 8), picture(8, 12)
    store = FeatureStore(model, params, 1, packs=1)
    assert store.pack == 96 and counts(store) == (0, 0, 0, 0, 24) and store.sizes == [1]
    assert store.add([a, b, a]) == [15, 0, 15] and counts(store) == (2, 3, 96, 96, 24)
    assert store.add([c, d, b]) == [24 + 12, 24, 0] and counts(store) == (4, 6, 184, 192, 48)
    turned = b._replace(grid=(10, 6))  # the same bytes in another shape are another image
    assert store.add([whole, turned]) == [48, 72] and counts(store) == (6, 8, 340, 384, 96)
    assert store.add([]) == [] and store.add([a, turned]) == [15, 72] and counts(store) == (6, 10, 340, 384, 96)
    assert len(store.packs) == 4
    for image, row in ((a, 15), (b, 0), (c, 36), (d, 24), (whole, 48), (turned, 72)):
        alone, rows = FeatureStore(model, params, 1, packs=1), len(image.patches) // 4
        assert alone.add([image]) == [0]
        np.testing.assert_allclose(store.features[row : row + rows], alone.features[:rows], atol=1e-5)
    with pytest.raises(ValueError, match="An image of 100 patches does not fit images.vision_block=96; raise it"):
        store.add([picture(10, 10)])


def test_the_room_and_the_sizes_of_packs_are_those_asked_for(parts):
    store = FeatureStore(parts.model, parts.params, 6, packs=5, frozen=True)
    assert store.features.shape == (5 * 6 * 96 // 4, parts.model.cfg.text.hidden_size) and store.pack == 6 * 96
    assert store.sizes == [1, 2, 6] and store.features.dtype == parts.model.dtype
    assert FeatureStore(parts.model, parts.params, 6, packs=5).sizes == [6]
    for patches, coords, image in (store.blank(2),):
        assert patches.shape[0] == coords.shape[0] == 2 * 96 and (image == -1).all()


@pytest.mark.slow(3)
def test_the_last_packs_are_no_larger_than_what_is_left(parts):
    """Images of a block each, from 1 to 20 of them, in packs of 8, 2 and 1 blocks: one place for a block is left at most."""
    rng, block = np.random.default_rng(0), parts.model.vision_block
    pixels, grid = rng.integers(0, 256, (20, block, parts.model.cfg.vision.patch_bytes), np.uint8), (4, block // 4)
    images = [PreparedImage(one, grid, (1, 1)) for one in pixels]
    whole = FeatureStore(parts.model, parts.params, 8)
    rows = np.asarray(whole.add(images))[:, None] + np.arange(block // 4)
    for count in range(1, 21):
        store = FeatureStore(parts.model, parts.params, 8, frozen=True)
        first = np.asarray(store.add(images[:count]))[:, None] + np.arange(block // 4)
        assert store.packed // block - count in (0, 1) and len(store.packs) <= count // 8 + 3
        assert np.allclose(store.features[first], whole.features[rows[:count]], atol=1e-5)


def test_every_pack_is_encoded_again_under_other_parameters(parts, rollout):
    images = [image for prompt in rollout.prompts for image in prompt.images]
    store, other = FeatureStore(parts.model, parts.params, 1, packs=2), jax.tree.map(lambda x: x * 1.01, parts.params)
    fresh = FeatureStore(parts.model, other, 1, packs=2)
    assert store.add(images) == fresh.add(images) and len(store.packs) > 2
    again = store.encode_again(other)
    np.testing.assert_allclose(again, fresh.features, atol=1e-5)
    assert np.abs(again - store.features).max() > 1e-2


def test_feature_rows_survive_encoding_under_other_parameters(parts, rollout):
    again = rollout.store.encode_again(parts.params)
    rows = rollout.store.packed // 4
    assert np.allclose(again[:rows], rollout.store.features[:rows], atol=1e-6)


@pytest.mark.slow(10)
def test_the_tower_gradient_through_the_store_equals_autodiff(parts, rollout):
    store = FeatureStore(parts.model, parts.params, 1, packs=4)
    store.add([image for prompt in rollout.prompts[:2] for image in prompt.images])
    cotangent = jax.random.normal(jax.random.key(0), store.features.shape)
    ours = store.gradient(parts.params, cotangent)

    @jax.jit
    def whole(params):
        from imagent_jax.model.vlm import encode_images

        features = jnp.concatenate([encode_images(parts.model, params, *map(jnp.asarray, pack)) for pack in store.packs])
        return jnp.sum(features * cotangent[: store.packed // 4])

    assert len(store.packs) == 2
    expected = jax.grad(whole)(parts.params)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected["vision"]), strict=True):
        assert np.allclose(a, b, atol=1e-4)
