"""The model equals transformers' Qwen2-VL and Qwen2.5-VL: logits, vision features, greedy text, with images before and after
it starts."""

from functools import partial
from typing import NamedTuple

import hf_oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hf_oracle import BUDGET, IMAGE, MERGE, ODD_SIZES, PATCH, VOCAB, interleave, random_image, tiny_model
from PIL import Image

from imagent_jax.model import checkpoint
from imagent_jax.model.images import pack_images, prepare_image
from imagent_jax.model.positions import mrope_positions
from imagent_jax.model.qwen2_vl import embed, empty_cache, encode_images, extend, prefill, response_logprobs
from imagent_jax.model.text import ResponseCache
from imagent_jax.rl import sampler

BLOCK, BLOCKS, WIDTH = 100, 12, 96  # patches a block, blocks a pack, padded prompt length
SHAPES = {
    "mha-untied": (4, 4, False), "gqa2-tied": (4, 2, True), "gqa6-untied": (6, 1, False),
    "2.5-gqa2-tied": (4, 2, True, 0, "qwen2_5_vl"), "2.5-gqa6-untied": (6, 1, False, 0, "qwen2_5_vl"),
}  # fmt: skip


@pytest.fixture(scope="module", params=SHAPES, ids=list(SHAPES))
def pair(request, tmp_path_factory):
    """transformers' model, and ours loaded from its checkpoint."""
    reference = tiny_model(*SHAPES[request.param])
    folder = hf_oracle.save_checkpoint(reference, tmp_path_factory.mktemp("checkpoint"))
    return reference, *checkpoint.load(folder, vision_block=BLOCK)


class Batch(NamedTuple):
    """Right-padded samples as our model takes them."""

    ids: np.ndarray  # [N P]
    positions: np.ndarray  # [3 N P]
    vision: np.ndarray  # [N P]
    length: np.ndarray  # [N]
    following: np.ndarray  # [N] next position


def prepare(image: Image.Image):
    return prepare_image(image, patch_size=PATCH, merge_size=MERGE, **BUDGET)


def pack(images):
    """Packed patches of `images` and the feature row each begins at."""
    patches, coords, image_id, first = pack_images([prepare(image) for image in images], BLOCK, BLOCKS)
    if not images:
        patches = np.zeros((BLOCK * BLOCKS, 3 * PATCH**2), np.uint8)
    return (patches, coords, image_id), [row // MERGE**2 for row in first]


def batch(samples, first, width=WIDTH, start=None) -> Batch:
    """(ids, images) samples; `first` gives the feature rows of all images in order, `start` the first position of each."""
    n, at = len(samples), iter(first)
    out = Batch(np.zeros((n, width), np.int32), np.zeros((3, n, width), np.int32), np.full((n, width), -1, np.int32),
                np.zeros(n, np.int32), np.zeros(n, np.int32))  # fmt: skip
    for b, (ids, images) in enumerate(samples):
        s, grids = len(ids), [prepare(image).grid for image in images]
        out.ids[b, :s], out.length[b] = ids, s
        begin = 0 if start is None else int(start[b])
        out.positions[:, b, :s], out.following[b] = mrope_positions(np.asarray(ids), IMAGE, grids, MERGE, begin)
        rows = [next(at) + np.arange(h * w // MERGE**2) for h, w in grids]
        out.vision[b, :s][np.asarray(ids) == IMAGE] = np.concatenate(rows) if rows else []
    return out


@partial(jax.jit, static_argnums=0)
def all_logits(model, params, packed, ids, positions, vision):
    text = model.bind(params).text
    hidden, _ = text.prefill(embed(model, params, ids, vision, encode_images(model, params, *packed)), positions)
    return hidden @ text.head(model.dtype)


def samples_of(name: str):
    """The inputs of the parity tests: lists of (ids, images)."""
    rng = np.random.default_rng(sum(map(ord, name)))
    wide, tall, square = (random_image(rng, size) for size in ODD_SIZES)

    def text(n):
        return rng.integers(1, 100, n).tolist()

    def sample(*parts):
        return interleave(parts), [part for part in parts if isinstance(part, Image.Image)]

    return {
        "no image": [sample(text(40))],
        "one image": [sample(text(5), wide, text(9))],
        "three images": [sample(text(3), wide, tall, square, text(7))],
        "images between texts": [sample(text(4), tall, text(6), wide, text(2), square, text(11))],
        "image first": [sample(tall, text(8))],
        "unequal lengths": [
            sample(text(3), wide, text(4), tall, text(5)), sample(text(30)), sample(square, text(2)), sample(text(1)),
        ],
    }[name]  # fmt: skip


CASES = ["no image", "one image", "three images", "images between texts", "image first", "unequal lengths"]


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_the_reference(pair, case):
    reference, model, params = pair
    samples = samples_of(case)
    theirs, mask = hf_oracle.logits(reference, samples)
    packed, first = pack([image for _, images in samples for image in images])
    b = batch(samples + [([1], [])] * (4 - len(samples)), first)
    ours = np.asarray(all_logits(model, params, packed, b.ids, b.positions, b.vision))[: len(samples), : mask.shape[1]]
    difference = np.abs(ours - theirs)[mask].max()
    assert difference <= 1e-4 and theirs[mask].std() > 0.5
    np.testing.assert_array_equal(ours[mask].argmax(-1), theirs[mask].argmax(-1))


def test_vision_features_equal_the_reference_wherever_an_image_lies_in_the_pack(pair):
    reference, model, params = pair
    rng = np.random.default_rng(3)
    images = [random_image(rng, size) for size in (*ODD_SIZES, (8, 8), (200, 9), (40, 40), (33, 70))]
    theirs = hf_oracle.vision_features(reference, images)
    encode = jax.jit(encode_images, static_argnums=0)
    for order in (range(len(images)), reversed(range(len(images)))):
        order = list(order)
        packed, first = pack([images[i] for i in order])
        ours = np.asarray(encode(model, params, *packed))
        at = 0
        for i, image in enumerate(images):
            n = len(prepare(image).patches) // MERGE**2
            row = first[order.index(i)]
            difference = np.abs(ours[row : row + n] - theirs[at : at + n]).max()
            assert difference <= 1e-4, (i, difference)
            at += n
    assert theirs.std() > 0.5


def test_padding_of_the_pack_cannot_reach_an_image(pair):
    _, model, params = pair
    (patches, coords, image_id), first = pack([random_image(np.random.default_rng(4), (40, 33))])
    n = int((image_id == 0).sum()) // MERGE**2
    encode = jax.jit(encode_images, static_argnums=0)
    clean = np.asarray(encode(model, params, patches, coords, image_id))[first[0] : first[0] + n]
    patches[image_id < 0], coords[image_id < 0] = 255, 77
    dirty = np.asarray(encode(model, params, patches, coords, image_id))[first[0] : first[0] + n]
    np.testing.assert_array_equal(clean, dirty)


def test_a_response_split_from_its_prompt_anywhere_has_the_references_logprobs(pair):
    reference, model, params = pair
    rng = np.random.default_rng(5)
    wide, tall, square = (random_image(rng, size) for size in ODD_SIZES)
    prompts = [(interleave([[1, 2, 3], wide, [4]]), [wide]), (interleave([[9, 8, 7, 6, 5]]), [])]
    replies = [
        [(interleave([[5, 6], tall, [7, 8, 9]]), [tall]), ([11, 12, 13], [])],
        [(interleave([[1, 2], square, [3], wide, [4, 5]]), [square, wide]), ([40], [])],
    ]
    whole = [
        (prompt + reply, shown + images)
        for (prompt, shown), group in zip(prompts, replies, strict=True)
        for reply, images in group
    ]
    theirs, _ = hf_oracle.logits(reference, whole)
    theirs = np.asarray(jax.nn.log_softmax(theirs.astype(np.float64), axis=-1))
    packed, first = pack([wide, tall, square, wide])
    p = batch(prompts, first[:1], 64)
    flat = [reply for group in replies for reply in group]
    r = batch(flat, [first[1], first[2], first[3]], 48, np.repeat(p.following, 2))
    features = jax.jit(encode_images, static_argnums=0)(model, params, *packed)

    def grouped(x):
        return x.reshape(2, 2, -1)

    ours, _ = jax.jit(response_logprobs, static_argnums=0)(
        model, params, p.ids, p.positions, p.vision, p.length, grouped(r.ids), r.positions.reshape(3, 2, 2, -1),
        grouped(r.vision), features,
    )  # fmt: skip
    worst = 0.0
    for b, (reply, _) in enumerate(flat):
        begin = p.length[b // 2]
        expected = theirs[b, begin - 1 + np.arange(len(reply)), reply]
        worst = max(worst, np.abs(np.asarray(ours)[b // 2, b % 2, : len(reply)] - expected).max())
    assert worst <= 1e-4


# ---- generation -----------------------------------------------------------------------------------------------------

NEVER = np.full((1, sampler.STOP_WIDTH), VOCAB + 1, np.int32)
ROWS = 3  # rollouts of a group


def generation():
    """Two prompts, and what is shown to each of their 3 rollouts midway (None: nothing)."""
    rng = np.random.default_rng(9)
    wide, tall, square = (random_image(rng, size) for size in ODD_SIZES)
    prompts = [(interleave([[1, 2, 3], wide, [4, 5]]), [wide]), (interleave([[9, 8], tall, [7], square, [6]]), [tall, square])]
    shown = [
        ([14, 15], tall, [16]), None, ([17], square, [18, 19], wide, [20]),
        None, ([21, 22, 23, 24, 25],), ([26], random_image(rng, (33, 31)), [27]),
    ]  # fmt: skip
    return prompts, shown


def started(model, params, prompts, images):
    packed, first = pack(images)
    features = jax.jit(encode_images, static_argnums=0)(model, params, *packed)
    count = sum(len(shown) for _, shown in prompts)
    p = batch(prompts, first[:count], 64)
    slots = np.arange(len(prompts))
    state = sampler.admit(
        model, params, sampler.empty(model, len(prompts), ROWS, 64, 192), slots, p.ids, p.positions, p.vision, p.length,
        p.following, slots, 0, features,
    )  # fmt: skip
    return state, p, features, first[count:]


def decode(model, params, state, steps, rows=None):
    return sampler.decode(model, True, state.ids.shape[1], params, state, rows, NEVER, 1.0, steps)


def test_greedy_generation_equals_the_reference_for_64_tokens(pair):
    reference, model, params = pair
    prompts, _ = generation()
    theirs = hf_oracle.greedy(reference, prompts, 64)
    state, _, _, _ = started(model, params, prompts, [image for _, shown in prompts for image in shown])
    for steps, rows in ((1, None), (40, np.asarray([4, 1, 6])), (40, np.asarray([0, 2, 3, 5])), (23, None)):
        state = decode(model, params, state, steps, rows)  # all rows, or some of them apart from the others (6: none)
    assert np.asarray(state.length).tolist() == [64] * 6
    for b, ids in enumerate(np.asarray(state.ids)):
        assert ids[:64].tolist() == theirs[b // ROWS]
    assert all(len(set(row)) >= 8 for row in theirs)


def test_greedy_generation_equals_the_reference_after_images_shown_midway(pair):
    reference, model, params = pair
    prompts, shown = generation()
    later = [part for parts in shown if parts for part in parts if isinstance(part, Image.Image)]
    images = [image for _, shown_first in prompts for image in shown_first] + later
    state, p, features, first = started(model, params, prompts, images)
    state = decode(model, params, state, 20)
    middle = np.asarray(state.ids)[:, :20]

    shown_ids = [interleave(parts) if parts else [] for parts in shown]
    shown_images = [[x for x in parts if isinstance(x, Image.Image)] if parts else [] for parts in shown]
    chunk, width = 16, 80
    o = batch(list(zip(shown_ids, shown_images, strict=True)), first, width, np.asarray(state.position))
    for begin in range(0, max(o.length), chunk):
        count = np.clip(o.length - begin, 0, chunk)
        part = slice(begin, begin + chunk)
        state = sampler.observe(
            model, params, state, np.arange(6), o.ids[:, part], o.positions[:, :, part], o.vision[:, part], count,
            (count > 0) & (begin + chunk >= o.length), features,
        )  # fmt: skip
    state = decode(model, params, state, 64)

    beginnings = [
        (prompts[b // ROWS][0] + middle[b].tolist() + shown_ids[b], prompts[b // ROWS][1] + shown_images[b]) for b in range(6)
    ]
    theirs = hf_oracle.greedy(reference, beginnings, 64)
    ids, length = np.asarray(state.ids), np.asarray(state.length)
    assert length.tolist() == [84 + len(extra) for extra in shown_ids]
    for b in range(6):
        assert ids[b, 20 : 20 + len(shown_ids[b])].tolist() == shown_ids[b]
        assert ids[b, length[b] - 64 : length[b]].tolist() == theirs[b], b
    assert theirs[0] != theirs[1] != theirs[2] and theirs[3] != theirs[4] != theirs[5]


def test_garbage_in_unused_cache_and_padding_changes_nothing(pair):
    """Pads of the prompt and the unwritten part of the response cache are poisoned; logits stay the same bits."""
    _, model, params = pair
    prompts, _ = generation()
    packed, first = pack([image for _, shown in prompts for image in shown])
    features = jax.jit(encode_images, static_argnums=0)(model, params, *packed)
    p = batch(prompts, first, 64)
    pad = np.arange(64) >= p.length[:, None]
    outs = []
    for poison in (0, 1e4):
        ids = np.where(pad, 99 if poison else 0, p.ids)
        positions = np.where(pad, 500 if poison else 0, p.positions)
        logits, cache = jax.jit(prefill, static_argnums=0)(
            model, params, ids, positions, p.vision, p.length, features
        )
        empty = jax.tree.map(lambda x, poison=poison: jnp.full_like(x, float(poison)), empty_cache(model, ResponseCache, 2, 32))
        start, count = np.zeros(2, np.int32), np.full(2, 4, np.int32)
        place = (np.arange(4) + p.following[:, None]).astype(np.int32)
        more, _ = jax.jit(extend, static_argnums=0)(
            model, params, np.full((2, 4), 5, np.int32), np.stack([place] * 3), np.full((2, 4), -1, np.int32), count, start,
            cache, p.length, empty, features,
        )  # fmt: skip
        outs.append((np.asarray(logits), np.asarray(more)))
    np.testing.assert_array_equal(outs[0], outs[1])


def test_the_tower_reads_where_a_patch_lies(pair):
    """The parity above would fail if patch coordinates were ignored."""
    _, model, params = pair
    (patches, coords, image_id), first = pack([random_image(np.random.default_rng(4), (40, 33))])
    encode = jax.jit(encode_images, static_argnums=0)
    right = np.asarray(encode(model, params, patches, coords, image_id))
    wrong = np.asarray(encode(model, params, patches, coords[:, ::-1], image_id))
    assert np.abs(right - wrong)[first[0]].max() > 1e-2
