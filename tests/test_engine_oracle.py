"""The engine against a sampler that fits on a page: one row at a time, a full forward for every token, nothing kept."""

import time
import zlib

import jax
import numpy as np
import pytest
from scipy.special import log_softmax

from imagent_jax.data.tiny_world import task_at
from imagent_jax.model.images import pack_images
from imagent_jax.model.interleave import Encoded, pad_prompts
from imagent_jax.model.qwen2_vl import encode_images, prefill
from imagent_jax.rl.sampler import draw
from imagent_jax.rl.turns import Row
from imagent_jax.tools import pool

TASKS, SEED = 50, 23
LENGTH, ROWS = 112 + 192, 512
"""Tokens of a whole sequence (prompt and response) and feature rows, padded."""

encode = jax.jit(encode_images, static_argnums=0)
whole_forward = jax.jit(prefill, static_argnums=0)


class PlainRow:
    """A sequence of encoded parts, run from its beginning whenever the next token is wanted."""

    def __init__(self, model, params, prompt: Encoded):
        self.model, self.params, self.parts = model, params, []
        self.features, self.vision = np.zeros((ROWS, model.cfg.text.hidden_size), np.float32), []
        self.used = 0
        self.add(prompt)

    def add(self, part: Encoded) -> None:
        first = []
        for image in part.images:  # each image in a pack of its own
            patches, coords, image_id, _ = pack_images([image], self.model.vision_block, 1)
            count = len(image.patches) // 4
            first.append(self.used)
            self.features[self.used : self.used + count] = encode(self.model, self.params, patches, coords, image_id)[:count]
            self.used += count
        self.parts.append(part)
        self.vision.append(part.vision(first))

    def logits(self) -> jax.Array:
        whole = Encoded(
            np.concatenate([part.ids for part in self.parts]),
            np.concatenate([part.positions for part in self.parts], axis=1),
            0, None, None, [],
        )  # fmt: skip
        arrays = pad_prompts([whole], [np.concatenate(self.vision)], LENGTH)
        return whole_forward(self.model, self.params, *arrays, np.asarray([len(whole.ids)]), self.features)[0][0]


def inverse_transform(logits: np.ndarray, uniform) -> int:
    """A token from softmax(logits): the first number chooses among blocks of 128, the second within."""
    weights = np.exp(logits - logits.max())
    blocks = np.pad(weights, (0, -len(weights) % 128)).reshape(-1, 128)
    block = np.searchsorted(np.cumsum(blocks.sum(1)), float(uniform[0]) * weights.sum(), side="right")
    inside = np.cumsum(blocks[block])
    return int(128 * block + np.searchsorted(inside, float(uniform[1]) * inside[-1], side="right"))


def test_draws_are_those_of_a_sum_in_double_precision():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(4000, 1088)).astype(np.float32) * rng.uniform(0.1, 6, (4000, 1)).astype(np.float32)
    logits[::2, rng.permutation(1088)[:900]] = -np.inf
    uniform = rng.random((4000, 2), np.float32)
    token, logprob = map(np.asarray, jax.jit(draw)(logits, uniform))
    exact = np.asarray([inverse_transform(row, u) for row, u in zip(logits.astype(np.float64), uniform, strict=True)])
    assert np.mean(token != exact) < 1e-3 and len(set(token)) > 800  # within a rounding of a boundary
    np.testing.assert_allclose(logprob, log_softmax(logits.astype(np.float64), axis=1)[np.arange(4000), token], atol=1e-5)
    best, logprob = map(np.asarray, jax.jit(draw)(logits, None))
    np.testing.assert_array_equal(best, logits.argmax(1))
    np.testing.assert_allclose(logprob, log_softmax(logits.astype(np.float64), axis=1).max(1), atol=1e-5)


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-23])
def test_a_token_without_probability_is_never_drawn(uniform):
    """Wherever the others stand, with the smallest and the largest number that there is."""
    rng = np.random.default_rng(1)
    logits = np.full((2000, 300), -np.inf, np.float32)
    for row in logits:
        some = rng.permutation(300)[: rng.integers(1, 40)]
        row[some] = rng.normal(size=len(some)) * 5
    token, _ = jax.jit(draw)(logits, np.full((2000, 2), uniform, np.float32))
    assert np.isfinite(logits[np.arange(2000), token]).all()


def plain_rollout(engine, params, task, number: int) -> tuple[Row, list[int], dict[int, float]]:
    """Rollout `number` of a task, the ids of its response, and the log-probabilities of those sampled."""
    prompt, registry = engine.open_task(task)
    row, sequence = Row(task, number, registry, position=prompt.next_position), PlainRow(engine.model, params, prompt)
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(SEED), zlib.crc32(task.uid.encode()) >> 1), number)
    response, turn, logprobs = [], [], {}
    while True:
        uniform, logits = jax.random.uniform(jax.random.fold_in(key, len(response)), (2,)), sequence.logits()
        token = inverse_transform(np.asarray(logits, np.float64), uniform)
        logprobs[len(response)] = float(jax.nn.log_softmax(logits)[token])
        turn, response = [*turn, token], [*response, token]
        one = np.asarray([token], np.int32)
        position = np.full((3, 1), row.position + len(turn) - 1, np.int32)
        sequence.add(Encoded(one, position, 0, np.asarray([-1]), np.zeros(1, np.int32), []))
        ended = engine.processor.decode(turn).endswith(("<|im_end|>", "<|endoftext|>", "</tool_call>"))
        if not ended and len(response) < engine.cfg.rollout.response_tokens:
            continue
        call, turn = engine.end_turn(row, np.asarray(turn)), []
        if call is None:
            return row, response, logprobs
        observation = engine.respond(row, engine.tools.execute(call, row.registry, engine.settings))
        if observation is None:
            return row, response, logprobs
        sequence.add(observation)
        response += observation.ids.tolist()
        row.book_observation(observation, observation.vision([0] * len(observation.images)))


def test_trajectories_equal_those_sampled_one_row_at_a_time(parts, monkeypatch):
    delays, run_call = np.random.default_rng(0), pool.run_call
    monkeypatch.setattr(pool, "run_call", lambda *args: (time.sleep(delays.uniform(0, 0.05)), run_call(*args))[1])
    tasks = [task_at(31, "train", i) for i in range(TASKS)]
    batch = parts.engine.rollout(parts.params, tasks, group_size=2, seed=SEED, slots=16)
    calls = 0
    for i, (task, group) in enumerate(zip(tasks, batch.trajectories, strict=True)):
        engine_made = group[i % 2]
        row, response, logprobs = plain_rollout(parts.engine, parts.params, task, i % 2)
        assert response == engine_made.ids.tolist(), task.uid
        assert row.end == engine_made.end
        np.testing.assert_allclose(engine_made.logprobs[list(logprobs)], list(logprobs.values()), atol=1e-4)
        assert [turn.text for turn in row.turns] == [turn.text for turn in engine_made.turns]
        np.testing.assert_array_equal(np.concatenate(row.kinds), engine_made.kind)
        calls += sum(turn.call is not None for turn in row.turns)
    assert calls > TASKS / 2
