"""The policy loss against float64 NumPy written out in loops, finite differences, and promise 2."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from beartype import beartype
from flax import nnx
from jaxtyping import jaxtyped

from imagent_jax.config import GRPOConfig, OptimConfig
from imagent_jax.model.params import Maker
from imagent_jax.rl.loss import PRESETS, finish_metrics, loss_normaliser, policy_loss
from imagent_jax.rl.optim import make_optimizer

N, G, R = 4, 3, 5
CLIPS = {"two-sided": (0.1, 0.15), "high only": (1.0, 0.15), "low only": (0.1, np.inf)}


def sample(seed=0):
    """Log-probabilities, advantages and a mask with one empty trajectory and one empty group."""
    rng = np.random.default_rng(seed)
    old = -rng.exponential(1.0, (N, G, R))
    logprobs, ref = old + rng.normal(0, 0.3, old.shape), old + rng.normal(0, 0.3, old.shape)
    mask = rng.random(old.shape) < 0.7
    mask[0, 0], mask[2], mask[1, :, 0] = False, False, True
    return logprobs, old, rng.normal(0, 1, (N, G)), mask, ref


def by_hand(logprobs, old, advantages, mask, ref, cfg, importance=None):
    """The loss as the papers write it: min(ratio A, clip(ratio) A), then the sum of its level."""
    trajectories = []
    for n in range(N):
        for g in range(G):
            kept = [r for r in range(R) if mask[n, g, r]]
            if not kept:
                continue
            differences = [logprobs[n, g, r] - old[n, g, r] for r in kept]
            terms = []
            for difference, r in zip(differences, kept, strict=True):
                ratio = np.exp(np.mean(differences) if cfg.ratio == "sequence" else difference)
                a = advantages[n, g]
                term = -min(ratio * a, np.clip(ratio, 1 - cfg.clip_low, 1 + cfg.clip_high) * a)
                if importance is not None:
                    term *= min(importance[n, g, r], cfg.importance_cap)
                away = ref[n, g, r] - logprobs[n, g, r]
                terms.append(term + cfg.kl * (np.exp(away) - away - 1))
            trajectories.append(terms)
    if cfg.level == "token":
        return sum(map(sum, trajectories)) / sum(map(len, trajectories))
    if cfg.level == "sequence":
        return sum(sum(terms) / len(terms) for terms in trajectories) / len(trajectories)
    return sum(map(sum, trajectories)) / (N * G * cfg.constant)


def means_by_hand(values, mask, cfg):
    """Means of values [N G R] over the kept tokens: each trajectory's alike at level sequence, else each token's alike."""
    rows = [[values[n, g, r] for r in range(R) if mask[n, g, r]] for n in range(N) for g in range(G)]
    rows = [row for row in rows if row]
    return np.mean([np.mean(row) for row in rows]) if cfg.level == "sequence" else np.mean(sum(rows, []))


def preset(name, **changes):
    return dataclasses.replace(GRPOConfig(constant=R), **PRESETS[name] | changes)


def loss_of(cfg, logprobs, old, advantages, mask, ref=None, **rest):
    normaliser = loss_normaliser(jnp.asarray(mask), cfg=cfg).sum()
    arrays = [jnp.asarray(x) for x in (logprobs, old, advantages, mask)]
    return policy_loss(*arrays, cfg=cfg, normaliser=normaliser, ref_logprobs=ref, **rest)


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("kl", [0.0, 0.04])
@pytest.mark.parametrize("clip", CLIPS)
def test_loss_is_the_papers(name, kl, clip):
    low, high = CLIPS[clip]
    cfg = preset(name, kl=kl, clip_low=low, clip_high=high)
    logprobs, old, advantages, mask, ref = sample()
    with jax.enable_x64(True):
        loss, metrics = loss_of(cfg, logprobs, old, advantages, mask, jnp.asarray(ref))
    assert abs(float(loss) - by_hand(logprobs, old, advantages, mask, ref, cfg)) < 1e-12
    if name != "gspo":  # few sequences, so none may be clipped
        clipped = (float(metrics["clip/low"]) > 0, float(metrics["clip/high"]) > 0)
        assert clipped == (low < 1, high < np.inf)


@pytest.mark.parametrize("name", PRESETS)
def test_published_clips_also_hold(name):
    cfg, (logprobs, old, advantages, mask, ref) = preset(name), sample(3)
    with jax.enable_x64(True):
        assert abs(float(loss_of(cfg, logprobs, old, advantages, mask)[0])
                   - by_hand(logprobs, old, advantages, mask, ref, cfg)) < 1e-12  # fmt: skip


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("kl", [0.0, 0.04])
@pytest.mark.parametrize("clip", CLIPS)
def test_gradient_equals_finite_differences(name, kl, clip):
    low, high = CLIPS[clip]
    cfg = preset(name, kl=kl, clip_low=low, clip_high=high)
    logprobs, old, advantages, mask, ref = sample(1)
    with jax.enable_x64(True):
        ref_logprobs, x = jnp.asarray(ref), jnp.asarray(logprobs)
        gradient = jax.grad(lambda x: loss_of(cfg, x, old, advantages, mask, ref_logprobs)[0])(x)
    expected = np.zeros_like(logprobs)
    for index in np.ndindex(*logprobs.shape):
        step = np.zeros_like(logprobs)
        step[index] = 1e-6
        up, down = (by_hand(logprobs + s * step, old, advantages, mask, ref, cfg) for s in (1, -1))
        expected[index] = (up - down) / 2e-6
    np.testing.assert_allclose(gradient, expected, atol=1e-8)


def test_truncated_importance_weights_scale_the_policy_term_alone():
    cfg, (logprobs, old, advantages, mask, ref) = preset("dapo", kl=0.04, importance_cap=1.5), sample(2)
    weights = np.random.default_rng(5).uniform(0.2, 3.0, logprobs.shape)
    with jax.enable_x64(True):
        loss, _ = loss_of(
            cfg, logprobs, old, advantages, mask, jnp.asarray(ref), sampler_logprobs=jnp.asarray(old - np.log(weights))
        )
    assert abs(float(loss) - by_hand(logprobs, old, advantages, mask, ref, cfg, weights)) < 1e-12


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("moved", [-1.0, 0.0, 1.0, 0.3])
def test_a_sampler_that_differs_from_the_trainer_is_measured_in_every_mode(name, recompute, moved):
    """`moved`: nats by which the sampler's log-probabilities differ from the trainer's, which has not been updated."""
    cfg, (logprobs, _, advantages, mask, _) = preset(name, importance_cap=1.5), sample(4)
    sampler = logprobs + moved
    with jax.enable_x64(True):
        if recompute:
            metrics = loss_of(cfg, logprobs, logprobs, advantages, mask, sampler_logprobs=jnp.asarray(sampler))[1]
        else:
            metrics = loss_of(cfg, logprobs, sampler, advantages, mask)[1]
        metrics = finish_metrics(metrics)
    weight = np.exp(-moved) if recompute else 1.0
    assert float(metrics["kl/sampler"]) == pytest.approx(np.exp(moved) - moved - 1, abs=1e-12)  # 0.3679 for -1
    assert float(metrics["importance/mean"]) == pytest.approx(min(weight, 1.5))
    assert float(metrics["importance/capped"]) == pytest.approx(float(weight > 1.5))


def test_the_share_of_truncated_weights_is_that_of_the_loss():
    cfg, (logprobs, old, advantages, mask, _) = preset("grpo", importance_cap=1.2), sample(5)
    sampler = old - np.random.default_rng(6).normal(0, 0.5, old.shape)
    with jax.enable_x64(True):
        metrics = finish_metrics(loss_of(cfg, logprobs, old, advantages, mask, sampler_logprobs=jnp.asarray(sampler))[1])
    weights = np.exp(old - sampler)
    assert float(metrics["importance/mean"]) == pytest.approx(means_by_hand(np.minimum(weights, 1.2), mask, cfg))
    assert float(metrics["importance/capped"]) == pytest.approx(means_by_hand(weights > 1.2, mask, cfg))


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("poison", [1e3, -7.0, np.nan, np.inf, -np.inf])
def test_dropped_tokens_leave_loss_and_gradient_bit_identical(name, poison):
    cfg, (logprobs, old, advantages, mask, ref) = preset(name, kl=0.04), sample()
    sampler = old - 0.1
    per_token = np.broadcast_to(advantages[..., None], mask.shape)

    def run(logprobs, old, advantages, ref, sampler):
        def f(x):
            return loss_of(cfg, x, old, advantages, mask, jnp.asarray(ref), sampler_logprobs=jnp.asarray(sampler))

        return jax.value_and_grad(f, has_aux=True)(jnp.asarray(logprobs))

    clean, gradient = run(logprobs, old, per_token, ref, sampler)
    arrays = [np.where(mask, x, poison) for x in (logprobs, old, per_token, ref, sampler)]
    dirty, changed = run(*arrays)
    before, after = (jax.tree.leaves(jax.device_get(tree)) for tree in ((clean, gradient), (dirty, changed)))
    assert [x.tobytes() for x in before] == [x.tobytes() for x in after]
    assert not np.asarray(gradient)[~mask].any() and np.isfinite(gradient).all()


@pytest.mark.parametrize("name", PRESETS)
def test_every_kept_token_changes_the_gradient(name):
    cfg = preset(name, clip_low=0.9, clip_high=9.0)
    logprobs, old, advantages, mask, _ = sample()
    per_token = np.broadcast_to(advantages[..., None], mask.shape).copy()
    gradient = jax.jit(jax.grad(lambda x, a: loss_of(cfg, x, old, a, mask)[0]))
    base = np.asarray(gradient(logprobs, per_token))
    for index in zip(*np.nonzero(mask), strict=True):
        changed = per_token.copy()
        changed[index] += 0.5
        where = np.argwhere(np.asarray(gradient(logprobs, changed)) != base)
        assert [tuple(w) for w in where] == [tuple(index)]


@pytest.mark.parametrize("name", PRESETS)
def test_micro_batches_add_up_to_the_batch(name):
    cfg, (logprobs, old, advantages, mask, ref) = preset(name, kl=0.04), sample()
    with jax.enable_x64(True):
        arrays = [jnp.asarray(x) for x in (logprobs, old, advantages, mask, ref)]
        parts = [[x[i : i + 2] for x in arrays] for i in (0, 2)]
        total = loss_normaliser(arrays[3], cfg=cfg).sum()

        def f(x, old, advantages, mask, ref):
            return policy_loss(x, old, advantages, mask, cfg=cfg, normaliser=total, ref_logprobs=ref)

        grad = jax.value_and_grad(f, has_aux=True)
        (whole, metrics), gradient = grad(*arrays)
        pieces = [grad(*p) for p in parts]
        np.testing.assert_allclose(sum(p[0][0] for p in pieces), whole, rtol=1e-13)
        np.testing.assert_allclose(np.concatenate([p[1] for p in pieces]), gradient, rtol=1e-13)
        sums = jax.tree.map(lambda a, b: a + b, *(p[0][1] for p in pieces))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), sums, metrics)
        finished = finish_metrics(sums)
    expected = mask.sum() / (N * G * R) if cfg.level == "constant" else 1
    assert abs(float(finished["loss/weight"]) - expected) < 1e-12
    difference = np.where(mask, logprobs - old, 0)
    if cfg.ratio == "sequence":
        difference = np.broadcast_to(difference.sum(-1, keepdims=True) / np.maximum(mask.sum(-1, keepdims=True), 1), mask.shape)
    assert float(finished["ratio/mean"]) == pytest.approx(means_by_hand(np.exp(difference), mask, cfg), rel=1e-9)
    divergence = np.exp(ref - logprobs) - (ref - logprobs) - 1
    assert float(finished["kl/reference"]) == pytest.approx(means_by_hand(divergence, mask, cfg), rel=1e-9)


@pytest.mark.parametrize("level", ["token", "sequence", "constant"])
def test_metrics_are_means_over_the_kept_tokens(level):
    cfg, (logprobs, old, advantages, mask, _) = preset("grpo", level=level), sample(4)
    entropy = np.random.default_rng(6).uniform(0, 3, mask.shape)
    with jax.enable_x64(True):
        metrics = finish_metrics(loss_of(cfg, logprobs, old, advantages, mask, entropy=jnp.asarray(entropy))[1])
    ratio, a = np.exp(logprobs - old), advantages[..., None]
    expected = {
        "importance/mean": np.ones_like(ratio), "importance/capped": np.zeros_like(ratio),
        "entropy": entropy, "ratio/mean": ratio, "kl/sampler": np.exp(old - logprobs) - (old - logprobs) - 1,
        "clip/low": (ratio < 0.8) & (a < 0), "clip/high": (ratio > 1.2) & (a > 0),
    }  # fmt: skip
    assert metrics.keys() == expected.keys() | {"loss/weight"}
    for name, values in expected.items():
        assert float(metrics[name]) == pytest.approx(means_by_hand(values, mask, cfg), rel=1e-9), name


def test_clip_fractions_count_what_is_clipped():
    cfg = preset("dapo")
    log_ratio = np.log([[[1.5, 1.5, 0.5, 0.5, 1.0]], [[1.5, 0.5, 0.5, 0.5, 1.0]]])
    mask = np.ones(log_ratio.shape, bool)
    _, metrics = loss_of(cfg, log_ratio, 0 * log_ratio, np.array([[1.0], [-1.0]]), mask)
    assert float(metrics["clip/high"]) == pytest.approx(0.2) and float(metrics["clip/low"]) == pytest.approx(0.3)
    assert float(metrics["ratio/mean"]) == pytest.approx(0.9)


def test_nothing_kept_is_a_zero_loss_and_a_huge_ratio_a_finite_gradient():
    cfg, (logprobs, old, advantages, mask, _) = preset("dapo"), sample()
    value, gradient = jax.value_and_grad(lambda x: loss_of(cfg, x, old, advantages, 0 * mask > 0)[0])(logprobs)
    assert float(value) == 0.0 and not np.asarray(gradient).any()
    gradient = jax.grad(lambda x: loss_of(cfg, x, old - 1e3, advantages, mask)[0])(jnp.asarray(logprobs))
    assert np.isfinite(gradient).all()
    for away in (30, -30):  # differences of log-probabilities are cut at 20
        metrics = loss_of(cfg, old + away, old, advantages, mask)[1]
        assert float(metrics["ratio/mean"]) == pytest.approx(np.exp(np.sign(away) * 20), rel=1e-5)


def test_the_loss_is_float32_whatever_the_log_probabilities_are():
    cfg, (logprobs, old, advantages, mask, _) = preset("dapo"), sample()
    half = jnp.asarray(logprobs, jnp.bfloat16)
    loss, metrics = loss_of(cfg, half, old, advantages, mask)
    assert loss.dtype == jnp.float32 and {value.dtype for value in metrics.values()} == {jnp.dtype("float32")}
    assert float(loss) == pytest.approx(float(loss_of(cfg, half.astype(jnp.float32), old, advantages, mask)[0]), rel=1e-6)


def test_shapes_and_types_are_as_annotated():
    cfg, (logprobs, old, advantages, mask, ref) = preset("grpo"), sample()
    arrays = [jnp.asarray(x) for x in (logprobs, old, advantages, mask)]
    normaliser = jaxtyped(typechecker=beartype)(loss_normaliser)(arrays[3], cfg=cfg).sum()
    checked = jaxtyped(typechecker=beartype)(policy_loss)
    loss, _ = checked(*arrays, cfg=cfg, normaliser=normaliser, ref_logprobs=jnp.asarray(ref))
    assert loss.shape == () and loss.dtype == jnp.float32
    with pytest.raises(Exception, match="old_logprobs"):
        checked(arrays[0], arrays[1][..., :2], *arrays[2:], cfg=cfg, normaliser=normaliser)


class Layers(nnx.Module):
    """Three stacked layers of one matrix, one norm scale and one bias, and a single matrix."""

    def __init__(self):
        stacked, single = Maker(nnx.Rngs(0), jnp.float32, layers=3), Maker(nnx.Rngs(1), jnp.float32)
        self.matrix, self.scale, self.bias = stacked((4, 4), ("embed", "mlp")), stacked.ones(4), stacked.ones(4)
        self.head = single((4, 4), ("embed", "vocab"))


def test_weight_decay_is_of_matrices_only_in_stacked_layers_too():
    params = nnx.state(Layers())
    cfg = OptimConfig(learning_rate=0.1, weight_decay=0.5, warmup_steps=0, schedule="constant")
    optimizer = make_optimizer(cfg, 10)
    zero = jax.tree.map(jnp.zeros_like, params)
    updates, _ = jax.jit(optimizer.update)(zero, optimizer.init(params), params)
    for name, decayed in {"matrix": True, "head": True, "scale": False, "bias": False}.items():
        expected = -0.1 * 0.5 * np.asarray(params[name][...]) * decayed
        np.testing.assert_allclose(updates[name][...], expected, rtol=1e-6)


def rates_of(cfg, total, steps):
    """The learning rate of each step: Adam without memory moves by the rate itself."""
    optimizer, params, rates = make_optimizer(cfg, total), {"w": jnp.zeros((2, 2))}, []
    state = optimizer.init(params)
    for _ in range(steps):
        updates, state = optimizer.update({"w": jnp.ones((2, 2))}, state, params)
        rates.append(-float(updates["w"][0, 0]))
    return rates


@pytest.mark.parametrize("schedule, last", [("constant", 0.5), ("cosine", 0.5 * (1 + np.cos(np.pi * 5 / 6)) / 2)])
def test_rate_warms_up_then_follows_its_schedule(schedule, last):
    cfg = OptimConfig(learning_rate=0.5, schedule=schedule, warmup_steps=4, b1=0.0, b2=0.0)
    rates = rates_of(cfg, 10, 10)
    np.testing.assert_allclose(rates[:5], [0.0, 0.125, 0.25, 0.375, 0.5], atol=1e-6)
    assert rates[9] == pytest.approx(last, rel=1e-5)


def test_a_warm_up_longer_than_the_run_ends_with_it():
    cfg = OptimConfig(learning_rate=0.5, warmup_steps=10, b1=0.0, b2=0.0)
    np.testing.assert_allclose(rates_of(cfg, 3, 3), [0.0, 0.25, 0.5], atol=1e-6)
    np.testing.assert_allclose(rates_of(cfg, 1, 1), [0.5], atol=1e-6)


def adamw_by_hand(cfg, total, params, gradients):
    """Parameters after each step, in double precision: clipping by global norm, Adam, decoupled decay of matrices."""
    params, first, second = dict(params), dict.fromkeys(params, 0.0), dict.fromkeys(params, 0.0)
    for t, gradient in enumerate(gradients):
        norm = np.sqrt(sum((g**2).sum() for g in gradient.values()))
        done = (t - cfg.warmup_steps) / (total - cfg.warmup_steps)
        falling = (1 + np.cos(np.pi * done)) / 2 if cfg.schedule == "cosine" else 1
        rate = cfg.learning_rate * (t / cfg.warmup_steps if t < cfg.warmup_steps else falling)
        for name, g in gradient.items():
            g = g * min(1, cfg.clip_norm / norm)
            first[name] = cfg.b1 * first[name] + (1 - cfg.b1) * g
            second[name] = cfg.b2 * second[name] + (1 - cfg.b2) * g**2
            step = first[name] / (1 - cfg.b1 ** (t + 1)) / (np.sqrt(second[name] / (1 - cfg.b2 ** (t + 1))) + 1e-8)
            params[name] = params[name] - rate * (step + cfg.weight_decay * params[name] * (g.ndim > 1))
        yield dict(params)


@pytest.mark.parametrize(
    "settings",
    [
        {"schedule": "constant", "warmup_steps": 2, "b1": 0.8, "b2": 0.95, "weight_decay": 0.3, "clip_norm": 0.5},
        {"schedule": "cosine", "warmup_steps": 3, "b1": 0.6, "b2": 0.9, "weight_decay": 0.0, "clip_norm": 3.0},
    ],
    ids=["constant", "cosine"],
)
def test_eight_steps_are_adamw_by_hand(settings):
    """Norms of the gradient are from far below the clip to far above it, and each moves the steps that follow."""
    cfg, rng = OptimConfig(learning_rate=0.1, moment_dtype="float32", **settings), np.random.default_rng(0)
    params = {"matrix": rng.normal(size=(3, 4)), "vector": rng.normal(size=4)}
    gradients = [{name: size * rng.normal(size=x.shape) for name, x in params.items()} for size in (1, 0.03, 20, 0.3) * 2]
    optimizer, ours = make_optimizer(cfg, 10), jax.tree.map(jnp.float32, params)
    state = optimizer.init(ours)
    for expected, gradient in zip(adamw_by_hand(cfg, 10, params, gradients), gradients, strict=True):
        updates, state = optimizer.update(jax.tree.map(jnp.float32, gradient), state, ours)
        ours = jax.tree.map(jnp.add, ours, updates)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), ours, expected)
