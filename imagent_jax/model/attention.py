"""Attention: one interface for all backends. Softmax is computed in float32.

Training, prefill and the vision tower call `attention`. Decoding, which appends tokens to a cache, calls `attend_two_part`.
`q` has Q heads, `k` and `v` have K heads, and K divides Q; query head i reads key head i // (Q // K).

Backends of `attention`: `xla` is the reference and runs anywhere; `cudnn` is NVIDIA's fused kernel; `splash` is the Pallas TPU
kernel (`splash_interpret`: the same kernel in Pallas' interpreter, slow, on any machine). Every backend computes one softmax
over [shared | own] keys (`_cudnn`, `splash.splash_attention`). None merges two partial softmaxes by log-sum-exp, because jax's
fused kernels return the log-sum-exp without its gradient.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from imagent_jax.distributed.mesh import GROUPS, fitting, per_device
from imagent_jax.model.params import pad_to


class Causal(NamedTuple):
    """Causal mask of right-padded sequences; `length` tokens are real (None: all)."""

    length: Int[Array, "*b"] | None = None

    def real(self, tokens: int) -> Bool[Array, "*#b S"]:
        return jnp.ones(tokens, bool) if self.length is None else _below(self.length, tokens)

    def seen(self, tokens: int) -> Bool[Array, "S S"]:
        return jnp.tril(jnp.ones((tokens, tokens), bool))


class Packed(NamedTuple):
    """Block-diagonal mask: a token attends, in both directions, to the tokens with its own id; id -1 is padding."""

    ids: Int[Array, "*b S"]

    def real(self, tokens: int) -> Bool[Array, "*b S"]:
        return self.ids >= 0

    def seen(self, tokens: int) -> Bool[Array, "*b S S"]:
        return self.ids[..., :, None] == self.ids[..., None, :]


class Shared(NamedTuple):
    """Prompt keys and values of a group, to which all its G rows attend besides their own; `length` are real."""

    k: Float[Array, "N P K H"]
    v: Float[Array, "N P K H"]
    length: Int[Array, " N"]


def choose_dtype(setting: str, platform: str | None = None) -> str:
    """Return the compute dtype for `model.dtype`; "auto" is float32 on CPU and bfloat16 on accelerators.

    Args:
        platform: default: that of the attached devices.
    """
    return ("float32" if (platform or jax.default_backend()) == "cpu" else "bfloat16") if setting == "auto" else setting


def choose_attention(setting: str, dtype: str, platform: str | None = None) -> str:
    """Return the backend for `model.attention`.

    Args:
        platform: default: that of the attached devices.
    Raises:
        ValueError: the requested backend does not run on this platform or with this dtype.
    """
    platform = platform or jax.default_backend()
    if setting == "auto":
        return {"tpu": "splash", "gpu": "cudnn" if dtype == "bfloat16" else "xla"}.get(platform, "xla")
    needs = {"cudnn": "gpu", "splash": "tpu"}.get(setting, platform)
    if platform != needs:
        raise ValueError(f"model.attention is {setting!r}, which runs on a {needs}, not on this {platform}; choose 'auto'.")
    if setting == "cudnn" and dtype != "bfloat16":
        raise ValueError(f"model.attention is 'cudnn', which needs model.dtype 'bfloat16', not {dtype!r}; choose 'auto'.")
    return setting


def attention(
    q: Float[Array, "*b S Q H"],
    k: Float[Array, "*b S K H"],
    v: Float[Array, "*b S K H"],
    mask: Causal | Packed,
    shared: Shared | None = None,
    backend: str = "xla",
) -> Float[Array, "*b S Q H"]:
    """Compute softmax(q k^T / sqrt(H)) v over a sequence's own keys and, if given, its group's shared keys.

    Values at padding positions of `q`, `k`, `v` and `shared`, NaN included, affect no output and no gradient. Outputs and
    gradients at padding positions are zero.

    Args:
        mask: which tokens of the sequence attend to which.
        shared: prompt keys and values. Then q is [N G S Q H], `mask` is `Causal`, and the result equals attention over
            [shared | own] of every row. The shared keys are stored and read once per group.
        backend: see the module's docstring.
    """
    real = mask.real(q.shape[-3])[..., None, None]
    q, k, v = (jnp.where(real, x, 0) for x in (q, k, v))
    if shared is not None:
        real_shared = _below(shared.length, shared.k.shape[1])[..., None, None]
        shared = shared._replace(k=jnp.where(real_shared, shared.k, 0), v=jnp.where(real_shared, shared.v, 0))
    inputs = (q, k, v, mask, shared)
    specs = jax.tree.map(_spec, inputs)
    return jnp.where(real, per_device(_BACKENDS[backend], specs, specs[0])(*inputs), 0)


def _spec(x: Array) -> PartitionSpec:
    """Return the sharding of an input: the first axis (groups) over `GROUPS`, the last but one (heads) over `tensor`."""
    return fitting(x, GROUPS, *(None,) * (x.ndim - 3), "tensor") if x.ndim > 3 else fitting(x, GROUPS)


def _below(length: Int[Array, "*b"], tokens: int) -> Bool[Array, "*b S"]:
    return jnp.arange(tokens) < length[..., None]


# ---- XLA: the reference ---------------------------------------------------------------------------------------------


def _xla(q, k, v, mask, shared):
    seen = mask.seen(q.shape[-3])
    if shared is None:
        return attend(q, k, v, seen)
    return attend_two_part(q, *cached(shared.k, shared.v), shared.length, *cached(k, v), seen)


def _heads_first(x: Array, kv_heads: int) -> Array:
    """[*b S Q H] -> [*b K S*q H]: the queries that share a key head become the rows of one matrix."""
    *lead, s, heads, width = x.shape
    grouped = x.reshape(*lead, s, kv_heads, heads // kv_heads, width)
    return jnp.moveaxis(grouped, -3, -4).reshape(*lead, kv_heads, s * (heads // kv_heads), width)


def _tokens_first(x: Array, s: int) -> Array:
    """Inverse of `_heads_first`: [*b K S*q H] -> [*b S Q H]."""
    *lead, kv_heads, rows, width = x.shape
    split = x.reshape(*lead, kv_heads, s, rows // s, width)
    return jnp.moveaxis(split, -4, -3).reshape(*lead, s, kv_heads * (rows // s), width)


def _logits(q: Array, k: Array, mask: Array) -> Array:
    """[*b K S*q H] x [*b K H T] -> float32 [*b K S q T]; -inf where `mask` (broadcast to [*b 1 S 1 T]) is False."""
    s = mask.shape[-3]
    logits = jnp.matmul(q * q.shape[-1] ** -0.5, k, preferred_element_type=jnp.float32)
    logits = logits.reshape(*logits.shape[:-2], s, logits.shape[-2] // s, logits.shape[-1])
    return jnp.where(mask, logits, -jnp.inf)


def _values(weights: Array, v: Array) -> Array:
    """[*b K S q T] x [*b K T H] -> [*b K S*q H]."""
    *lead, s, q, t = weights.shape
    return jnp.matmul(weights.reshape(*lead, s * q, t).astype(v.dtype), v)


def attend(
    q: Float[Array, "*b S Q H"], k: Float[Array, "*b T K H"], v: Float[Array, "*b T K H"], mask: Bool[Array, "*#b S T"]
) -> Float[Array, "*b S Q H"]:
    """Compute masked attention. Every query must attend to at least one key.

    Args:
        mask: True where query S attends to key T.
    """
    k, v = cached(k, v)
    logits = _logits(_heads_first(q, k.shape[-3]), k, mask[..., None, :, None, :])
    weights = jnp.exp(logits - jax.lax.stop_gradient(logits.max(-1, keepdims=True)))
    out = _values(weights, v) / _flat(weights.sum(-1)).astype(v.dtype)
    return _tokens_first(out, q.shape[-3])


def _flat(x: Array) -> Array:
    """[*b K S q] -> [*b K S*q 1]."""
    return x.reshape(*x.shape[:-2], -1, 1)


def cached(k: Float[Array, "*b T K H"], v: Float[Array, "*b T K H"]) -> tuple[Float[Array, "*b K H T"], Float[Array, "*b K T H"]]:
    """Return keys and values in the cache's layout, which both matrix products of attention read without a copy."""
    return jnp.moveaxis(k, -3, -1), jnp.swapaxes(v, -2, -3)


def attend_two_part(
    q: Float[Array, "N G S Q H"],
    prompt_k: Float[Array, "N K H P"],
    prompt_v: Float[Array, "N K P H"],
    prompt_len: Int[Array, " N"],
    own_k: Float[Array, "N G K H R"],
    own_v: Float[Array, "N G K R H"],
    own_mask: Bool[Array, "*b S R"],
) -> Float[Array, "N G S Q H"]:
    """Compute attention of responses over their group's prompt keys and their own keys, in the layout of `cached`.

    The softmax has one maximum and one sum over both parts; it equals attention over [prompt | own] of every row. The G rows
    of a group enter one matrix product with the prompt keys, which are stored and read once per group.

    Args:
        own_mask: True where a query attends to an own key; broadcast to [N G S R].
    """
    n, g, s, heads, width = q.shape
    kv = own_k.shape[2]
    per = heads // kv
    valid = jnp.arange(prompt_k.shape[-1]) < prompt_len[:, None]  # [N P]
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


_QUERIES = 256
"""Number of queries per block in `attention_shares`."""


def attention_shares(
    q: Float[Array, "N S Q H"], k: Float[Array, "N S K H"], length: Int[Array, " N"], source: Bool[Array, "N S C"]
) -> Float[Array, "N S C"]:
    """Return the share of every token's causal attention that goes to each of C sources of keys.

    Shares are means over the heads, and 0 at padding. They sum to 1 if every token belongs to one source.

    Args:
        length: real tokens per row; padding is on the right.
        source: True where token S belongs to source C.
    """
    n, s, heads, width = q.shape
    keys, source = cached(k, k)[0], source.astype(jnp.float32)
    q = pad_to(q, 1, _QUERIES)
    blocks = jnp.moveaxis(q.reshape(n, -1, _QUERIES, heads, width), 1, 0)

    def one(block):
        first, q = block
        seen = jnp.arange(s) <= first + jnp.arange(_QUERIES)[:, None]
        weights = jax.nn.softmax(_logits(_heads_first(q, k.shape[-2]), keys, seen[:, None]), axis=-1)  # [N K S q T]
        return jnp.einsum("nksqt,ntc->nsc", weights, source) / heads

    shares = jax.lax.map(one, (jnp.arange(len(blocks)) * _QUERIES, blocks))
    shares = jnp.moveaxis(shares, 0, 1).reshape(n, -1, source.shape[-1])[:, :s]
    return jnp.where(_below(length, s)[..., None], shares, 0)


# ---- cuDNN ----------------------------------------------------------------------------------------------------------


def _cudnn(q, k, v, mask, shared, implementation="cudnn"):
    """Compute attention by `jax.nn.dot_product_attention`; an explicit mask array is used for `Packed` and `shared` only.

    With `shared`, the G rows of a group become heads of one sequence, so that one mask [S, P + S] serves all rows.
    """
    if shared is None:
        *lead, s, _, _ = q.shape
        flat = [x.reshape(-1, *x.shape[-3:]) for x in (q, k, v)]
        if isinstance(mask, Causal):
            out = jax.nn.dot_product_attention(*flat, is_causal=True, implementation=implementation)
        else:
            flat, ids = [pad_to(x, 1, _CUDNN) for x in flat], pad_to(mask.ids.reshape(-1, s), 1, _CUDNN, -1)
            seen = Packed(ids).seen(ids.shape[1])[:, None]
            out = jax.nn.dot_product_attention(*flat, mask=seen, implementation=implementation)[:, :s]
        return out.reshape(q.shape)
    n, g, s, heads, width = q.shape

    def rows_as_heads(x):  # [N G S K H] -> [N S G*K H]
        return jnp.moveaxis(x, 1, 2).reshape(n, x.shape[2], -1, width)

    def all_keys(of_group, own):
        of_group = jnp.broadcast_to(of_group[:, None], (n, g, *of_group.shape[1:]))
        return pad_to(jnp.concatenate([rows_as_heads(of_group), rows_as_heads(own)], axis=1), 1, _CUDNN)

    p = shared.k.shape[1]
    seen = jnp.concatenate(
        [
            jnp.broadcast_to(_below(shared.length, p)[:, None], (n, s, p)),
            jnp.broadcast_to(mask.seen(s), (n, s, s)),
            jnp.zeros((n, s, -(p + s) % _CUDNN), bool),
        ],
        axis=2,
    )
    seen = jnp.pad(seen, ((0, 0), (0, -s % _CUDNN), (0, 0)), constant_values=True)[:, None]
    queries, keys, values = pad_to(rows_as_heads(q), 1, _CUDNN), all_keys(shared.k, k), all_keys(shared.v, v)
    out = jax.nn.dot_product_attention(queries, keys, values, mask=seen, implementation=implementation)
    return jnp.moveaxis(out[:, :s].reshape(n, s, g, heads, width), 2, 1)


_CUDNN = 64
"""Sequences with a mask array are padded to a multiple of this (cuDNN's masks need even lengths; its tiles have 64)."""


# ---- backends -------------------------------------------------------------------------------------------------------


def _splash(q, k, v, mask, shared, interpret=False):
    from imagent_jax.model.splash import splash_attention  # lazy: only this backend needs Pallas

    packed = mask.ids if isinstance(mask, Packed) else None
    return splash_attention(q, k, v, packed, shared, interpret=interpret)


_BACKENDS = {"xla": _xla, "cudnn": _cudnn, "splash": _splash, "splash_interpret": partial(_splash, interpret=True)}
