"""Log-probabilities: in bfloat16 over float32 weights, in chunks, at a temperature; and the dtypes of what is kept."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from conftest import small_config
from scipy.special import log_softmax, softmax

from imagent_jax.model.attention import choose_dtype
from imagent_jax.model.vlm import logits, token_logprobs
from imagent_jax.rl.batch import pack_batch
from imagent_jax.rl.learner import score, score_jit, shown_in
from imagent_jax.rl.optim import make_optimizer
from imagent_jax.rollout.collect import Collector
from imagent_jax.rollout.policy import model_settings


def test_bfloat16_compute_stays_near_float32_on_real_rollouts(parts, config, tasks):
    """The shipped base, vision tower included, on tokens it sampled in float32."""
    half = parts.model._replace(dtype="bfloat16")
    cfg = dataclasses.replace(config, model=dataclasses.replace(config.model, freeze_vision=False))
    rollout = Collector(parts.model, parts.processor, parts.tools, cfg).collect(parts.params, tasks, group_size=4, seed=11)
    zeros, r = np.zeros((4, 4)), cfg.rollout
    batch = pack_batch(rollout, zeros, zeros, r.prompt_tokens, r.response_tokens)
    rollout.store.model = half
    shown = shown_in(rollout.store.encode_again(parts.params), batch)
    logprobs, _ = jax.jit(score, static_argnums=(0, 4))(half, parts.params, batch, shown, 1.0)
    assert shown[0].dtype == shown[1].dtype == jnp.bfloat16 and logprobs.dtype == jnp.float32
    difference = np.abs(np.asarray(logprobs) - batch.logprobs)[batch.kind < 4]  # sampled tokens
    print(f"bfloat16 vs float32 log-probability: mean {difference.mean():.4f}, 99% {np.quantile(difference, 0.99):.3f}, "
          f"max {difference.max():.3f} nats over {difference.size} tokens")  # fmt: skip
    assert 0 < difference.mean() < 0.01 and np.quantile(difference, 0.99) < 0.1


@pytest.mark.slow(10)
def test_the_engine_samples_and_the_trainer_scores_at_the_temperature_of_the_run(parts, tasks, config):
    """Sampled tokens of whole rollouts at 0.6; at another temperature their log-probabilities are others."""
    out = parts.collector.collect(parts.params, tasks, group_size=4, seed=11, temperature=0.6)
    zeros, r = np.zeros((4, 4)), config.rollout
    b = pack_batch(out, zeros, zeros, r.prompt_tokens, r.response_tokens)
    logprobs, entropy = map(np.asarray, score_jit(parts.model, parts.params, b, shown_in(out.store, b), temperature=0.6))
    sampled = b.kind < 4
    assert np.abs(logprobs - b.logprobs)[sampled].max() <= 1e-4 and b.logprobs[sampled].mean() < -0.05
    assert abs(entropy[sampled].mean() + b.logprobs[sampled].mean()) < 0.05  # what is drawn is drawn at that temperature


def test_log_probabilities_in_chunks_are_those_of_all_at_once_and_scipys():
    """Ten tokens, seven at a time: values, entropies, and gradients of the hidden states and of the head."""
    rng, at, temperature = np.random.default_rng(0), np.arange(10), 0.7
    hidden, head = rng.normal(size=(10, 16)).astype(np.float32), rng.normal(size=(16, 30)).astype(np.float32)
    targets, scaled = rng.integers(0, 30, 10), (hidden.astype(np.float64) @ head) / temperature

    def both(hidden, head, chunk):
        values = token_logprobs(hidden, head, jnp.asarray(targets), temperature, chunk)
        return jnp.sum(jnp.sin(at) * values[0]) + jnp.sum(values[1]), values  # the entropy has no gradient

    runs = [
        jax.value_and_grad(both, (0, 1), has_aux=True)(jnp.asarray(hidden), jnp.asarray(head), chunk) for chunk in (7, 10, 99)
    ]
    weights = (np.sin(at)[:, None] * (np.eye(30)[targets] - softmax(scaled, axis=-1))) / temperature
    for (_, (logprobs, entropy)), (of_hidden, of_head) in runs:
        np.testing.assert_allclose(logprobs, log_softmax(scaled, axis=-1)[at, targets], atol=1e-5)
        np.testing.assert_allclose(entropy, scipy.stats.entropy(softmax(scaled, axis=-1), axis=-1), atol=1e-5)
        np.testing.assert_allclose(of_hidden, weights @ head.T, atol=1e-4)
        np.testing.assert_allclose(of_head, hidden.T @ weights, atol=1e-4)


def test_the_model_computes_as_the_settings_say():
    cfg = small_config(model={"dtype": "bfloat16", "remat": "full", "logprob_chunk": 7, "attention": "xla"},
                       images={"vision_block": 200})  # fmt: skip
    assert model_settings(cfg, "cpu") == {
        "dtype": "bfloat16", "remat": "full", "vision_block": 200, "logprob_chunk": 7, "attention": "xla"
    }  # fmt: skip


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
