"""The decoder, with two streams: prompts, shared by a group, and the group's responses, which attend to the prompts."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from imagent_jax.distributed.mesh import GROUPS, constrain
from imagent_jax.model.attention import Causal, Shared, attend_two_part, attention, attention_shares, cached
from imagent_jax.model.config import TextConfig
from imagent_jax.model.params import Maker, gathered, layer_of, linear, tensor_names, weights
from imagent_jax.model.rope import mrope, rotate

REMAT_POLICIES = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
    "offload": jax.checkpoint_policies.offload_dot_with_no_batch_dims("device", "pinned_host"),
}

TENSORS: dict[str, tuple[str, bool]] = {
    "text.embed": ("model.language_model.embed_tokens.weight", False),
    "text.norm": ("model.language_model.norm.weight", False),
    "text.lm_head": ("lm_head.weight", True),
    **tensor_names(
        "text.layers.",
        "model.language_model.layers.{}.",
        {name: f"self_attn.{name}_proj" for name in "qkvo"} | {name: f"mlp.{name}_proj" for name in ("gate", "up", "down")},
        transposed=True,
    ),
    "text.layers.input_norm": ("model.language_model.layers.{}.input_layernorm.weight", False),
    **{f"text.layers.{p}_norm": (f"model.language_model.layers.{{}}.self_attn.{p}_norm.weight", False) for p in "qk"},
    "text.layers.post_norm": ("model.language_model.layers.{}.post_attention_layernorm.weight", False),
}
"""Tensor of every parameter of the decoder: see `families.Family.tensors`."""

UNROLLED = 8
"""Training unrolls up to this many layers, which is faster; more layers become one loop, whose compile time is constant."""


class PromptCache(NamedTuple):
    """Keys and values of the prompts by layer, stored once per group, in the layout of `attention.cached`."""

    k: tuple[Float[Array, "N K H P"], ...]
    v: tuple[Float[Array, "N K P H"], ...]


class ResponseCache(NamedTuple):
    """Keys and values of the responses by layer, one row per rollout (row = group * G + rollout)."""

    k: tuple[Float[Array, "B K H R"], ...]
    v: tuple[Float[Array, "B K R H"], ...]


class Deep(NamedTuple):
    """Features that the first T layers add to the hidden states of image tokens (DeepStack, arXiv 2406.04334).

    Attributes:
        features: of every token, layer after layer; zeros for text.
        width: D.
    """

    features: Float[Array, "*b S T*D"]
    width: int

    def add(self, x: Float[Array, "*b S D"], layer: int | Int[Array, ""]) -> Float[Array, "*b S D"]:
        """Return the output `x` of a layer with the layer's features added."""

        layers = self.features.shape[-1] // self.width

        def added(x):
            first = jnp.minimum(layer, layers - 1) * self.width
            return x + jax.lax.dynamic_slice_in_dim(self.features, first, self.width, axis=-1).astype(x.dtype)

        if isinstance(layer, int):
            return added(x) if layer < layers else x
        return jax.lax.cond(layer < layers, added, lambda x: x, x)


def rms_norm(x, scale, eps: float):
    """Return RMSNorm over the last axis, computed in float32."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + eps)
    return y.astype(x.dtype) * scale


class DecoderLayers(nnx.Module):
    """Parameters of all decoder layers, stacked on a leading `layers` axis."""

    def __init__(self, cfg: TextConfig, rngs: nnx.Rngs, dtype):
        d, q, kv = cfg.hidden_size, cfg.num_heads * cfg.head_dim, cfg.num_kv_heads * cfg.head_dim
        make = Maker(rngs, dtype, layers=cfg.num_layers)
        self.input_norm, self.post_norm = make.ones(d), make.ones(d)
        self.q, self.k, self.v = make((d, q), ("embed", "heads")), *(make((d, kv), ("embed", "kv_heads")) for _ in "kv")
        if cfg.qkv_bias:
            self.q_bias, self.k_bias, self.v_bias = make.zeros(q, "heads"), *(make.zeros(kv, "kv_heads") for _ in "kv")
        if cfg.qk_norm:
            self.q_norm, self.k_norm = make.ones(cfg.head_dim), make.ones(cfg.head_dim)
        self.o = make((q, d), ("heads", "embed"))
        self.gate = make((d, cfg.intermediate_size), ("embed", "mlp"))
        self.up = make((d, cfg.intermediate_size), ("embed", "mlp"))
        self.down = make((cfg.intermediate_size, d), ("mlp", "embed"))


class Decoder(nnx.Module):
    """Embedding, layers, final norm and head. Equals transformers' `Qwen2VLTextModel` with its `lm_head`."""

    def __init__(self, cfg: TextConfig, rngs: nnx.Rngs, dtype):
        self.cfg = cfg
        make = Maker(rngs, dtype)
        spread = nnx.initializers.normal(cfg.hidden_size**-0.5)
        self.embed = make((cfg.vocab_size, cfg.hidden_size), ("vocab", "embed"), spread)
        self.layers = DecoderLayers(cfg, rngs, dtype)
        self.norm = make.ones(cfg.hidden_size)
        if not cfg.tie_word_embeddings:
            self.lm_head = make((cfg.hidden_size, cfg.vocab_size), ("embed", "vocab"))

    def head(self, dtype) -> Float[Array, "D V"]:
        """Return the output projection (the transposed embedding if tied)."""
        w = self.embed[...].T if self.cfg.tie_word_embeddings else self.lm_head[...]
        return jnp.asarray(w, dtype)

    def _qkv(self, w, x, rope):
        cfg, lead = self.cfg, x.shape[:-1]
        h = rms_norm(x, w["input_norm"], cfg.rms_norm_eps)
        q, k, v = (
            (linear(w, name, h) + w.get(f"{name}_bias", 0)).reshape(*lead, heads, cfg.head_dim)
            for name, heads in (("q", cfg.num_heads), ("k", cfg.num_kv_heads), ("v", cfg.num_kv_heads))
        )
        if cfg.qk_norm:
            q, k = (rms_norm(x, w[name], cfg.rms_norm_eps) for x, name in ((q, "q_norm"), (k, "k_norm")))
        return rotate(q, *rope), rotate(k, *rope), v

    def _finish(self, w, x, attended):
        x = x + linear(w, "o", attended.reshape(*x.shape[:-1], -1))
        h = rms_norm(x, w["post_norm"], self.cfg.rms_norm_eps)
        return x + linear(w, "down", jax.nn.silu(linear(w, "gate", h)) * linear(w, "up", h))

    def _rope(self, positions):
        cfg = self.cfg
        return mrope(positions, cfg.head_dim, cfg.rope_theta, cfg.mrope_section, cfg.interleaved_mrope)

    def prefill(
        self,
        x: Float[Array, "N P D"],
        positions: Int[Array, "3 N P"],
        prompt_len: Int[Array, " N"] | None = None,
        backend: str = "xla",
        deep: Deep | None = None,
    ) -> tuple[Float[Array, "N P D"], PromptCache]:
        """Run the prompts alone; return the final hidden states (after the norm, before the head) and the prompt cache."""
        hidden, kept = self._alone(x, positions, prompt_len, backend, deep, lambda _, k, v: cached(k, v))
        return hidden, PromptCache(*zip(*kept, strict=True))

    def attention_by_source(
        self,
        x: Float[Array, "N S D"],
        positions: Int[Array, "3 N S"],
        length: Int[Array, " N"],
        source: Bool[Array, "N S C"],
        backend: str = "xla",
        deep: Deep | None = None,
    ) -> Float[Array, "L N S C"]:
        """Run rows alone; return every layer's `attention_shares`."""
        _, kept = self._alone(x, positions, length, backend, deep, lambda q, k, _: attention_shares(q, k, length, source))
        return jnp.stack(kept)

    def _alone(self, x, positions, length, backend, deep, keep: Callable) -> tuple[Float[Array, "N P D"], list]:
        """Run rows alone; return the final hidden states, and what `keep` returns of each layer's queries, keys and values."""
        rope, dtype = self._rope(positions), x.dtype

        def layer(x, w):
            w = gathered(self.layers, w)
            q, k, v = self._qkv(w, x, rope)
            x = self._finish(w, x, attention(q, k, v, Causal(length), backend=backend))
            return constrain(x, GROUPS), keep(q, k, v)

        x, layers, kept = constrain(x, GROUPS), weights(self.layers, dtype), []
        for i in range(self.cfg.num_layers):
            x, one = layer(x, layer_of(layers, i))
            x = deep.add(x, i) if deep else x
            kept.append(one)
        return rms_norm(x, weights(self, dtype)["norm"], self.cfg.rms_norm_eps), kept

    def extend(
        self,
        x: Float[Array, "B S D"],
        positions: Int[Array, "3 B S"],
        start: Int[Array, " B"],
        prompt: PromptCache,
        prompt_len: Int[Array, " N"],
        cache: ResponseCache,
        deep: Deep | None = None,
    ) -> tuple[Float[Array, "B S D"], ResponseCache]:
        """Append S tokens to every response row, from cache index `start[b]` on; return hidden states and cache.

        Tokens beyond the cache's length are dropped. Cache entries of padding tokens are overwritten by the next call before any
        query attends to them.
        """
        rope, (b, s, _), dtype = self._rope(positions), x.shape, x.dtype
        n, r = prompt_len.shape[0], cache.k[0].shape[-1]
        g = b // n
        index = start[:, None] + jnp.arange(s)  # [B S]
        mask = (jnp.arange(r) <= index[..., None]).reshape(n, g, s, r)
        rows, layers, keys, values = jnp.arange(b)[:, None], weights(self.layers, dtype), [], []

        def split(t):
            return t.reshape(n, g, *t.shape[1:])

        for i in range(self.cfg.num_layers):  # unrolled: every layer's cache is a separate array, updated in place
            w = layer_of(layers, i)
            q, k, v = self._qkv(w, x, rope)
            keys.append(cache.k[i].at[rows, :, :, index].set(k, mode="drop"))
            values.append(cache.v[i].at[rows, :, index].set(v, mode="drop"))
            out = attend_two_part(split(q), prompt.k[i], prompt.v[i], prompt_len, split(keys[i]), split(values[i]), mask)
            x = constrain(self._finish(w, x, out.reshape(b, s, *out.shape[3:])), GROUPS)
            x = deep.add(x, i) if deep else x
        cache = ResponseCache(tuple(keys), tuple(values))
        return rms_norm(x, weights(self, dtype)["norm"], self.cfg.rms_norm_eps), cache

    def two_streams(
        self,
        prompt_x: Float[Array, "N P D"],
        prompt_positions: Int[Array, "3 N P"],
        prompt_len: Int[Array, " N"],
        x: Float[Array, "N G R D"],
        positions: Int[Array, "3 N G R"],
        response_len: Int[Array, "N G"] | None = None,
        remat: str = "none",
        backend: str = "xla",
        deep: tuple[Deep, Deep] | None = None,
    ) -> tuple[Float[Array, "N P D"], Float[Array, "N G R D"]]:
        """Run the training forward pass: prompts [N, P] once, and responses [N, G, R], through each layer together.

        Equals running every [prompt | response] row alone. Both streams are right-padded.

        Args:
            prompt_len, response_len: real tokens (response_len None: all).
            remat: name in `REMAT_POLICIES`.
            deep: of the prompts and of the responses.
        """
        rope_prompt, rope, dtype = self._rope(prompt_positions), self._rope(positions), x.dtype

        def layer(carry, inputs):
            (p, x), w, index = carry, gathered(self.layers, inputs[0]), inputs[1]
            pq, pk, pv = self._qkv(w, p, rope_prompt)
            q, k, v = self._qkv(w, x, rope)
            prompt_out = attention(pq, pk, pv, Causal(prompt_len), backend=backend)
            out = attention(q, k, v, Causal(response_len), Shared(pk, pv, prompt_len), backend=backend)
            p, x = constrain(self._finish(w, p, prompt_out), GROUPS), constrain(self._finish(w, x, out), GROUPS)
            return (deep[0].add(p, index), deep[1].add(x, index)) if deep else (p, x), None

        step = layer if remat == "none" else jax.checkpoint(layer, policy=REMAT_POLICIES[remat])
        carry = constrain(prompt_x, GROUPS), constrain(x, GROUPS)
        inputs = weights(self.layers, dtype), jnp.arange(self.cfg.num_layers) if deep else None
        carry, _ = jax.lax.scan(step, carry, inputs, unroll=self.cfg.num_layers <= UNROLLED)
        norm = partial(rms_norm, scale=weights(self, dtype)["norm"], eps=self.cfg.rms_norm_eps)
        return norm(carry[0]), norm(carry[1])
