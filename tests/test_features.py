"""The store of encoded images: each image once, counts, pages on the device and in host memory, and the tower's gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imagent_jax.images.prepare import PreparedImage
from imagent_jax.model.features import EncodedImages, FeatureStore, Pages
from imagent_jax.model.vlm import encode_images
from imagent_jax.runs.resources import CompileCounter


def pictures(model, count: int, seed: int = 0) -> list[PreparedImage]:
    """Different images of a block each."""
    block = model.vision_block
    pixels = np.random.default_rng(seed).integers(0, 256, (count, block, model.cfg.vision.patch_bytes), np.uint8)
    return [PreparedImage(one, (4, block // 4), (1, 1)) for one in pixels]


def rows_of(store: EncodedImages, rows) -> np.ndarray:
    return np.asarray(store.show(np.asarray(rows, np.int32)))


def test_the_vision_tower_runs_once_per_distinct_image(parts, rollout, tasks):
    given = sum(len(task.images) for task in tasks)
    crops = sum(len(t.images) - len(t.task.images) for group in rollout.trajectories for t in group)
    assert given < rollout.store.encoded <= given + crops
    store = FeatureStore(parts.model, parts.params, 4)
    images = rollout.prompts[0].images
    first = store.add(images)
    assert store.add(images[::-1]) == first[::-1] and store.encoded == len(images) and store.shown == 2 * len(images)


def test_the_store_keeps_every_image_once_and_counts_and_grows(parts):
    """Blocks of 96 patches, 24 rows: the largest image first, each in the first block with room; a page for every block."""
    rng, model, params = np.random.default_rng(0), parts.model, parts.params

    def picture(h, w):
        return PreparedImage(rng.integers(0, 256, (h * w, model.cfg.vision.patch_bytes), np.uint8), (h, w), (14 * h, 14 * w))

    def counts(store):
        return store.encoded, store.shown, store.patches, store.packed, len(store.pages)

    a, b, c, d, whole = picture(6, 6), picture(6, 10), picture(4, 10), picture(6, 8), picture(8, 12)
    store = FeatureStore(model, params, 1, pages=2)
    assert store.pack == 96 and store.rows == 24 and counts(store) == (0, 0, 0, 0, 1) and store.sizes == [1]
    assert store.add([a, b, a]) == [15, 0, 15] and counts(store) == (2, 3, 96, 96, 1)
    assert store.add([c, d, b]) == [24 + 12, 24, 0] and counts(store) == (4, 6, 184, 192, 2)
    turned = b._replace(grid=(10, 6))  # the same bytes in another shape are another image
    assert store.add([whole, turned]) == [48, 72] and counts(store) == (6, 8, 340, 384, 4)
    assert store.add([]) == [] and store.add([a, turned]) == [15, 72] and counts(store) == (6, 10, 340, 384, 4)
    assert len(store.packs) == 4 and (set(store.pages.device), set(store.pages.host)) == ({2, 3}, {0, 1})
    for image, row in ((a, 15), (b, 0), (c, 36), (d, 24), (whole, 48), (turned, 72)):
        alone, rows = FeatureStore(model, params, 1), np.arange(len(image.patches) // 4)
        assert alone.add([image]) == [0]
        np.testing.assert_allclose(rows_of(store, row + rows), rows_of(alone, rows), atol=1e-5)
    with pytest.raises(ValueError, match="An image of 100 patches does not fit images.vision_block=96; raise it"):
        store.add([picture(10, 10)])


def test_features_stand_at_their_tokens_whatever_page_they_are_on(parts):
    """Rows of four pages in any order and repeated, text between them; two pages have left the device."""
    store = FeatureStore(parts.model, parts.params, 1, pages=2)
    store.add(pictures(parts.model, 4))
    whole = np.concatenate([np.asarray(store.pages[page]) for page in range(4)])
    vision = np.random.default_rng(1).integers(-1, len(whole), (3, 5, 40)).astype(np.int32)
    shown = rows_of(store, vision)
    assert shown.shape == (3, 5, 40, parts.model.cfg.vision.feature_dim) and len(np.unique(vision // store.rows)) == 5
    np.testing.assert_array_equal(shown, np.where(vision[..., None] >= 0, whole[vision], 0))
    assert not rows_of(store, np.full((2, 3), -1)).any()
    assert (store.touched(np.array([-1, -1])), store.touched(np.array([80, -1, 3, 30]))) == ([0], [0, 1, 3])


def test_nothing_compiles_however_many_images_there_are(parts):
    """Shown, added to a gradient, encoded again and differentiated: the first page compiles what the twelfth needs."""
    compiled, compiles, made = [], CompileCounter(), pictures(parts.model, 12)
    with jax.set_mesh(parts.mesh):
        store = FeatureStore(parts.model, parts.params, 1, pages=2)
        for count in (1, 5, 12):
            store.add(made[:count])
            vision = np.arange(-1, 24 * count - 1, dtype=np.int32)[-24:].reshape(2, -1)  # of two pages, from the second time on
            again, total = store.encode_again(parts.params), Pages(2, store.blank)
            for images in (store, again):
                images.add_gradient(total, images.show(vision), vision)
            store.gradient(parts.params, total)
            compiled.append(compiles.count)
    assert compiled[0] > 3 and compiled[2] == compiled[1] == compiled[0] and len(store.pages.host) == 10


def test_pages_beyond_the_room_are_kept_in_host_memory_or_made_again():
    made = []

    def make(number):
        made.append(number)
        return jnp.full((2, 3), number, jnp.bfloat16)

    kept, dropped = Pages(2, make), Pages(1, make, keep=False)
    assert [float(kept[i][0, 0]) for i in (4, 7, 1, 4, 7)] == [4, 7, 1, 4, 7] and made == [4, 7, 1]
    assert (list(kept), len(kept), list(kept.device), list(kept.host)) == ([1, 4, 7], 3, [7, 1], [4])
    assert kept[4].dtype == jnp.bfloat16 and type(kept.host[4][0]) is np.ndarray
    kept[4] = kept[4] + 1
    assert float(kept[4][1, 2]) == 5 and list(kept.device) == [1, 4] and list(kept.host) == [7]
    assert [float(dropped[i][0, 0]) for i in (3, 3, 5, 3)] == [3, 3, 5, 3] and made == [4, 7, 1, 3, 5, 3] and not dropped.host


def test_the_room_and_the_sizes_of_packs_are_those_asked_for(parts):
    store = FeatureStore(parts.model, parts.params, 6, pages=5, frozen=True)
    assert store.pages.room == 5 and store.newest.shape == (6 * 96 // 4, parts.model.cfg.text.hidden_size)
    assert store.pack == 6 * 96 and store.sizes == [1, 2, 6] and store.newest.dtype == parts.model.dtype
    assert FeatureStore(parts.model, parts.params, 6).sizes == [6]
    for patches, coords, image in (store.blank_pack(2),):
        assert patches.shape[0] == coords.shape[0] == 2 * 96 and (image == -1).all()


@pytest.mark.slow(3)
def test_the_last_packs_are_no_larger_than_what_is_left(parts):
    """Images of a block each, from 1 to 20 of them, in packs of 8, 2 and 1 blocks: one place for a block is left at most, and
    small packs share pages. A frozen tower's packs are not kept."""
    images, block = pictures(parts.model, 20), parts.model.vision_block
    whole = FeatureStore(parts.model, parts.params, 8)
    rows = np.asarray(whole.add(images))[:, None] + np.arange(block // 4)
    for count in range(1, 21):
        store = FeatureStore(parts.model, parts.params, 8, frozen=True)
        first = np.asarray(store.add(images[:count]))[:, None] + np.arange(block // 4)
        assert store.packed // block - count in (0, 1) and len(store.pages) == -(-store.packed // store.pack)
        assert np.allclose(rows_of(store, first), rows_of(whole, rows[:count]), atol=1e-5) and store.packs == []


def test_every_page_is_encoded_again_under_other_parameters(parts, rollout):
    images = [image for prompt in rollout.prompts for image in prompt.images]
    store, other = FeatureStore(parts.model, parts.params, 1, pages=2), jax.tree.map(lambda x: x * 1.01, parts.params)
    fresh = FeatureStore(parts.model, other, 1, pages=2)
    assert store.add(images) == fresh.add(images) and len(store.packs) > 2
    rows = np.arange(len(store.packs) * store.rows)
    again = rows_of(store.encode_again(other), rows)
    np.testing.assert_allclose(again, rows_of(fresh, rows), atol=1e-5)
    assert np.abs(again - rows_of(store, rows)).max() > 1e-2


@pytest.mark.slow(10)
def test_the_tower_gradient_through_the_store_equals_autodiff(parts, rollout):
    """Of a loss of what is shown at the tokens of two batches, some of whose images occur twice, and one page in neither."""
    store = FeatureStore(parts.model, parts.params, 1, pages=1)
    store.add([image for prompt in rollout.prompts[:2] for image in prompt.images] + pictures(parts.model, 2))
    rng, used = np.random.default_rng(0), 24 * 3
    visions = [rng.integers(-1, used, shape).astype(np.int32) for shape in ((2, 30), (2, 2, 40))]
    gradients = [rng.normal(size=(*v.shape, parts.model.cfg.vision.feature_dim)).astype(np.float32) for v in visions]
    total = Pages(1, store.blank)
    for gradient, vision in zip(gradients, visions, strict=True):
        store.add_gradient(total, jnp.asarray(gradient), vision)
    ours = store.gradient(parts.params, total)
    assert list(total) == [0, 1, 2] and len(store.packs) == 4

    @jax.jit
    def whole(params):
        features = jnp.concatenate([encode_images(parts.model, params, *map(jnp.asarray, pack)) for pack in store.packs])
        shown = [jnp.where(v[..., None] >= 0, features[v], 0) for v in visions]
        return sum(jnp.sum(s * g) for s, g in zip(shown, gradients, strict=True))

    expected = jax.grad(whole)(parts.params)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected["vision"]), strict=True):
        assert np.allclose(a, b, atol=1e-4 * max(1, np.abs(b).max()))
