"""The attention seam: every attention of the model goes through these functions (XLA; softmax in float32).

`q` has Q heads, `k` and `v` K heads with Q = K * (Q // K); query head i reads key head i // (Q // K).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def _heads_first(x: Array, kv_heads: int) -> Array:
    """[*b S Q H] -> [*b K S*q H]: the queries that share a key head become rows of one matrix."""
    *lead, s, heads, width = x.shape
    grouped = x.reshape(*lead, s, kv_heads, heads // kv_heads, width)
    return jnp.moveaxis(grouped, -3, -4).reshape(*lead, kv_heads, s * (heads // kv_heads), width)


def _tokens_first(x: Array, s: int) -> Array:
    """The inverse: [*b K S*q H] -> [*b S Q H]."""
    *lead, kv_heads, rows, width = x.shape
    split = x.reshape(*lead, kv_heads, s, rows // s, width)
    return jnp.moveaxis(split, -4, -3).reshape(*lead, s, kv_heads * (rows // s), width)


def _logits(q: Array, k: Array, mask: Array) -> Array:
    """[*b K S*q H] x [*b K T H] -> float32 [*b K S q T]; -inf where `mask` (broadcast to [*b 1 S 1 T]) is False."""
    s = mask.shape[-3]
    logits = jnp.matmul(q * q.shape[-1] ** -0.5, jnp.swapaxes(k, -1, -2), preferred_element_type=jnp.float32)
    logits = logits.reshape(*logits.shape[:-2], s, logits.shape[-2] // s, logits.shape[-1])
    return jnp.where(mask, logits, -jnp.inf)


def _values(weights: Array, v: Array) -> Array:
    """[*b K S q T] x [*b K T H] -> [*b K S*q H]."""
    *lead, s, q, t = weights.shape
    return jnp.matmul(weights.reshape(*lead, s * q, t).astype(v.dtype), v)


def attend(
    q: Float[Array, "*b S Q H"], k: Float[Array, "*b T K H"], v: Float[Array, "*b T K H"], mask: Bool[Array, "*#b S T"]
) -> Float[Array, "*b S Q H"]:
    """Plain masked attention; every query must see at least one key."""
    k, v = jnp.swapaxes(k, -2, -3), jnp.swapaxes(v, -2, -3)
    logits = _logits(_heads_first(q, k.shape[-3]), k, mask[..., None, :, None, :])
    weights = jnp.exp(logits - jax.lax.stop_gradient(logits.max(-1, keepdims=True)))
    out = _values(weights, v) / _flat(weights.sum(-1)).astype(v.dtype)
    return _tokens_first(out, q.shape[-3])


def _flat(x: Array) -> Array:
    """[*b K S q] -> [*b K S*q 1]."""
    return x.reshape(*x.shape[:-2], -1, 1)


def attend_causal(
    q: Float[Array, "*b S Q H"], k: Float[Array, "*b S K H"], v: Float[Array, "*b S K H"]
) -> Float[Array, "*b S Q H"]:
    """Causal attention. Right-padding needs no further mask: no real query sees a later key."""
    s = q.shape[-3]
    return attend(q, k, v, jnp.tril(jnp.ones((s, s), bool)))


def attend_two_part(
    q: Float[Array, "N G S Q H"],
    prompt_k: Float[Array, "N P K H"],
    prompt_v: Float[Array, "N P K H"],
    prompt_len: Int[Array, " N"],
    own_k: Float[Array, "N G R K H"],
    own_v: Float[Array, "N G R K H"],
    own_mask: Bool[Array, "*b S R"],
) -> Float[Array, "N G S Q H"]:
    """Responses over their group's shared prompt keys and over their own keys, merged by log-sum-exp.

    The G rows of a group enter one matrix product with the prompt keys, which are stored and read once per group.
    Equal to attention over the concatenation [prompt | own] of every row. `own_mask` broadcasts to [N G S R].
    """
    n, g, s, heads, width = q.shape
    kv = own_k.shape[-2]
    per = heads // kv
    own_k, own_v = jnp.swapaxes(own_k, -2, -3), jnp.swapaxes(own_v, -2, -3)  # [N G K R H]
    prompt_k, prompt_v = jnp.swapaxes(prompt_k, -2, -3), jnp.swapaxes(prompt_v, -2, -3)  # [N K P H]
    valid = jnp.arange(prompt_k.shape[2]) < prompt_len[:, None]  # [N P]
    own_q = _heads_first(q, kv)  # [N G K S*q H]
    shared_q = jnp.swapaxes(own_q, 1, 2).reshape(n, kv, g * s * per, width)
    shared = _logits(shared_q, prompt_k, valid[:, None, None, None, :]).reshape(n, kv, g, s, per, -1)
    own = _logits(own_q, own_k, own_mask[..., None, :, None, :])  # [N G K S q R]

    peak = jax.lax.stop_gradient(jnp.maximum(jnp.swapaxes(shared.max(-1), 1, 2), own.max(-1)))  # [N G K S q]
    shared = jnp.exp(shared - jnp.swapaxes(peak, 1, 2)[..., None])
    own = jnp.exp(own - peak[..., None])
    total = jnp.swapaxes(shared.sum(-1), 1, 2) + own.sum(-1)
    out_shared = _values(shared.reshape(n, kv, g * s, per, -1), prompt_v).reshape(n, kv, g, s * per, width)
    out = jnp.swapaxes(out_shared, 1, 2) + _values(own, own_v)  # [N G K S*q H]
    return _tokens_first(out / _flat(total).astype(out.dtype), s)
