"""What bfloat16 compute over float32 weights costs in log-probability, on rollouts of the shipped base."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imagent_jax.model.attention import choose_dtype
from imagent_jax.model.qwen2_vl import encode_images, logits
from imagent_jax.rl.learner import score
from imagent_jax.rl.optim import make_optimizer


def test_bfloat16_compute_stays_near_float32_on_real_rollouts(parts, batch, rollout):
    """The shipped base, vision tower included, on tokens it sampled in float32."""
    half = parts.model._replace(dtype="bfloat16")
    encode = jax.jit(encode_images, static_argnums=0)
    features = jnp.concatenate([encode(half, parts.params, *pack) for pack in rollout.store.packs])
    logprobs, _ = jax.jit(score, static_argnums=(0, 4))(half, parts.params, batch, features, 1.0)
    assert features.dtype == jnp.bfloat16 and logprobs.dtype == jnp.float32
    difference = np.abs(np.asarray(logprobs) - batch.logprobs)[batch.kind < 4]  # sampled tokens
    print(f"bfloat16 vs float32 log-probability: mean {difference.mean():.4f}, 99% {np.quantile(difference, 0.99):.3f}, "
          f"max {difference.max():.3f} nats over {difference.size} tokens")  # fmt: skip
    assert 0 < difference.mean() < 0.01 and np.quantile(difference, 0.99) < 0.1


def test_logits_are_never_rounded_to_the_compute_dtype():
    h, w = (jax.random.normal(jax.random.key(i), s).astype(jnp.bfloat16) for i, s in enumerate([(8, 256), (256, 32)]))
    exact = np.asarray(h, np.float64) @ np.asarray(w, np.float64)
    np.testing.assert_allclose(logits(h, w), exact, atol=1e-4)
    assert np.abs(np.asarray(h @ w, np.float64) - exact).max() > 1e-2


@pytest.mark.parametrize("platform, dtype", [("cpu", "float32"), ("gpu", "bfloat16"), ("tpu", "bfloat16")])
def test_the_compute_dtype_follows_the_platform_unless_set(platform, dtype, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    assert choose_dtype("auto") == dtype and choose_dtype("float32") == "float32"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_optimizer_keeps_its_first_moment_as_set_and_weights_as_they_are(config, dtype):
    from dataclasses import replace

    optimizer = make_optimizer(replace(config.optim, moment_dtype=dtype), 10)
    params = {"w": jnp.ones((4, 4))}
    state = optimizer.init(params)
    updates, state = optimizer.update({"w": jnp.ones((4, 4))}, state, params)
    kinds = {leaf.dtype.name for leaf in jax.tree.leaves(state) if leaf.shape == (4, 4)}
    assert kinds == {dtype, "float32"} and updates["w"].dtype == jnp.float32
