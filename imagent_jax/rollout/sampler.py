"""The jitted sampler: slots of groups, prefill, the decode loop, and observations appended to the cache.

Every function takes the whole state and returns it, updated in place. On a mesh, rows are sharded like groups, so that every
device decodes its own slots.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int, UInt32

from imagent_jax.distributed.mesh import GROUPS, constrain, fitting, per_device, shard_count
from imagent_jax.model.params import pad_to
from imagent_jax.model.text import PromptCache, ResponseCache
from imagent_jax.model.vlm import Model, empty_cache, extend, prefill, sampled_only

BLOCK = 128
"""Vocabulary tokens per block of the two-stage draw (`draw`)."""


class SamplerState(NamedTuple):
    """State of all rollouts being decoded: S slots, each a group of G rows; row b belongs to slot b // G.

    Attributes:
        ids, logprobs: append-only, sampled and observation tokens alike.
        length: tokens of a row, all of them in `cache`.
        position: next M-RoPE position.
        live: rows that are being decoded.
        match: state of the stop automaton (`stops.stop_table`); 0 where a turn begins.
        logits: logits of the next token.
        key: random key of the row.
        temperature: softmax temperature of the row (0: greedy).
        cache, prompt: keys and values of the responses and of the prompts.
        prompt_len: real prompt tokens of a slot.
    """

    ids: Int[Array, "B R"]
    logprobs: Float[Array, "B R"]
    length: Int[Array, " B"]
    position: Int[Array, " B"]
    live: Bool[Array, " B"]
    match: Int[Array, " B"]
    logits: Float[Array, "B V"]
    key: UInt32[Array, "B words"]
    temperature: Float[Array, " B"]
    cache: ResponseCache
    prompt: PromptCache
    prompt_len: Int[Array, " S"]


@partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def empty(model: Model, slots: int, group_size: int, prompt_tokens: int, response_tokens: int) -> SamplerState:
    """Return a state without rollouts."""
    rows = slots * group_size
    return _placed(
        SamplerState(
            ids=jnp.zeros((rows, response_tokens), jnp.int32),
            logprobs=jnp.zeros((rows, response_tokens), jnp.float32),
            length=jnp.zeros(rows, jnp.int32),
            position=jnp.zeros(rows, jnp.int32),
            live=jnp.zeros(rows, bool),
            match=jnp.zeros(rows, jnp.int16),
            logits=jnp.zeros((rows, model.cfg.text.vocab_size), jnp.float32),
            key=jax.random.key_data(jax.random.split(jax.random.key(0), rows)),
            temperature=jnp.ones(rows, jnp.float32),
            cache=empty_cache(model, ResponseCache, rows, response_tokens),
            prompt=empty_cache(model, PromptCache, slots, prompt_tokens),
            prompt_len=jnp.ones(slots, jnp.int32),
        )
    )


def axes(x) -> tuple:
    """Return the mesh axes of a leaf of the state: rows and slots over `GROUPS`, heads of the (4-D) caches over `tensor`."""
    return GROUPS, *("tensor",) * (x.ndim == 4)


def _placed(state: SamplerState) -> SamplerState:
    return jax.tree.map(lambda x: constrain(x, *axes(x)), state)


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def admit(
    model: Model,
    params: nnx.State,
    state: SamplerState,
    slots,
    ids,
    positions,
    vision,
    prompt_len,
    next_position,
    uids,
    seeds,
    temperature,
    shown,
) -> SamplerState:
    """Prefill A prompts, once each, into `slots` ([A]; S: none) and start their G empty responses, all live.

    A row's key depends on the seed, the uid of its task and the index of the rollout in its group.
    Shapes: ids, vision [A P]; positions [3 A P]; shown [A P E]; prompt_len, next_position, uids, seeds, temperature [A].
    """
    with jax.named_scope("admit"):
        logits, prompt = prefill(model, params, ids, positions, vision, prompt_len, shown)
        g = state.ids.shape[0] // state.prompt_len.shape[0]
        rows = (slots[:, None] * g + jnp.arange(g)).reshape(-1)

        def fold(seed, uid, rollout):
            return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), uid), rollout)

        keys = jax.vmap(jax.vmap(fold, (None, None, 0)), (0, 0, None))(seeds, uids, jnp.arange(g))
        return _placed(
            state._replace(
                length=_put(state.length, rows, 0),
                position=_put(state.position, rows, jnp.repeat(next_position, g)),
                live=_put(state.live, rows, True),
                match=_put(state.match, rows, 0),
                logits=_put(state.logits, rows, jnp.repeat(logits, g, axis=0)),
                key=_put(state.key, rows, jax.random.key_data(keys.reshape(-1))),
                temperature=_put(state.temperature, rows, jnp.repeat(temperature, g)),
                prompt=jax.tree.map(lambda kept, new: _put(kept, slots, new), state.prompt, prompt),
                prompt_len=_put(state.prompt_len, slots, prompt_len),
            )
        )


def _put(kept: Array, index: Array, new) -> Array:
    return kept.at[index].set(new, mode="drop")


def parts(slots: int) -> int:
    """Return the number of parts of the current mesh over which slots are split; rows are taken and put back within a part.

    An array of F rows holds F / parts rows of each part in turn, as indices within the part (B / parts: none).
    """
    return 1 if slots % shard_count(GROUPS) else shard_count(GROUPS)


def _within(function, state: SamplerState, *more):
    """Run `function(state, rows[, part of the state])` on every part of the mesh separately; no cache of a row is transferred."""
    if parts(len(state.prompt_len)) == 1:
        return _placed(function(state, *more))
    specs = jax.tree.map(lambda x: fitting(x, *axes(x)), state)
    return per_device(function, (specs, PartitionSpec(GROUPS), specs)[: 1 + len(more)], specs)(state, *more)


def take_rows(state: SamplerState, rows: Int[Array, " F"]) -> SamplerState:
    """Return a smaller state of some rows (see `parts`; none: a dead row).

    Each row becomes a group of one with a copy of its prompt's cache.
    """

    def take(state, rows):
        b, s = state.ids.shape[0], state.prompt_len.shape[0]
        inside = jnp.minimum(rows, b - 1)
        part = jax.tree.map(lambda x: x[inside], state._replace(prompt=(), prompt_len=()))
        prompt, prompt_len = jax.tree.map(lambda x: x[inside // (b // s)], (state.prompt, state.prompt_len))
        return part._replace(live=part.live & (rows < b), prompt=prompt, prompt_len=prompt_len)

    return _within(take, state, rows)


def put_rows(state: SamplerState, rows: Int[Array, " F"], part: SamplerState) -> SamplerState:
    """Write the rows of `part` back to their places; inverse of `take_rows`."""

    def put(state, rows, part):
        kept, new = (x._replace(prompt=(), prompt_len=()) for x in (state, part))
        whole = jax.tree.map(lambda x, y: _put(x, rows, y), kept, new)
        return whole._replace(prompt=state.prompt, prompt_len=state.prompt_len)

    return _within(put, state, rows, part)


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def decode(model: Model, width: int, params: nnx.State, state: SamplerState, rows, stops, max_steps, enough=0) -> SamplerState:
    """Sample up to `max_steps` tokens for every live row from softmax(logits / temperature).

    Ids in `model.unsampled` have no share of it. A row stops, inside the loop, when its text completes a stop string or its
    buffer is full. A token's random numbers depend on the row's key and the token's index only, not on the batch or the chunking.

    Args:
        width: only this part of the response cache is used; no response may exceed it during the call (R: no restriction).
        rows: rows to decode, [F] (see `parts`); None: all.
        stops: automaton of the stop strings, [states V] (see `stops.stop_table`).
        enough: stop as soon as no more than this many rows are live.
    """
    with jax.named_scope("decode"):
        part = state if rows is None else take_rows(state, rows)
        first = ResponseCache(tuple(k[..., :width] for k in part.cache.k), tuple(v[..., :width, :] for v in part.cache.v))
        done = _decode(model, params, part._replace(cache=first), stops, max_steps, enough)
        if width < state.ids.shape[1]:
            done = done._replace(cache=jax.tree.map(_write_first, part.cache, done.cache))
        return done if rows is None else put_rows(state, rows, done)


def _write_first(kept: Array, new: Array) -> Array:
    return jax.lax.dynamic_update_slice(kept, new, (0,) * kept.ndim)


def _decode(model, params, state, stops, max_steps, enough):
    b, r = state.ids.shape
    rows, prompt, prompt_len = jnp.arange(b), state.prompt, state.prompt_len
    keys, greedy = jax.random.wrap_key_data(state.key), state.temperature == 0
    scale = jnp.where(greedy, 1, state.temperature)[:, None]

    def step(carry):
        count, s = carry
        token, logprob = draw(sampled_only(s.logits / scale, model.unsampled), jax.vmap(_uniform)(keys, s.length), greedy)
        at = jnp.where(s.live, s.length, r)  # r: out of bounds, dropped
        ids = s.ids.at[rows, at].set(token, mode="drop")
        positions = jnp.broadcast_to(s.position[:, None], (3, b, 1))
        new_logits, cache = extend(
            model, params, token[:, None], positions, None, jnp.ones(b, jnp.int32), at, prompt, prompt_len, s.cache
        )
        length = s.length + s.live
        match = jnp.where(s.live, stops[s.match, token], s.match)
        new = s._replace(
            ids=ids,
            logprobs=s.logprobs.at[rows, at].set(logprob, mode="drop"),
            length=length,
            position=s.position + s.live,
            live=s.live & (match < len(stops)) & (length < r),
            match=match,
            logits=jnp.where(s.live[:, None], new_logits, s.logits),
            cache=cache,
        )
        return count + 1, _placed(new)

    bare = state._replace(key=(), temperature=(), prompt=(), prompt_len=())  # loop invariants stay outside the loop
    going = lambda carry: (carry[0] < max_steps) & (jnp.sum(carry[1].live) > enough)  # noqa: E731
    _, done = jax.lax.while_loop(going, step, (jnp.zeros((), jnp.int32), bare))
    return done._replace(key=state.key, temperature=state.temperature, prompt=prompt, prompt_len=prompt_len)


def _uniform(key: Array, index: Array) -> Float[Array, "2"]:
    """Return the two random numbers of a row's token `index`."""
    return jax.random.uniform(jax.random.fold_in(key, index), (2,))


def draw(
    logits: Float[Array, "B V"], uniform: Float[Array, "B 2"], greedy: Bool[Array, " B"]
) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
    """Draw a token of each row from softmax(logits), or the most likely token if `greedy`; return it and its log-probability.

    Inverse transform sampling (Devroye 1986, III.2) in two stages: the first number selects a block of tokens, the second a token
    of the block. This needs two random numbers per token; the Gumbel-max trick needs one per vocabulary entry.
    """
    peak = logits.max(-1, keepdims=True)
    blocks = pad_to(logits, 1, BLOCK, -jnp.inf).reshape(len(logits), -1, BLOCK)
    sums = jnp.exp(blocks - peak[..., None]).sum(-1)
    block = jnp.where(greedy, jnp.argmax(blocks.max(-1), axis=-1), _invert(sums, uniform[:, 0]))
    inside = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    place = jnp.where(greedy, jnp.argmax(inside, axis=-1), _invert(jnp.exp(inside - peak), uniform[:, 1]))
    logprob = jnp.take_along_axis(inside, place[:, None], axis=1) - peak - jnp.log(sums.sum(-1, keepdims=True))
    return (block * BLOCK + place).astype(jnp.int32), logprob[:, 0]


def _invert(weights: Float[Array, "B T"], uniform: Float[Array, " B"]) -> Int[Array, " B"]:
    """Return the first index where the cumulative sum exceeds `uniform` of the total; never an index of zero weight."""
    running = jnp.where(weights > 0, jnp.cumsum(weights, axis=-1), 0)
    return jnp.argmax(running > uniform[:, None] * running.max(-1, keepdims=True), axis=-1)


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def observe(model: Model, params: nnx.State, state: SamplerState, rows, ids, positions, vision, count, shown) -> SamplerState:
    """Append `count[f]` observation tokens to row `rows[f]` (see `parts`), which is live again; 0 changes nothing.

    Shapes: rows, count [F]; ids, vision [F S]; positions [3 F S]; shown [F S E].
    """
    with jax.named_scope("observe"):
        part = take_rows(state, rows)
        f, s = ids.shape
        r = part.ids.shape[1]
        chosen = count > 0
        begin = jnp.where(chosen, part.length, r)
        logits, cache = extend(
            model, params, ids, positions, vision, count, begin, part.prompt, part.prompt_len, part.cache, shown
        )
        index = jnp.where(jnp.arange(s) < count[:, None], begin[:, None] + jnp.arange(s), r)
        last = jnp.take_along_axis(positions.max(0), jnp.maximum(count - 1, 0)[:, None], axis=1)[:, 0]
        part = part._replace(
            ids=part.ids.at[jnp.arange(f)[:, None], index].set(ids, mode="drop"),
            length=part.length + count,
            position=jnp.where(chosen, last + 1, part.position),
            live=part.live | chosen,
            match=jnp.where(chosen, 0, part.match),
            logits=jnp.where(chosen[:, None], logits, part.logits),
            cache=cache,
        )
        return put_rows(state, rows, part)


@partial(jax.jit, donate_argnums=0)
def stop(state: SamplerState, rows: Int[Array, " F"]) -> SamplerState:
    """Stop rows, given by index in the whole state (B: none), at their current token."""
    return _placed(state._replace(live=_put(state.live, rows, False)))
