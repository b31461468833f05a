"""The engine against a sampler that fits on a page: one row at a time, a full forward for every token, nothing kept, and its
own rules for ends, observations and token kinds."""

import re
import time
import zlib
from collections import Counter

import jax
import numpy as np
import pytest
from conftest import small_config
from scipy.special import log_softmax
from scripted_run import execute

from imagent_jax.images.prepare import PreparedImage, pack_images
from imagent_jax.model.positions import mrope_positions
from imagent_jax.model.vlm import at_tokens, encode_images, prefill
from imagent_jax.rollout.collect import Collector
from imagent_jax.rollout.environment import ToolEnvironment
from imagent_jax.rollout.sampler import draw
from imagent_jax.tiny.world import task_at
from imagent_jax.tools import ImageRegistry
from imagent_jax.types import CallStatus, EndReason, Markup, TokenKind

TASKS, SEED, TEMPERATURE = 24, 23, 1.3
SETTINGS = {
    "rollout": {"response_tokens": 160, "observation_tokens": 24, "decode_chunk": 7},
    "tools": {"max_turns": 2, "max_repeats": 1,}, "images": {"pack_blocks": 1, "pages": 2},
}  # fmt: skip
LENGTH, ROWS = 112 + 160, 512
"""Tokens of a whole sequence (prompt and response) and feature rows, padded."""

encode = jax.jit(encode_images, static_argnums=0)
whole_forward = jax.jit(prefill, static_argnums=0)


class PlainSequence:
    """Ids with images between them, run from its beginning whenever the next token is wanted."""

    def __init__(self, engine, params):
        self.model, self.processor, self.params = engine.model, engine.processor, params
        self.ids, self.grids, self.used = [], [], 0
        self.features = np.zeros((ROWS, self.model.cfg.text.hidden_size), np.float32)

    def show(self, image: PreparedImage) -> None:
        """Encodes an image, in a pack of its own, whose placeholders come next."""
        patches, coords, image_id, _ = pack_images(
            [[image]], self.model.vision_block, 1, merge=2, patch_bytes=image.patches.shape[1]
        )
        count = len(image.patches) // 4
        self.features[self.used : self.used + count] = encode(self.model, self.params, patches, coords, image_id)[:count]
        self.used, self.grids = self.used + count, [*self.grids, image.grid]

    def logits(self) -> np.ndarray:
        ids, placeholder = np.asarray(self.ids), self.processor.image_token_id
        rows = np.where(ids == placeholder, np.cumsum(ids == placeholder) - 1, -1)
        positions = mrope_positions(ids, placeholder, self.grids, 2)[0]
        room = (0, LENGTH - len(ids))
        arrays = np.pad(ids, room)[None], np.pad(positions, [(0, 0), room])[:, None], np.pad(rows, room, constant_values=-1)[None]
        arrays = [x.astype(np.int32) for x in arrays]
        found = np.array(
            whole_forward(self.model, self.params, *arrays, np.asarray([len(ids)]), jax.jit(at_tokens)(self.features, arrays[2]))[
                0
            ][0]
        )
        found[list(self.model.unsampled)] = -np.inf
        return found


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
    token, logprob = map(np.asarray, jax.jit(draw)(logits, uniform, np.zeros(4000, bool)))
    exact = np.asarray([inverse_transform(row, u) for row, u in zip(logits.astype(np.float64), uniform, strict=True)])
    assert np.mean(token != exact) < 1e-3 and len(set(token)) > 800  # within a rounding of a boundary
    np.testing.assert_allclose(logprob, log_softmax(logits.astype(np.float64), axis=1)[np.arange(4000), token], atol=1e-5)
    best, logprob = map(np.asarray, jax.jit(draw)(logits, uniform, np.ones(4000, bool)))
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
    token, _ = jax.jit(draw)(logits, np.full((2000, 2), uniform, np.float32), np.zeros(2000, bool))
    assert np.isfinite(logits[np.arange(2000), token]).all()


def kinds_of(turn: list[int], decode) -> list[TokenKind]:
    """The kinds of a turn's tokens, by where each stands in the text."""
    text, ends = decode(turn), [len(decode(turn[: i + 1])) for i in range(len(turn))]
    answer = re.search(r"<answer>.*?</answer>", text, re.DOTALL)
    if "<tool_call>" in text:
        begin, end, kind = text.index("<tool_call>"), len(text), TokenKind.TOOL_CALL
    else:
        begin, end, kind = *(answer.span() if answer else (0, 0)), TokenKind.ANSWER
    return [kind if first < end and last > begin else TokenKind.TEXT for first, last in zip([0, *ends], ends, strict=False)]


def plain_rollout(engine, params, task, number: int):
    """Rollout `number` of a task: its sequence, the kinds of its response, how it ended, and log-probabilities by token."""
    processor, room, sequence = engine.processor, engine.cfg.rollout.response_tokens, PlainSequence(engine, params)
    _, prompt, environment, _ = engine.open_task(task)
    registry = ImageRegistry()
    for e in environment.images:
        registry.add(e.image, shown=e.shown, min_pixels=e.min_pixels, max_pixels=e.max_pixels)
    for image in prompt.images:
        sequence.show(image)
    sequence.ids = prompt.ids.tolist()
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(SEED), zlib.crc32(task.uid.encode()) >> 1), number)
    kinds, turn, logprobs, calls, spoken = [], [], {}, [], 0  # spoken: where the turn begins
    while True:
        at = len(sequence.ids) - len(prompt.ids)
        logits = log_softmax(sequence.logits().astype(np.float64) / TEMPERATURE)
        token = inverse_transform(logits, jax.random.uniform(jax.random.fold_in(key, at), (2,)))
        logprobs[at], text = logits[token], processor.decode([*turn, token])
        sequence.ids, turn, full = [*sequence.ids, token], [*turn, token], at + 1 == room
        if not text.endswith(("<|im_end|>", "<|endoftext|>", "</tool_call>")) and not full:
            continue
        kinds, turn = kinds + kinds_of(turn, processor.decode), []
        if "<tool_call>" not in text:
            answered = re.search(r"<answer>.*</answer>", text, re.DOTALL)
            end = EndReason.ANSWERED if answered else EndReason.TRUNCATED if full else EndReason.VOID
            return sequence, kinds, end, logprobs
        if full and not text.endswith("</tool_call>"):
            return sequence, kinds, EndReason.TRUNCATED, logprobs
        if len(calls) == 2:
            return sequence, kinds, EndReason.OVER_TURNS, logprobs
        result = execute(engine.tools, text, registry, engine.settings)
        call = result.status == CallStatus.EXECUTED and (result.name, result.arguments)
        if call and call in calls:
            return sequence, kinds, EndReason.REPEATED, logprobs
        if not call:
            kinds[spoken:] = [TokenKind.INVALID_CALL if k == TokenKind.TOOL_CALL else k for k in kinds[spoken:]]
        calls.append(call)
        chat = "<|im_end|>\n<|im_start|>user\n<tool_response>\n"
        images = [engine.processor.prepare(e.image, e.min_pixels, e.max_pixels) for e in map(registry.__getitem__, result.images)]
        sizes = iter(images)
        for part in result.parts:
            pads = None if isinstance(part, str) else "<|image_pad|>" * (len(next(sizes).patches) // 4)
            chat += f"{part}\n" if pads is None else f"<|vision_start|>{pads}<|vision_end|>\n"
        shown = processor.encode(Markup(chat + "</tool_response><|im_end|>\n<|im_start|>assistant\n"))
        if at + 1 + len(shown) >= room:
            return sequence, kinds, EndReason.TRUNCATED, logprobs
        for image in images:
            sequence.show(image)
        sequence.ids, kinds = sequence.ids + shown, kinds + [TokenKind.OBSERVATION] * len(shown)
        spoken = len(kinds)


@pytest.mark.slow(60)
def test_trajectories_equal_those_sampled_one_row_at_a_time(parts, monkeypatch):
    """At another temperature, with other chunks, limits and room for images than the defaults; with tools of random delay."""
    delays, step = np.random.default_rng(0), ToolEnvironment.step
    monkeypatch.setattr(ToolEnvironment, "step", lambda *args: (time.sleep(delays.uniform(0, 0.05)), step(*args))[1])
    tasks = [task_at(31, "train", i) for i in range(TASKS)]
    engine = Collector(parts.model, parts.processor, parts.tools, small_config(**SETTINGS))
    batch = engine.collect(
        parts.params, tasks, group_size=2, seed=SEED + 2**32, temperature=TEMPERATURE, slots=8
    )  # fmt: skip
    ends, kinds_seen = Counter(), Counter()
    for i, (task, group, prompt) in enumerate(zip(tasks, batch.trajectories, batch.prompts, strict=True)):
        t = group[i % 2]
        sequence, kinds, end, logprobs = plain_rollout(engine, parts.params, task, i % 2)
        assert sequence.ids == [*prompt.ids, *t.ids], task.uid
        assert (kinds, end) == (t.kind.tolist(), t.end) and (t.task, t.rollout) == (task, i % 2)
        np.testing.assert_allclose(t.logprobs[list(logprobs)], list(logprobs.values()), atol=1e-4)
        assert np.count_nonzero(t.logprobs) <= len(logprobs) == sum(turn.stop - turn.start for turn in t.turns)
        whole = mrope_positions(np.asarray(sequence.ids), parts.processor.image_token_id, sequence.grids, 2)[0]
        np.testing.assert_array_equal(np.concatenate([prompt.positions, t.positions], axis=1), whole)
        ends[end], kinds_seen = ends[end] + 1, kinds_seen + Counter(kinds)
    assert min(ends[e] for e in (EndReason.ANSWERED, EndReason.OVER_TURNS, EndReason.REPEATED)) >= 1
    assert min(kinds_seen[kind] for kind in TokenKind if kind != TokenKind.PAD) > 0
    assert len(batch.store.pages.device) == 2 < len(batch.store.pages)
    assert batch.sampled_tokens == sum((t.kind != TokenKind.OBSERVATION).sum() for group in batch.trajectories for t in group)
