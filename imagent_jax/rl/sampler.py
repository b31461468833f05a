"""The jitted side of rollouts: prefill of prompts, the decode loop, and observations appended to the kept cache."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from imagent_jax.model.qwen2_vl import Model, empty_cache, extend, prefill
from imagent_jax.model.text import PromptCache, ResponseCache

STOP_WIDTH = 8


class SamplerState(NamedTuple):
    """All that changes while a batch of rollouts is decoded. Row b belongs to group b // G.

    `ids` and `logprobs` are append-only and hold sampled and shown tokens alike; `length` is the number of tokens of
    a row, all of them in `cache`; `logits` are those of its next token; `position` is the next M-RoPE position.
    """

    ids: Int[Array, "B R"]
    logprobs: Float[Array, "B R"]
    length: Int[Array, " B"]
    position: Int[Array, " B"]
    live: Bool[Array, " B"]
    logits: Float[Array, "B V"]
    cache: ResponseCache


@partial(jax.jit, static_argnums=(0, 1, 2))
def start(
    model: Model, group_size: int, response_tokens: int, params: nnx.State, ids, positions, vision, prompt_len, features,
    next_position,
) -> tuple[SamplerState, PromptCache]:  # fmt: skip
    """Prefills N prompts once each and opens N * G empty responses, all live.

    Shapes: ids, vision [N P]; positions [3 N P]; prompt_len, next_position [N]; features [F D].
    """
    logits, prompt = prefill(model, params, ids, positions, vision, prompt_len, features)
    rows = ids.shape[0] * group_size
    state = SamplerState(
        ids=jnp.zeros((rows, response_tokens), jnp.int32),
        logprobs=jnp.zeros((rows, response_tokens), jnp.float32),
        length=jnp.zeros(rows, jnp.int32),
        position=jnp.repeat(next_position, group_size),
        live=jnp.ones(rows, bool),
        logits=jnp.repeat(logits, group_size, axis=0),
        cache=empty_cache(model, rows, response_tokens),
    )
    return state, prompt


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def decode(
    model: Model, greedy: bool, params: nnx.State, state: SamplerState, prompt: PromptCache, prompt_len, keys, stops,
    temperature, max_steps,
) -> tuple[SamplerState, Int[Array, ""]]:  # fmt: skip
    """Samples up to `max_steps` tokens for every live row, each from softmax(logits / temperature).

    A row stops, inside the loop, when its last tokens equal one of `stops` ([n STOP_WIDTH], left-padded with -1) or
    its buffer is full. The random number of a token belongs to (row key, index of the token), so it depends on
    neither the batch nor the chunking. Returns the state and the steps taken.
    """
    b, r = state.ids.shape
    rows = jnp.arange(b)

    def step(carry):
        count, s = carry
        logits = s.logits / temperature
        if greedy:
            token = jnp.argmax(logits, axis=-1)
        else:
            noise = jax.vmap(lambda k, i: jax.random.gumbel(jax.random.fold_in(k, i), logits.shape[1:]))(keys, s.length)
            token = jnp.argmax(logits + noise, axis=-1)
        token = token.astype(jnp.int32)
        logprob = jnp.take_along_axis(jax.nn.log_softmax(logits, axis=-1), token[:, None], axis=-1)[:, 0]
        at = jnp.where(s.live, s.length, r)  # r: out of the buffer, dropped
        ids = s.ids.at[rows, at].set(token, mode="drop")
        logprobs = s.logprobs.at[rows, at].set(logprob, mode="drop")
        positions = jnp.broadcast_to(s.position[:, None], (3, b, 1))
        new_logits, cache = extend(
            model, params, token[:, None], positions, None, jnp.ones(b, jnp.int32), at, prompt, prompt_len, s.cache
        )
        length = s.length + s.live
        window = length[:, None] - STOP_WIDTH + jnp.arange(STOP_WIDTH)
        tail = jnp.where(window >= 0, jnp.take_along_axis(ids, jnp.clip(window, 0, r - 1), axis=1), -2)
        stopped = jnp.any(jnp.all((stops == -1) | (tail[:, None] == stops), axis=-1), axis=-1)
        state = SamplerState(
            ids, logprobs, length, s.position + s.live, s.live & ~stopped & (length < r), new_logits, cache
        )
        return count + 1, state

    with jax.named_scope("decode"):
        steps, state = jax.lax.while_loop(
            lambda c: (c[0] < max_steps) & jnp.any(c[1].live), step, (jnp.zeros((), jnp.int32), state)
        )
    return state, steps


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def observe(
    model: Model, params: nnx.State, state: SamplerState, prompt: PromptCache, prompt_len, ids, positions, vision,
    count, resume, features,
) -> SamplerState:  # fmt: skip
    """Appends an observation chunk to rows with `count[b]` > 0; rows with `resume[b]` sample again afterwards.

    Shapes: ids, vision [B S]; positions [3 B S]; count, resume [B]; features [F D]. Other rows stay as they are.
    """
    with jax.named_scope("observe"):
        b, s = ids.shape
        r = state.ids.shape[1]
        chosen = count > 0
        begin = jnp.where(chosen, state.length, r)
        logits, cache = extend(
            model, params, ids, positions, vision, count, begin, prompt, prompt_len, state.cache, features
        )
        index = jnp.where(jnp.arange(s) < count[:, None], begin[:, None] + jnp.arange(s), r)
        last = jnp.take_along_axis(positions.max(0), jnp.maximum(count - 1, 0)[:, None], axis=1)[:, 0]
        return SamplerState(
            ids=state.ids.at[jnp.arange(b)[:, None], index].set(ids, mode="drop"),
            logprobs=state.logprobs,
            length=state.length + count,
            position=jnp.where(chosen, last + 1, state.position),
            live=jnp.where(chosen, resume, state.live),
            logits=jnp.where(chosen[:, None], logits, state.logits),
            cache=cache,
        )
