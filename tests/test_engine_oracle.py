"""The engine against a sampler that fits on a page: one row at a time, a full forward for every token, nothing kept."""

import time
import zlib

import jax
import jax.numpy as jnp
import numpy as np

from imagent_jax.data.tiny_world import task_at
from imagent_jax.model.images import pack_images
from imagent_jax.model.interleave import Encoded, pad_prompts
from imagent_jax.model.qwen2_vl import encode_images, prefill
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


def plain_rollout(engine, params, task, number: int) -> tuple[Row, list[int], dict[int, float]]:
    """Rollout `number` of a task, the ids of its response, and the log-probabilities of those sampled."""
    prompt, registry = engine.open_task(task)
    row, sequence = Row(task, number, registry, position=prompt.next_position), PlainRow(engine.model, params, prompt)
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(SEED), zlib.crc32(task.uid.encode()) >> 1), number)
    response, turn, logprobs = [], [], {}
    while True:
        noise = jax.random.gumbel(jax.random.fold_in(key, len(response)), (engine.model.cfg.text.vocab_size,))
        logits = sequence.logits()
        token = int(jnp.argmax(logits + noise))
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
