"""Every attention backend equals the XLA oracle, forward and backward, with NaN wherever there is padding."""

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rounding import assert_rounded

from imagent_jax.model import attention as seam
from imagent_jax.model import splash
from imagent_jax.model.attention import Causal, Packed, Shared, attend, attention, choose_attention

N, G, R, P, Q, K, H = 2, 3, 40, 24, 4, 2, 16
TERMS = H + P + R  # products of a score, and of an output over all keys
SCALE = 4.0  # about the largest of the normal values


def normal(key, shape):
    return jax.random.normal(jax.random.key(key), shape)


def case(name: str, n=N, g=G, r=R, p=P, q=Q, k=K, h=H, dtype=jnp.float32):
    """q, k, v, mask, shared, and which tokens are real; padding holds NaN."""
    prompt_len, length = jnp.array([p, p // 3])[:n], jnp.arange(n * g).reshape(n, g) * 11 % r + 1
    ids = jnp.where(jnp.arange(r) < r - 5, jnp.arange(r) * 3 // r, -1)[None] * jnp.ones((n, 1), int)
    lead, mask = {
        "responses": ((n, g), Causal(length)),
        "prompts": ((n,), Causal(length[:, -1])),
        "vision": ((n,), Packed(ids.at[0].set(jnp.roll(ids[0], 7)))),
    }[name]
    k = q if name == "vision" else k

    def poisoned(key, shape, real):
        return jnp.where(real[..., None, None], normal(key, shape), jnp.nan).astype(dtype)

    real = jnp.broadcast_to(mask.real(r), (*lead, r))
    own = [poisoned(i, (*lead, r, heads, h), real) for i, heads in enumerate((q, k, k))]
    shared = None
    if name == "responses":
        real_prompt = jnp.arange(p) < prompt_len[:, None]
        shared = Shared(*(poisoned(i, (n, p, k, h), real_prompt) for i in (3, 4)), prompt_len)
    return *own, mask, shared, real


def run(name: str, backend: str, **sizes):
    """Output and gradients of all inputs; the cotangent is NaN at padding too."""
    q, k, v, mask, shared, real = case(name, **sizes)
    keys = None if shared is None else (shared.k, shared.v)

    def forward(q, k, v, keys):
        return attention(q, k, v, mask, None if keys is None else Shared(*keys, shared.length), backend)

    out, pull = jax.vjp(jax.jit(forward), q, k, v, keys)
    cotangent = jnp.where(real[..., None, None], normal(9, out.shape), jnp.nan).astype(out.dtype)
    return jax.tree.map(np.asarray, (out, pull(cotangent))), np.asarray(real)


def dense(name: str):
    """The definition in float64: every row alone, without padding, over the concatenation of what it may see."""
    q, k, v, mask, shared, real = case(name)
    sees = np.broadcast_to(mask.seen(R), (*real.shape, R))
    q, k, v, shared = jax.tree.map(lambda x: np.asarray(x, np.float64), (q, k, v, shared))
    real, out = np.asarray(real), np.zeros(q.shape)
    for at in np.ndindex(q.shape[:-3]):
        for i in np.flatnonzero(real[at]):
            own = sees[at][i] & real[at]
            keys, values = k[at][own], v[at][own]
            if shared is not None:
                n = int(shared.length[at[0]])
                keys, values = (np.concatenate([s[at[0]][:n], x]) for s, x in ((shared.k, keys), (shared.v, values)))
            for head in range(Q):
                of = head // (Q // keys.shape[1])
                logits = keys[:, of] @ q[at][i, head] / H**0.5
                weights = np.exp(logits - logits.max())
                out[at][i, head] = weights / weights.sum() @ values[:, of]
    return out


@pytest.mark.parametrize("name", ["responses", "prompts", "vision"])
def test_the_oracle_is_the_definition_and_padding_reaches_nothing(name):
    (out, gradients), real = run(name, "xla")
    assert_rounded(out, dense(name), TERMS, scale=SCALE)
    for leaf in jax.tree.leaves(gradients):
        assert np.isfinite(leaf).all() and np.abs(leaf).max() > 0.1
    assert not out[~real].any() and not gradients[0][~real].any() and not gradients[1][~real].any()


@pytest.mark.parametrize("name", ["responses", "prompts", "vision"])
@pytest.mark.parametrize("backend", ["splash_interpret", "cudnn"])
def test_a_backend_equals_the_oracle_forward_and_backward(name, backend, monkeypatch):
    if backend == "cudnn":  # the shapes and masks it hands over; the kernel itself needs a GPU: benchmarks/attention.py
        monkeypatch.setitem(seam._BACKENDS, "cudnn", partial(seam._cudnn, implementation="xla"))
    (expected, wanted), _ = run(name, "xla")
    (out, gradients), _ = run(name, backend)
    assert_rounded(out, expected, TERMS, scale=SCALE)
    for a, b in zip(jax.tree.leaves(gradients), jax.tree.leaves(wanted), strict=True):
        assert_rounded(a, b, 2 * TERMS + G * R)


def test_splash_over_several_blocks_of_keys_and_queries(monkeypatch):
    """Rows longer than a block, so that the static mask has blocks that are full, partial and skipped."""
    monkeypatch.setattr(splash, "BLOCKS", (128,))
    sizes = {"n": 1, "g": 1, "r": 140, "p": 128, "q": 1, "k": 1}
    (expected, wanted), _ = run("responses", "xla", **sizes)
    (out, gradients), _ = run("responses", "splash_interpret", **sizes)
    terms = H + sizes["p"] + sizes["r"]
    assert_rounded(out, expected, terms, scale=SCALE)
    for a, b in zip(jax.tree.leaves(gradients), jax.tree.leaves(wanted), strict=True):
        assert_rounded(a, b, 2 * terms + sizes["r"])


def test_the_gradient_through_the_merge_is_that_of_one_softmax():
    """Against autodiff of plain attention over the concatenation [prompt | own] of every row."""
    q, k, v, mask, shared, _ = case("responses")
    q, k, v, pk, pv = (jnp.nan_to_num(x) for x in (q, k, v, shared.k, shared.v))
    weight = jnp.where(mask.real(R)[..., None, None], normal(9, q.shape), 0)

    def merged(q, k, v, pk, pv):
        return jnp.sum(weight * attention(q, k, v, mask, Shared(pk, pv, shared.length)))

    def whole(q, k, v, pk, pv):
        k, v = (jnp.concatenate([jnp.broadcast_to(s[:, None], (N, G, *s.shape[1:])), x], 2) for s, x in ((pk, k), (pv, v)))
        prompt = jnp.broadcast_to((jnp.arange(P) < shared.length[:, None])[:, None, None], (N, G, R, P))
        seen = jnp.concatenate([prompt, jnp.broadcast_to(mask.seen(R), (N, G, R, R))], 3)
        return jnp.sum(weight * attend(q, k, v, seen))

    for a, b in zip(*(jax.jit(jax.grad(f, range(5)))(q, k, v, pk, pv) for f in (merged, whole)), strict=True):
        assert_rounded(a, b, 2 * TERMS + G * R)


def test_the_choice_of_backend(monkeypatch):
    assert choose_attention("auto", "bfloat16") == "xla" == choose_attention("xla", "float32")
    for setting, needs in (("cudnn", "gpu"), ("splash", "tpu")):
        with pytest.raises(ValueError, match=f"is {setting!r}, which runs on a {needs}, not on this cpu; choose 'auto'"):
            choose_attention(setting, "bfloat16")
        assert choose_attention(setting, "bfloat16", needs) == setting
        other = {"gpu": "tpu", "tpu": "gpu"}[needs]
        with pytest.raises(ValueError, match=f"runs on a {needs}, not on this {other}"):
            choose_attention(setting, "bfloat16", other)
    assert choose_attention("auto", "bfloat16", "gpu") == "cudnn" and choose_attention("xla", "bfloat16", "tpu") == "xla"
    for platform, dtype, backend in [
        ("gpu", "bfloat16", "cudnn"), ("gpu", "float32", "xla"), ("tpu", "bfloat16", "splash"), ("tpu", "float32", "splash"),
    ]:  # fmt: skip
        monkeypatch.setattr(seam, "jax", SimpleNamespace(default_backend=lambda p=platform: p))
        assert choose_attention("auto", dtype) == backend
    monkeypatch.setattr(seam, "jax", SimpleNamespace(default_backend=lambda: "gpu"))
    with pytest.raises(ValueError, match="bfloat16"):
        choose_attention("cudnn", "float32")
