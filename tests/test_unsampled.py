"""Ids that no policy may choose: placeholders of images and videos, and rows of the embedding without a token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats
from qwen_vocabulary import MARKERS, ROWS, qwen_processor

from imagent_jax.model.vlm import sampled_only, token_logprobs
from imagent_jax.rl.batch import pack_batch
from imagent_jax.rl.learner import score_jit, shown_in
from imagent_jax.rollout.collect import Collector
from imagent_jax.rollout.sampler import draw
from imagent_jax.types import TokenKind


@pytest.mark.parametrize("family", MARKERS)
def test_placeholders_and_rows_without_a_token_are_not_sampled(family):
    processor = qwen_processor(family)
    number = processor.tokenizer.get_vocab()
    rows = range(len(processor.tokenizer), ROWS)
    assert processor.unsampled_ids(ROWS) == (number["<|image_pad|>"], number["<|video_pad|>"], *rows) and len(rows) > 100


def test_the_policy_of_a_folder_leaves_them_out(parts):
    assert parts.model.unsampled == parts.processor.unsampled_ids(parts.model.cfg.text.vocab_size) != ()
    assert parts.processor.image_token_id in parts.model.unsampled


def test_they_have_no_share_of_the_softmax_and_no_gradient():
    rng, out = np.random.default_rng(0), (3, 40, 99)
    hidden, head = rng.normal(size=(5, 16)).astype(np.float32), rng.normal(size=(16, 100)).astype(np.float32)
    targets = np.asarray([0, 98, 41, 7, 40])  # the last is a placeholder that was shown
    head[:, out] *= 9  # the likeliest by far
    kept = np.delete(hidden.astype(np.float64) @ head, out, axis=1) / 0.7
    values = {n: i for i, n in enumerate(np.delete(np.arange(100), out))}
    logprobs, entropy = token_logprobs(*map(jnp.asarray, (hidden, head, targets)), 0.7, 2, out)
    expected = scipy.special.log_softmax(kept, axis=1)[np.arange(4), [values[n] for n in targets[:4]]]
    np.testing.assert_allclose(logprobs[:4], expected, atol=1e-5)
    np.testing.assert_allclose(entropy, scipy.stats.entropy(scipy.special.softmax(kept, axis=1), axis=1), atol=1e-5)
    shown = hidden[4] @ head[:, 40] / 0.7 - scipy.special.logsumexp(kept[4])
    np.testing.assert_allclose(logprobs[4], shown, rtol=1e-5)

    def of_sampled(head):
        return token_logprobs(jnp.asarray(hidden), head, jnp.asarray(targets), 0.7, 2, out)[0][:4].sum()

    gradient = jax.grad(of_sampled)(jnp.asarray(head))
    assert np.isfinite(gradient).all() and not gradient[:, out].any() and gradient.any(0).sum() == 97


@pytest.mark.parametrize("greedy", [False, True])
def test_the_draw_never_takes_one(greedy):
    rng = np.random.default_rng(1)
    logits, out = rng.normal(size=(500, 300)).astype(np.float32), tuple(range(0, 300, 2))
    logits[:, out] += 20.0
    uniform = rng.uniform(size=(500, 2)).astype(np.float32)
    token, logprob = draw(sampled_only(jnp.asarray(logits), out), jnp.asarray(uniform), jnp.full(500, greedy))
    others = scipy.special.log_softmax(logits[:, 1::2].astype(np.float64), axis=1)
    assert (np.asarray(token) % 2 == 1).all() and (not greedy or (others.argmax(1) * 2 + 1 == token).all())
    np.testing.assert_allclose(logprob, others[np.arange(500), np.asarray(token) // 2], atol=1e-5)


@pytest.mark.slow(30)
def test_a_rollout_without_its_likeliest_tokens_is_recomputed_to_the_same_logprobs(parts, config, tasks):
    """Promise 1 where what may not be sampled is what the policy would have said."""

    def collected(model):
        return Collector(model, parts.processor, parts.tools, config).collect(parts.params, tasks[:1], group_size=4, seed=2)

    def said(rollout) -> set[int]:
        trajectories = [t for group in rollout.trajectories for t in group]
        return {int(i) for t in trajectories for i in t.ids[t.kind != TokenKind.OBSERVATION]}

    out = (*parts.model.unsampled, *sorted(said(collected(parts.model)))[::2])
    model = parts.model._replace(unsampled=out)
    rollout = collected(model)
    assert said(rollout) and not said(rollout) & set(out)
    batch = pack_batch(rollout, np.zeros((1, 4), np.float32), np.zeros((1, 4), np.float32), config.rollout.prompt_tokens,
                       config.rollout.response_tokens)  # fmt: skip
    again, _ = score_jit(model, parts.params, batch, shown_in(rollout.store, batch), temperature=config.rollout.temperature)
    sampled = ~np.isin(batch.kind, [TokenKind.OBSERVATION, TokenKind.PAD])
    assert sampled.sum() >= 12 and np.abs(np.asarray(again) - batch.logprobs)[sampled].max() <= 1e-4
