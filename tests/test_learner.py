"""The learner beside the same updates done by hand: whole rows, whole logits, losses as the papers write them, one optax step.

The model is a toy of random weights; a batch has four groups of two rollouts, one group without an advantage.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats
from conftest import small_config
from flax import nnx
from scipy.special import log_softmax, softmax
from test_engine_oracle import inverse_transform
from test_mask import trains

from imagent_jax.config import LoraConfig
from imagent_jax.images.prepare import PreparedImage
from imagent_jax.model import lora
from imagent_jax.model.families import read_config
from imagent_jax.model.features import FeatureStore
from imagent_jax.model.vlm import at_tokens, create, embed, encode_images, logits
from imagent_jax.rl import learner
from imagent_jax.rl.batch import GroupBatch, micro_batches, micro_shapes, take_groups
from imagent_jax.rl.learner import Learner
from imagent_jax.rl.mask import MaskTables, mask_tables
from imagent_jax.rollout import sampler
from imagent_jax.runs.resources import CompileCounter
from imagent_jax.types import EndReason, TokenKind

N, G, P, R, VOCAB = 4, 2, 8, 6, 40
HF = {
    "model_type": "qwen2_vl", "image_token_id": 1, "vision_start_token_id": 2, "vision_end_token_id": 3,
    "text_config": {
        "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 1, "rope_parameters": {"mrope_section": [4, 2, 2], "rope_theta": 1e4},
    },
    "vision_config": {"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4},
}  # fmt: skip
OPTIMIZER = optax.chain(optax.clip_by_global_norm(2.0), optax.sgd(0.05, momentum=0.9))
CASES = {
    "temperature": {"rollout": {"temperature": 0.7}, "grpo": {"length_buckets": 2}},
    "recompute": {
        "rollout": {"temperature": 1.5}, "grpo": {"recompute": True, "importance_cap": 1.1, "epochs": 2},
        "mask": {"observations": "keep", "invalid_call": "keep", "drop_truncated": False},
    },
    "kl": {"model": {"freeze_vision": False}, "grpo": {"kl": 0.3, "epochs": 2, "clip_low": 0.1, "clip_high": 0.5}},
    "tower": {
        "model": {"freeze_vision": False}, "grpo": {"level": "constant", "constant": 5, "minibatches": 2, "epochs": 2},
        "mask": {"invalid_call": "drop"},
    },
    "adapters": {
        "lora": {"rank": 2, "alpha": 5.0, "merger": True},
        "grpo": {"kl": 0.1, "level": "sequence", "ratio": "sequence", "clip_low": 0.03, "clip_high": 0.02, "minibatches": 2},
    },
}  # fmt: skip


def config_of(case: str):
    sections = {"rollout": {}, "grpo": {}} | CASES[case]
    shape = {"groups": N, "group_size": G, "prompt_tokens": P, "response_tokens": R}
    return small_config(**sections | {
        "rollout": shape | sections["rollout"], "grpo": {"length_buckets": 1, "micro_groups": 2} | sections["grpo"],
    })  # fmt: skip


@pytest.fixture(scope="module")
def toy():
    """A model that takes seven tokens at a time to the vocabulary, and its parameters."""
    return create(read_config(HF), seed=1, vision_block=16, logprob_chunk=7)


def store_of(model, params) -> FeatureStore:
    """Two images of four feature rows, in one pack."""
    store, rng = FeatureStore(model, params, 2, pages=1), np.random.default_rng(0)
    patches = rng.integers(0, 256, (2, 16, model.cfg.vision.patch_bytes), np.uint8)
    assert store.add([PreparedImage(p, (4, 4), (16, 16)) for p in patches]) == [0, 4]
    return store


def made_batch() -> GroupBatch:
    """Responses of 2 to 6 tokens; the third group shows an image and its first response another; the second is flat."""
    rng = np.random.default_rng(3)
    T, C, I, A, O = (TokenKind[name] for name in ("TEXT", "TOOL_CALL", "INVALID_CALL", "ANSWER", "OBSERVATION"))
    kinds = [
        [[T, T, I, T, A, A], [T, I, I, T]],
        [[T, A, A], [T, A]],
        [[C, O, O, O, O, A], [T, T, A, A, A]],
        [[A, A], [T, T, T]],
    ]
    kind, length = np.full((N, G, R), TokenKind.PAD, np.uint8), np.zeros((N, G), np.int32)
    for n, g in np.ndindex(N, G):
        length[n, g] = len(kinds[n][g])
        kind[n, g, : length[n, g]] = kinds[n][g]
    end = np.full((N, G), EndReason.ANSWERED, np.uint8)
    end[0, 1], end[3, 1] = EndReason.VOID, EndReason.TRUNCATED
    prompt_vision, response_vision = np.full((N, P), -1, np.int32), np.full((N, G, R), -1, np.int32)
    prompt_vision[:, 1:5], response_vision[2, 0, 1:5] = np.arange(4), np.arange(4, 8)
    positions = np.arange(P + R, dtype=np.int32)
    return GroupBatch(
        prompt_ids=rng.integers(4, VOCAB, (N, P)).astype(np.int32), prompt_positions=np.tile(positions[:P], (3, N, 1)),
        prompt_len=np.full(N, P, np.int32), prompt_vision=prompt_vision,
        response_ids=rng.integers(4, VOCAB, (N, G, R)).astype(np.int32), response_len=length, response_vision=response_vision,
        response_positions=np.tile(positions[P:], (3, N, G, 1)), kind=kind, end=end,
        logprobs=np.zeros((N, G, R), np.float32), rewards=np.full((N, G), 9.0, np.float32),
        advantages=np.array([[1.0, -0.5], [0.0, 0.0], [-1.2, 0.8], [0.7, -0.9]], np.float32),
    )  # fmt: skip


@partial(jax.jit, static_argnums=0)
def logits_by_hand(model, params, batch: GroupBatch, pack):
    """[N G R V]: every prompt and response as a row of its own."""
    n, g, r = batch.response_ids.shape

    def rows(prompt, response):
        return jnp.concatenate([jnp.repeat(prompt, g, axis=0), response.reshape(n * g, r)], axis=1)

    ids, vision = rows(batch.prompt_ids, batch.response_ids), rows(batch.prompt_vision, batch.response_vision)
    positions = jnp.stack([rows(p, q) for p, q in zip(batch.prompt_positions, batch.response_positions, strict=True)])
    text = model.bind(params).text
    hidden, _ = text.prefill(embed(model, params, ids, vision, at_tokens(encode_images(model, params, *pack), vision)), positions)
    return logits(hidden[:, P - 1 : -1], text.head(model.dtype)).reshape(n, g, r, -1)


def chosen(logits, batch: GroupBatch, temperature: float):
    """Log-probability of every response token."""
    return jnp.take_along_axis(jax.nn.log_softmax(logits / temperature), batch.response_ids[..., None], axis=-1)[..., 0]


def k3(x):
    return jnp.exp(x) - x - 1


class ByHand:
    """`Learner.update`, one optimizer step after another."""

    def __init__(self, cfg, model, params, batch: GroupBatch, reference):
        self.cfg, self.model, self.batch = cfg, model, batch
        self.pack = store_of(model, params).packs[0]
        kinds = [[[TokenKind(k) for k in row] for row in group] for group in batch.kind]
        self.mask = np.array([
            [[trains(cfg.mask, kinds[n][g][r], EndReason(batch.end[n, g]), batch.advantages[n, g]) for r in range(R)]
             for g in range(G)] for n in range(N)
        ])  # fmt: skip
        index = np.arange(N) if cfg.grpo.kl else np.array([0, 2, 3])
        dealt = micro_batches(batch, index, micro_shapes(cfg), cfg.grpo.minibatches)
        self.updates = [np.concatenate([taken for taken, _ in update]) for update in dealt]
        self.reference = chosen(self.logits(reference), batch, cfg.rollout.temperature)

    def logits(self, params):
        return logits_by_hand(self.model, params, self.batch, self.pack)

    def counted(self, groups) -> float:
        """What these groups add to the denominator."""
        if self.cfg.grpo.level == "constant":
            return len(groups) * G * self.cfg.grpo.constant
        per_row = self.mask[groups].sum(-1)
        return per_row.sum() if self.cfg.grpo.level == "token" else (per_row > 0).sum()

    def tokens(self, logits, old, importance) -> dict:
        """The loss of every token, and what is measured of it."""
        grpo, a = self.cfg.grpo, self.batch.advantages[..., None]
        logprobs = chosen(logits, self.batch, self.cfg.rollout.temperature)
        difference = logprobs - old
        sampler = jnp.where(self.batch.kind == TokenKind.OBSERVATION, old, self.batch.logprobs)
        if grpo.ratio == "sequence":
            mean = jnp.where(self.mask, difference, 0).sum(-1, keepdims=True) / np.maximum(self.mask.sum(-1, keepdims=True), 1)
            difference = jax.lax.stop_gradient(mean - logprobs) + logprobs
        ratio = jnp.exp(difference)
        clipped = jnp.clip(ratio, 1 - grpo.clip_low, 1 + grpo.clip_high)
        away = k3(self.reference - logprobs)
        loss = -jnp.minimum(ratio * a, clipped * a) * importance + grpo.kl * away
        return {
            "loss": loss, "ratio/mean": ratio, "kl/sampler": k3(sampler - logprobs), "kl/reference": away,
            "importance/mean": importance, "importance/capped": np.float32(importance == grpo.importance_cap),
            "clip/low": (clipped > ratio) & (a < 0), "clip/high": (clipped < ratio) & (a > 0),
        }  # fmt: skip

    def update(self, params, state, trained_filter):
        """Parameters, optimizer state and metrics (means over the optimizer steps)."""
        grpo, found = self.cfg.grpo, []
        old, importance = self.batch.logprobs, 1.0
        if grpo.recompute:
            old = chosen(self.logits(params), self.batch, self.cfg.rollout.temperature)
            importance = np.minimum(np.exp(old - self.batch.logprobs), grpo.importance_cap)
            importance = np.where(self.batch.kind == TokenKind.OBSERVATION, 1.0, importance)
        idle = np.setdiff1d(np.arange(N), np.concatenate(self.updates))
        share = self.mask / np.maximum(self.mask.sum(-1, keepdims=True), 1) if grpo.level == "sequence" else self.mask * 1.0
        for epoch in range(grpo.epochs):
            for i in np.random.default_rng(epoch).permutation(grpo.minibatches):
                taken = self.updates[i]
                weight = np.where(np.isin(np.arange(N), taken)[:, None, None], share, 0)
                denominator = self.counted(taken) + self.counted(idle) / grpo.minibatches

                def total(logits):
                    return jnp.sum(weight * self.tokens(logits, old, importance)["loss"]) / denominator  # noqa: B023

                logits, pull = jax.vjp(self.logits, params)
                loss, cotangent = jax.value_and_grad(total)(logits)
                gradient = nnx.split_state(pull(cotangent)[0], trained_filter, ...)[0]
                trained, frozen = nnx.split_state(params, trained_filter, ...)
                change, state = OPTIMIZER.update(gradient, state, trained)
                params = nnx.merge_state(optax.apply_updates(trained, change), frozen)
                values = self.tokens(logits, old, importance)
                values["entropy"] = scipy.stats.entropy(softmax(logits / self.cfg.rollout.temperature, axis=-1), axis=-1)
                norm = np.sqrt(sum(float((np.asarray(x) ** 2).sum()) for x in jax.tree.leaves(gradient)))
                means = {name: float((weight * x).sum() / weight.sum()) for name, x in values.items()}
                found.append(means | {"loss": float(loss), "grad_norm": norm})
        return params, state, {name: np.mean([m[name] for m in found]) for name in found[0]}


def shifted(params, seed: int, size: float = 0.05):
    """The parameters and a little noise."""
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return jax.tree.unflatten(tree, [x + size * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)])


def copied(params):
    return jax.tree.map(jnp.copy, params)  # an update donates what it trains


def furthest(a, b) -> float:
    return max(float(jnp.abs(x - y).max()) for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True))


def sampled_by(model, params, batch: GroupBatch, cfg) -> GroupBatch:
    """The batch with log-probabilities of a sampler that is a little off, none of observations."""
    exact = chosen(logits_by_hand(model, params, batch, store_of(model, params).packs[0]), batch, cfg.rollout.temperature)
    noisy = np.asarray(exact) + np.random.default_rng(4).normal(0, 0.3, exact.shape)
    return dataclasses.replace(batch, logprobs=np.where(batch.kind < TokenKind.OBSERVATION, noisy, 0).astype(np.float32))


@pytest.mark.slow(8)
@pytest.mark.parametrize("case", CASES)
def test_two_updates_are_those_done_by_hand(toy, case):
    """Parameters and every metric. The reference and the features of the rollout are of parameters of their own."""
    cfg, (model, params) = config_of(case), toy
    if cfg.lora.on:
        model, params = lora.attach(model, params, cfg.lora)
        params = shifted(params, 7)
    trained = nnx.LoRAParam if cfg.lora.on else nnx.Not(nnx.PathContains("vision")) if cfg.model.freeze_vision else ...
    reference = shifted(params, 8)
    batch = sampled_by(model, params, made_batch(), cfg)
    trainer = Learner(model, cfg, OPTIMIZER, mask_tables(cfg.mask), reference if cfg.grpo.kl else None)
    ours, expected = copied(params), params
    state, hand_state = trainer.init(ours), OPTIMIZER.init(nnx.split_state(params, trained, ...)[0])
    hand = ByHand(cfg, model, params, batch, reference)
    for _ in range(2):
        ours, state, metrics = trainer.update(ours, state, batch, store_of(model, ours))
        expected, hand_state, means = hand.update(expected, hand_state, trained)
        assert metrics.keys() == means.keys() - (set() if cfg.grpo.kl else {"kl/reference"}) | {"loss/weight"}
        for name in metrics.keys() - {"loss/weight"}:
            assert metrics[name] == pytest.approx(means[name], rel=1e-3, abs=2e-5), name
        assert furthest(ours, expected) < 2e-5
    assert furthest(ours, params) > 1e-2 and min(metrics["clip/low"], metrics["clip/high"]) > 0
    assert (furthest(ours["vision"], params["vision"]) > 0) == (cfg.lora.merger or not cfg.model.freeze_vision)


@pytest.mark.slow(8)
def test_sampler_and_trainer_agree_at_a_temperature_other_than_one(toy):
    """Tokens, their log-probabilities, and the ratio of the first update."""
    cfg, (model, params), seed = config_of("temperature"), toy, 5
    batch, store = made_batch(), store_of(model, params)
    drawn = np.full(N, seed, np.uint32), np.full(N, cfg.rollout.temperature, np.float32)
    state = sampler.admit(
        model, params, sampler.empty(model, N, G, P, R), np.arange(N), batch.prompt_ids, batch.prompt_positions,
        batch.prompt_vision, batch.prompt_len, batch.prompt_len, np.arange(N), *drawn, store.show(batch.prompt_vision),
    )  # fmt: skip
    never = np.zeros((1, VOCAB), np.int16)
    state = sampler.decode(model, R, params, state, None, never, R)
    batch = dataclasses.replace(
        batch, response_ids=np.asarray(state.ids).reshape(N, G, R), logprobs=np.asarray(state.logprobs).reshape(N, G, R),
        response_vision=np.full((N, G, R), -1, np.int32), response_len=np.full((N, G), R, np.int32),
        kind=np.zeros((N, G, R), np.uint8), advantages=np.tile(np.float32([1, -1]), (N, 1)),
    )  # fmt: skip
    scaled = np.asarray(logits_by_hand(model, params, batch, store.packs[0]), np.float64) / 0.7
    expected = np.take_along_axis(log_softmax(scaled, axis=-1), batch.response_ids[..., None], -1)[..., 0]
    np.testing.assert_allclose(batch.logprobs, expected, atol=1e-5)
    for n, g, r in np.ndindex(N, G, R):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), n), g), r)
        assert batch.response_ids[n, g, r] == inverse_transform(scaled[n, g, r], jax.random.uniform(key, (2,)))
    trainer = Learner(model, cfg, OPTIMIZER, mask_tables(cfg.mask))
    ours = copied(params)
    metrics = trainer.update(ours, trainer.init(ours), batch, store)[2]
    assert metrics["ratio/mean"] == pytest.approx(1, abs=1e-5) and abs(metrics["kl/sampler"]) < 1e-8
    assert metrics["clip/low"] == metrics["clip/high"] == 0


@pytest.mark.slow(4)
def test_the_first_update_alone_compiles_every_shape_of_a_micro_batch(toy, monkeypatch):
    cfg, (model, params), ran, accumulate = config_of("temperature"), toy, [], learner.accumulate
    monkeypatch.setattr(learner, "accumulate", lambda *args: (ran.append(args[7].kind.shape), accumulate(*args))[1])
    batch = take_groups(made_batch(), np.array([3, 3, 3, 3]), R)  # all of them short
    trainer = Learner(model, cfg, OPTIMIZER, mask_tables(cfg.mask))
    params = copied(params)
    state = trainer.init(params)
    for _ in range(2):
        params, state, _ = trainer.update(params, state, batch, store_of(model, params))
    short, long = (2, G, 3), (2, G, 6)
    assert ran == [short, long, short, short, short, short]
    updated = copied(toy[1])
    trainer = Learner(model, cfg, OPTIMIZER, mask_tables(cfg.mask))
    trainer.warm, state = True, trainer.init(updated)
    for _ in range(2):
        updated, state, _ = trainer.update(updated, state, batch, store_of(model, updated))
    assert furthest(updated, params) == 0


@pytest.mark.slow(4)
def test_an_update_of_more_micro_batches_compiles_nothing(toy):
    """Metrics are summed over as many as there are."""
    cfg, (model, params) = small_config(grpo={"minibatches": 1, "length_buckets": 1}), toy
    batch, few = made_batch(), np.arange(N)[:, None] < 1
    first = dataclasses.replace(batch, advantages=np.where(few, np.float32([1, -1]), 0))
    second = dataclasses.replace(batch, advantages=np.tile(np.float32([1, -1]), (N, 1)))
    trainer = Learner(model, cfg, OPTIMIZER, mask_tables(cfg.mask))
    params, store = copied(params), store_of(model, params)
    jax.clear_caches()
    counter = CompileCounter()
    params, state, _ = trainer.update(params, trainer.init(params), first, store)
    compiled = counter.count
    trainer.update(params, state, second, store)
    assert compiled > 3 and counter.count == compiled


def test_the_reference_is_a_copy_of_the_starting_policy(toy):
    """The first update donates the parameters that it was given."""
    cfg, (model, params) = config_of("kl"), toy
    ours = copied(params)
    trainer = Learner(model, cfg, OPTIMIZER, mask_tables(cfg.mask), ours)
    for leaf in jax.tree.leaves(ours):
        leaf.delete()
    assert furthest(trainer.reference, params) == 0


def test_what_is_trained_follows_from_adapters_and_the_frozen_tower(toy):
    model, params = lora.attach(*toy, LoraConfig(rank=2, alpha=1.0, targets=("q_proj",), merger=True))

    def names(**sections) -> set[str]:
        trainer = Learner(model, small_config(**sections), OPTIMIZER, MaskTables(None, None, None))
        return {".".join(map(str, path)) for path, _ in nnx.to_flat_state(trainer.split(params)[0])}

    every = {".".join(map(str, path)) for path, _ in nnx.to_flat_state(params)}
    assert names(model={"freeze_vision": False}) == every
    assert names() == {name for name in every if not name.startswith("vision.")}
    assert names(lora={"rank": 2}) == {name for name in every if "_lora_" in name}
    assert any(name.startswith("vision.") for name in names(lora={"rank": 2}))
