"""The model equals transformers' Qwen2-VL and Qwen2.5-VL: logits, vision features, greedy text, with images before and after
it starts."""

import copy
from functools import partial
from typing import NamedTuple

import hf_oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from hf_oracle import BUDGET, IMAGE, MERGE, ODD_SIZES, PATCH, VOCAB, interleave, random_image, tiny_model
from PIL import Image
from rounding import assert_rounded, rounding

from imagent_jax.images.prepare import prepare_image
from imagent_jax.model import attention as seam
from imagent_jax.model import checkpoint
from imagent_jax.model.attention import Causal, Packed
from imagent_jax.model.families import read_config
from imagent_jax.model.positions import mrope_positions
from imagent_jax.model.text import PromptCache, ResponseCache
from imagent_jax.model.vlm import (
    abstract,
    at_tokens,
    attention_by_source,
    create,
    deep_features,
    embed,
    empty_cache,
    encode_images,
    extend,
    prefill,
    response_logprobs,
    token_logprobs,
)  # fmt: skip
from imagent_jax.rollout import sampler

BLOCK, BLOCKS, WIDTH = 100, 12, 96  # patches a block, blocks a pack, padded prompt length
SHAPES = {
    "mha-untied": (4, 4, False), "gqa2-tied": (4, 2, True), "gqa6-untied": (6, 1, False),
    "2.5-gqa2-tied": (4, 2, True, 0, "qwen2_5_vl"), "2.5-gqa6-untied": (6, 1, False, 0, "qwen2_5_vl"),
    "3-gqa2-tied": (4, 2, True, 7, "qwen3_vl"), "3-gqa6-untied": (6, 1, False, 3, "qwen3_vl"),
}  # fmt: skip


@pytest.fixture(scope="module", params=SHAPES, ids=list(SHAPES))
def pair(request, tmp_path_factory):
    """transformers' model in float64, and ours in float32 loaded from its checkpoint."""
    reference = tiny_model(*SHAPES[request.param])
    folder = hf_oracle.save_checkpoint(reference, tmp_path_factory.mktemp("checkpoint"))
    return hf_oracle.exact(reference), *checkpoint.load(folder, vision_block=BLOCK)


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
    patches, coords, image_id, first = hf_oracle.packed_in_order([prepare(image) for image in images], BLOCK, BLOCKS)
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
    features = encode_images(model, params, *packed)
    shown = jax.jit(at_tokens)(features, vision)
    hidden, _ = text.prefill(embed(model, params, ids, vision, shown), positions, deep=deep_features(model, shown))
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
    assert_rounded(ours[mask], theirs[mask], hf_oracle.terms(reference, WIDTH))
    assert theirs[mask].std() > 0.5


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
            assert_rounded(ours[row : row + n], theirs[at : at + n], hf_oracle.terms(reference), scale=theirs, note=i)
            at += n
    assert theirs.std() > 0.5


def test_a_faint_input_is_normalised_as_the_reference_does(pair):
    """With patch embeddings of about 0.001 the constant in the tower's norms counts."""
    reference, model, params = pair
    images = [random_image(np.random.default_rng(3), size) for size in ODD_SIZES]
    faint = copy.deepcopy(reference)
    with torch.no_grad():
        faint.model.visual.patch_embed.proj.weight.mul_(1e-3)
    packed, first = pack(images)
    params = nnx.clone(params)
    params["vision"]["patch_embed"] = params["vision"]["patch_embed"].replace(params["vision"]["patch_embed"][...] * 1e-3)
    ours = np.asarray(jax.jit(encode_images, static_argnums=0)(model, params, *packed))
    theirs = hf_oracle.vision_features(faint, images)
    n = len(prepare(images[0]).patches) // MERGE**2
    assert_rounded(ours[first[0] : first[0] + n], theirs[:n], hf_oracle.terms(reference), scale=theirs)


def test_padding_of_the_pack_cannot_reach_an_image(pair):
    _, model, params = pair
    (patches, coords, image_id), first = pack([random_image(np.random.default_rng(4), (40, 33))])
    n = int((image_id == 0).sum()) // MERGE**2
    encode = jax.jit(encode_images, static_argnums=0)
    clean = np.asarray(encode(model, params, patches, coords, image_id))[first[0] : first[0] + n]
    patches[image_id < 0], coords[image_id < 0] = 255, 77
    dirty = np.asarray(encode(model, params, patches, coords, image_id))[first[0] : first[0] + n]
    np.testing.assert_array_equal(clean, dirty)


@pytest.mark.slow(40)
def test_a_response_split_from_its_prompt_anywhere_has_the_references_logprobs_and_entropy(pair):
    reference, model, params = pair
    temperature = 0.8
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
    theirs = torch.log_softmax(torch.from_numpy(theirs) / temperature, dim=-1).numpy()
    packed, first = pack([wide, tall, square, wide])
    p = batch(prompts, first[:1], 64)
    flat = [reply for group in replies for reply in group]
    r = batch(flat, [first[1], first[2], first[3]], 48, np.repeat(p.following, 2))
    features = jax.jit(encode_images, static_argnums=0)(model, params, *packed)

    def grouped(x):
        return x.reshape(2, 2, -1)

    ours, entropy = jax.jit(partial(response_logprobs, temperature=temperature), static_argnums=0)(
        model, params, p.ids, p.positions, p.vision, p.length, grouped(r.ids), r.positions.reshape(3, 2, 2, -1),
        grouped(r.vision), (jax.jit(at_tokens)(features, p.vision), jax.jit(at_tokens)(features, grouped(r.vision))),
    )  # fmt: skip
    for b, (reply, _) in enumerate(flat):
        begin, row, terms = p.length[b // 2], (b // 2, b % 2, slice(len(reply))), hf_oracle.terms(reference)
        expected = theirs[b, begin - 1 + np.arange(len(reply))]
        assert_rounded(ours[row], expected[np.arange(len(reply)), reply], terms, scale=expected, note=b)
        assert_rounded(entropy[row], -(np.exp(expected) * expected).sum(-1), terms, scale=expected, note=b)


# ---- generation -----------------------------------------------------------------------------------------------------

NEVER = np.zeros((1, VOCAB), np.int16)
ROWS = 3  # rollouts of a group


def ties(reference) -> float:
    """Logits so near each other might be ordered differently by rounding: no choice of the reference may be so close."""
    return 2 * rounding(6.0, hf_oracle.terms(reference, 160))


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
        p.following, slots, slots.astype(np.uint32), np.zeros(len(prompts), np.float32), jax.jit(at_tokens)(features, p.vision),
    )  # fmt: skip
    return state, p, features, first[count:]


def decode(model, params, state, steps, rows=None):
    return sampler.decode(model, state.ids.shape[1], params, state, rows, NEVER, steps)


@pytest.mark.slow(60)
def test_greedy_generation_equals_the_reference_for_64_tokens(pair):
    reference, model, params = pair
    prompts, _ = generation()
    theirs, least = hf_oracle.greedy(reference, prompts, 64)
    assert least > ties(reference)
    state, _, _, _ = started(model, params, prompts, [image for _, shown in prompts for image in shown])
    for steps, rows in ((1, None), (40, np.asarray([4, 1, 6])), (40, np.asarray([0, 2, 3, 5])), (23, None)):
        state = decode(model, params, state, steps, rows)  # all rows, or some of them apart from the others (6: none)
    assert np.asarray(state.length).tolist() == [64] * 6
    for b, ids in enumerate(np.asarray(state.ids)):
        assert ids[:64].tolist() == theirs[b // ROWS]
    assert all(len(set(row)) >= 7 for row in theirs)


@pytest.mark.slow(80)
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
        vision = o.vision[:, part]
        state = sampler.observe(
            model,
            params,
            state,
            np.arange(6),
            o.ids[:, part],
            o.positions[:, :, part],
            vision,
            count,
            jax.jit(at_tokens)(features, vision),
        )
    state = decode(model, params, state, 64)

    beginnings = [
        (prompts[b // ROWS][0] + middle[b].tolist() + shown_ids[b], prompts[b // ROWS][1] + shown_images[b]) for b in range(6)
    ]
    theirs, least = hf_oracle.greedy(reference, beginnings, 64)
    assert least > ties(reference)
    ids, length = np.asarray(state.ids), np.asarray(state.length)
    assert length.tolist() == [84 + len(extra) for extra in shown_ids]
    for b in range(6):
        assert ids[b, 20 : 20 + len(shown_ids[b])].tolist() == shown_ids[b]
        assert ids[b, length[b] - 64 : length[b]].tolist() == theirs[b], b
    assert theirs[0] != theirs[1] != theirs[2] and theirs[3] != theirs[4] != theirs[5]


@pytest.mark.slow(20)
def test_garbage_in_unused_cache_and_padding_changes_nothing(pair):
    """Pads of the prompt and the unwritten part of the response cache are poisoned; logits stay the same bits."""
    _, model, params = pair
    prompts, _ = generation()
    packed, first = pack([image for _, shown in prompts for image in shown])
    features = jax.jit(encode_images, static_argnums=0)(model, params, *packed)
    p = batch(prompts, first, 64)
    shown = jax.jit(at_tokens)(features, p.vision)
    pad = np.arange(64) >= p.length[:, None]
    outs = []
    for poison in (0, 1e4):
        ids = np.where(pad, 99 if poison else 0, p.ids)
        positions = np.where(pad, 500 if poison else 0, p.positions)
        logits, cache = jax.jit(prefill, static_argnums=0)(model, params, ids, positions, p.vision, p.length, shown)
        empty = jax.tree.map(lambda x, poison=poison: jnp.full_like(x, float(poison)), empty_cache(model, ResponseCache, 2, 32))
        start, count = np.zeros(2, np.int32), np.full(2, 4, np.int32)
        place = (np.arange(4) + p.following[:, None]).astype(np.int32)
        more, _ = jax.jit(extend, static_argnums=0)(
            model, params, np.full((2, 4), 5, np.int32), np.stack([place] * 3), np.full((2, 4), -1, np.int32), count, start,
            cache, p.length, empty, jnp.zeros((2, 4, features.shape[1])),
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


# ---- settings of `Model`, by tracing alone ----------------------------------------------------------------------------

PARENT = {"qwen2_vl": (4, 2, False), "qwen2_5_vl": (4, 2, False, 0, "qwen2_5_vl")}


def traced(family="qwen2_vl", **settings):
    """A model of shapes with `settings`, and the jaxpr and shapes that each program of it gives, by name."""
    cfg = read_config(hf_oracle.config_json(tiny_model(*PARENT[family])))
    model, params = abstract(cfg, vision_block=BLOCK, **settings)
    packed, _ = pack([])
    ints = partial(np.zeros, dtype=np.int32)

    def shown(*shape):
        return jnp.zeros((*shape, 64), model.dtype)

    prompts = ints((2, 64)), ints((3, 2, 64)), ints((2, 64)), ints(2) + 60
    replies = ints((2, 2, 48)), ints((3, 2, 2, 48)), ints((2, 2, 48))
    prompt, own = empty_cache(model, PromptCache, 2, 64), empty_cache(model, ResponseCache, 4, 48)
    tokens = ints((4, 8)), ints((3, 4, 8)), ints((4, 8)), ints(4) + 8, ints(4)
    calls = {
        encode_images: packed, prefill: (*prompts, shown(2, 64)), extend: (*tokens, prompt, prompts[3], own, shown(4, 8)),
        attention_by_source: (*prompts, shown(2, 64), np.ones((2, 64, 3), bool)),
        response_logprobs: (*prompts, *replies, (shown(2, 64), shown(2, 2, 48))),
    }  # fmt: skip
    more = {response_logprobs: {"response_len": jnp.full((2, 2), 40)}}
    return {
        function.__name__: jax.make_jaxpr(partial(function, model, **more.get(function, {})), return_shape=True)(params, *args)
        for function, args in calls.items()
    }


def equations(jaxpr, kind: str) -> list:
    """The equations of a primitive, inner programs included."""
    found = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == kind]
    inner = [x for eqn in jaxpr.eqns for value in eqn.params.values() for x in (value if isinstance(value, tuple) else (value,))]
    inner = [getattr(x, "jaxpr", x) for x in inner if hasattr(getattr(x, "jaxpr", x), "eqns")]
    return found + [eqn for one in inner for eqn in equations(one, kind)]


@pytest.mark.parametrize("family", PARENT)
def test_backend_dtype_and_lengths_reach_the_attention_of_every_program(family, monkeypatch):
    seen = []

    def spy(q, k, v, mask, shared):
        length = (mask.ids if isinstance(mask, Packed) else mask.length).shape
        seen.append((type(mask), length, None if shared is None else shared.length.shape, q.dtype.name))
        return seam._xla(q, k, v, mask, shared)

    monkeypatch.setitem(seam._BACKENDS, "spy", spy)
    programs = traced(family, attention="spy", dtype="bfloat16")
    assert set(seen) == {
        (Packed, (BLOCKS, BLOCK), None, "bfloat16"), (Causal, (2,), None, "bfloat16"), (Causal, (2, 2), (2,), "bfloat16"),
    }  # fmt: skip
    dtypes = {name: {x.dtype.name for x in jax.tree.leaves(shapes)} for name, (_, shapes) in programs.items()}
    assert dtypes == {
        "encode_images": {"bfloat16"}, "prefill": {"float32", "bfloat16"}, "extend": {"float32", "bfloat16"},
        "attention_by_source": {"float32"}, "response_logprobs": {"float32"},
    }  # fmt: skip
    assert [programs[name][1][0].dtype.name for name in ("prefill", "extend")] == ["float32"] * 2


@pytest.mark.parametrize("remat", ["none", "dots", "full", "offload"])
def test_layers_are_recomputed_as_the_model_says(remat):
    programs = {name: jaxpr.jaxpr for name, (jaxpr, _) in traced(remat=remat).items()}
    tower = equations(programs["encode_images"], "remat2") + equations(programs["encode_images"], "checkpoint")
    streams = equations(programs["response_logprobs"], "remat2") + equations(programs["response_logprobs"], "checkpoint")
    policies = [eqn.params["policy"] for eqn in streams]
    assert len(tower) == (remat != "none") and len(policies) == 1 + (remat != "none")  # a chunk of logits always is
    known = {"dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable, "full": jax.checkpoint_policies.nothing_saveable}
    if remat in known:
        assert known[remat] in policies
    elif remat == "offload":
        assert not set(known.values()) & set(policies) and sum(map(callable, policies)) == 1


def test_logits_are_made_in_chunks_of_the_models_size():
    for chunk, scans in ((40, 5), (96, 2), (2048, 1)):  # of 2 x 2 x 48 tokens
        jaxpr = traced(logprob_chunk=chunk)["response_logprobs"][0].jaxpr
        assert sorted(eqn.params["length"] for eqn in equations(jaxpr, "scan")) == sorted([3, scans])


def test_logprobs_and_entropy_have_their_closed_form_in_any_chunks():
    rng = np.random.default_rng(0)
    hidden, head = rng.normal(size=(7, 5)).astype(np.float32), rng.normal(size=(5, 11)).astype(np.float32)
    targets = rng.integers(0, 11, 7).astype(np.int32)
    scores = hidden.astype(np.float64) @ head / 0.7
    exact = scores - np.log(np.exp(scores).sum(-1, keepdims=True))
    for chunk in (1, 3, 7, 100):
        logprobs, entropy = token_logprobs(jnp.asarray(hidden), jnp.asarray(head), jnp.asarray(targets), 0.7, chunk)
        assert_rounded(logprobs, exact[np.arange(7), targets], 5 + 11, scale=exact)
        assert_rounded(entropy, -(np.exp(exact) * exact).sum(-1), 5 + 11, scale=exact)


def test_an_empty_cache_has_a_layer_of_keys_and_of_values_each():
    cfg = read_config(hf_oracle.config_json(tiny_model(*PARENT["qwen2_vl"])))
    cache = empty_cache(abstract(cfg, dtype="bfloat16")[0], PromptCache, 5, 7)
    assert [x.shape for x in cache.k] == [(5, 2, 16, 7)] * 3 and [x.shape for x in cache.v] == [(5, 2, 7, 16)] * 3
    assert all(x.dtype == jnp.bfloat16 and not x.any() for x in jax.tree.leaves(cache))


def test_blocks_that_do_not_hold_whole_patches_of_a_pack_are_refused():
    for block in (90, 50):  # does not divide the pack; no multiple of a merge unit
        with pytest.raises(ValueError, match=f"1200 patches do not fill blocks of {block}; pad the pack"):
            model, params = abstract(read_config(hf_oracle.config_json(tiny_model())), vision_block=block)
            jax.eval_shape(partial(encode_images, model), params, *pack([])[0])


def test_random_parameters_spread_by_their_number_of_inputs_and_follow_the_seed():
    cfg = read_config(hf_oracle.config_json(tiny_model(*PARENT["qwen2_5_vl"])))
    (model, params), (_, other) = create(cfg, 1, remat="full"), create(cfg, 2, jnp.bfloat16)
    assert model.remat == "full" and {x.dtype.name for x in jax.tree.leaves(other)} == {"bfloat16"}
    for path, variable in params.flat_state():
        value, name = np.asarray(variable[...]), path[-1]
        if "norm" in name or "bias" in name:
            assert (value == (0 if "bias" in name else 1)).all(), path
        else:
            inputs = cfg.text.hidden_size if name == "embed" else value.shape[-2]
            assert abs(value.std() * inputs**0.5 - 1) < 4 / (2 * value.size) ** 0.5, path  # four standard errors
    assert np.abs(other["text"]["embed"][...].astype("float32") - params["text"]["embed"][...]).mean() > 0.05
