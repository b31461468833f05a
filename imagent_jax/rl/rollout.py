"""Rollouts: N tasks x G rollouts, many turns, tools on the host, observations appended to the kept cache."""

import io
import re
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import jax
import numpy as np
from flax import nnx
from PIL import Image

from imagent_jax.config import Config
from imagent_jax.data.task import Task
from imagent_jax.model.features import FeatureStore
from imagent_jax.model.images import PreparedImage, smart_resize, to_rgb
from imagent_jax.model.interleave import Encoded, encode_parts, pad_prompts
from imagent_jax.model.processor import Processor
from imagent_jax.model.qwen2_vl import Model
from imagent_jax.rl import sampler
from imagent_jax.rl.trajectory import EndReason, TokenKind, Trajectory, Turn
from imagent_jax.tools import CallStatus, ImageRegistry, ToolSet, ToolSettings

TURN_END = "<|im_end|>\n"
ASSISTANT = "<|im_start|>assistant\n"


@dataclass
class Row:
    """Host-side record of one rollout in progress."""

    task: Task
    rollout: int
    registry: ImageRegistry
    turns: list[Turn] = field(default_factory=list)
    kinds: list[np.ndarray] = field(default_factory=list)
    positions: list[np.ndarray] = field(default_factory=list)
    vision: list[np.ndarray] = field(default_factory=list)
    seen: int = 0  # tokens of the response already accounted for
    position: int = 0
    calls: dict[str, int] = field(default_factory=dict)
    end: EndReason | None = None
    error: str | None = None


@dataclass
class RolloutBatch:
    """What a rollout returns: G trajectories per task, the encoded prompts and the encoded images behind both."""

    tasks: list[Task]
    prompts: list[Encoded]
    prompt_vision: list[np.ndarray]
    trajectories: list[list[Trajectory]]
    store: FeatureStore
    times: dict[str, float]
    sampled_tokens: int
    image_token_id: int


class RolloutEngine:
    """Runs rollouts of a fixed shape; all that is random is a function of (seed, task uid, rollout, token)."""

    def __init__(self, model: Model, processor: Processor, tools: ToolSet, cfg: Config):
        self.model, self.processor, self.tools, self.cfg = model, processor, tools, cfg
        self.settings = tool_settings(cfg, processor)
        self.system = tools.system_prompt(cfg.tools.system, self.settings)
        markers = ("<|im_end|>", "<|endoftext|>", "</tool_call>")
        stops = [ids for ids in (processor.encode(marker) for marker in markers) if len(ids) <= sampler.STOP_WIDTH]
        self.stops = np.full((len(stops), sampler.STOP_WIDTH), -1, np.int32)
        for row, ids in zip(self.stops, stops, strict=True):
            row[-len(ids) :] = ids

    # ---- prompts -------------------------------------------------------------------------------------------------

    def prepare(self, registry: ImageRegistry, number: int) -> PreparedImage:
        """Image `number` in the size its registry says the policy sees."""
        entry = registry[number]
        return self.processor.prepare(entry.image, min_pixels=entry.min_pixels, max_pixels=entry.max_pixels)

    def open_registry(self, task: Task) -> ImageRegistry:
        """The given images of a task, numbered from 1, with the size the policy sees them at.

        Raises:
            ValueError: an image does not decode; the sentence names the task and the image.
        """
        cfg, registry = self.cfg.images, ImageRegistry()
        for number, data in enumerate(task.images, 1):
            try:
                image = to_rgb(Image.open(io.BytesIO(data)))
                shown = smart_resize(image.height, image.width, self.settings.patch_factor, cfg.min_pixels, cfg.max_pixels)
            except (OSError, ValueError) as error:
                raise ValueError(f"Task {task.uid}: Image {number} cannot be used ({error}); mend or drop it.") from error
            registry.add(image, shown=shown, min_pixels=cfg.min_pixels, max_pixels=cfg.max_pixels)
        return registry

    def open_task(self, task: Task) -> tuple[Encoded, ImageRegistry]:
        """The prompt of a task, and a registry of its images.

        Raises:
            ValueError: the prompt does not fit `rollout.prompt_tokens`; the sentence names the task.
        """
        registry = self.open_registry(task)
        text, parts = f"<|im_start|>system\n{self.system}{TURN_END}<|im_start|>user\n", []
        for number in range(1, len(task.images) + 1):
            parts += [f"{text}Image {number}: ", self.prepare(registry, number)]
            text = "\n"
        parts += [text, f"{task.question}{TURN_END}{ASSISTANT}"]  # two parts: a shared image list tokenises alone
        try:
            prompt = encode_parts(parts, self.processor)
        except ValueError as error:
            raise ValueError(f"Task {task.uid}: {error}") from error
        if len(prompt.ids) > self.cfg.rollout.prompt_tokens:
            raise ValueError(
                f"Task {task.uid} needs {len(prompt.ids)} prompt tokens, more than rollout.prompt_tokens="
                f"{self.cfg.rollout.prompt_tokens}; raise it, or lower images.max_pixels."
            )
        return prompt, registry

    # ---- the rollout ---------------------------------------------------------------------------------------------

    def rollout(
        self,
        params: nnx.State,
        tasks: Sequence[Task],
        *,
        group_size: int,
        seed: int,
        temperature: float = 1.0,
        greedy: bool = False,
    ) -> RolloutBatch:
        """`group_size` rollouts of every task, until each has ended.

        Raises:
            ValueError: a task whose prompt does not fit, or whose images do not match (the task is named).
        """
        cfg, clock = self.cfg, _Clock()
        n, g, p, r = len(tasks), group_size, cfg.rollout.prompt_tokens, cfg.rollout.response_tokens
        opened = [self.open_task(task) for task in tasks]
        prompts = [prompt for prompt, _ in opened]
        clock.lap("prepare")
        store = FeatureStore(self.model, params, cfg.images.pack_blocks, cfg.images.packs)
        first = iter(store.add([image for prompt in prompts for image in prompt.images]))
        prompt_vision = [prompt.vision([next(first) for _ in prompt.images]) for prompt in prompts]
        clock.lap("vision")
        ids, positions, vision = pad_prompts(prompts, prompt_vision, p)
        prompt_len = np.asarray([len(prompt.ids) for prompt in prompts], np.int32)
        next_position = np.asarray([prompt.next_position for prompt in prompts], np.int32)
        state, prompt_cache = sampler.start(
            self.model, g, r, params, ids, positions, vision, prompt_len, store.features, next_position
        )
        rows = [Row(task, i, registry.fork(), position=int(next_position[k]))
                for k, (task, (_, registry)) in enumerate(zip(tasks, opened, strict=True)) for i in range(g)]  # fmt: skip
        keys = row_keys(seed, rows)
        clock.lap("prefill", state.logits)
        while any(row.end is None for row in rows):
            state, _ = sampler.decode(
                self.model, greedy, params, state, prompt_cache, prompt_len, keys, self.stops, temperature,
                min(cfg.rollout.decode_chunk, r),
            )  # fmt: skip
            sampled, length, live = jax.device_get((state.ids, state.length, state.live))
            clock.lap("decode")
            waiting = [b for b, row in enumerate(rows) if row.end is None and not live[b]]
            observations = self._act(rows, waiting, sampled, length)
            clock.lap("tools")
            state = self._observe(params, state, prompt_cache, prompt_len, rows, observations, store)
            clock.lap("observe", state.logits)
        ids, logprobs = jax.device_get((state.ids, state.logprobs))
        done = [self._finish(row, ids[b], logprobs[b]) for b, row in enumerate(rows)]
        clock.lap("finish")
        trajectories = [done[k * g : (k + 1) * g] for k in range(n)]
        count = sum(turn.stop - turn.start for t in done for turn in t.turns)
        return RolloutBatch(
            list(tasks), prompts, prompt_vision, trajectories, store, clock.times, count, self.processor.image_token_id
        )

    def _act(self, rows: list[Row], waiting: list[int], sampled, length) -> dict[int, Encoded]:
        """Ends each stopped row's turn, runs its call if it made one; the observations by row."""
        callers, requests = [], []
        for b in waiting:
            row = rows[b]
            ids = sampled[b, row.seen : length[b]]
            text = self.processor.decode(ids)
            turn = Turn(row.seen, int(length[b]), text, None)
            row.turns.append(turn)
            row.seen = turn.stop
            row.positions.append(np.tile(row.position + np.arange(len(ids), dtype=np.int32), (3, 1)))
            row.position += len(ids)
            row.vision.append(np.full(len(ids), -1, np.int32))
            row.kinds.append(token_kinds(ids, text, self.processor))
            if "<tool_call>" in text:
                full = length[b] >= self.cfg.rollout.response_tokens and not text.endswith("</tool_call>")
                if full:
                    row.end = EndReason.TRUNCATED
                elif sum(turn.call is not None for turn in row.turns) >= self.cfg.tools.max_turns:
                    row.end = EndReason.OVER_TURNS
                else:
                    callers.append(b)
                    requests.append((text, row.registry))
            elif extract_answer(text) is not None:
                row.end = EndReason.ANSWERED
            elif length[b] >= self.cfg.rollout.response_tokens:
                row.end = EndReason.TRUNCATED
            else:
                row.end = EndReason.VOID
        results = self.tools.execute_many(requests, self.settings, self.cfg.tools.workers, self.cfg.tools.timeout_s)
        observations = {}
        for b, result in zip(callers, results, strict=True):
            if (encoded := self._respond(rows[b], result)) is not None:
                observations[b] = encoded
        return observations

    def _respond(self, row: Row, result) -> Encoded | None:
        """Books a finished call; its observation, or None where the trajectory ends with it."""
        row.turns[-1].call = result
        if result.status == CallStatus.FAULT:
            row.end, row.error = EndReason.FAULT, result.error
            return None
        if result.status == CallStatus.INVALID:
            kinds = row.kinds[-1]
            kinds[kinds == TokenKind.TOOL_CALL] = TokenKind.INVALID_CALL
        else:
            key = f"{result.name} {result.arguments}"
            row.calls[key] = row.calls.get(key, 0) + 1
            if row.calls[key] > self.cfg.tools.max_repeats:
                row.end = EndReason.REPEATED
                return None
        text, parts = f"{TURN_END}<|im_start|>user\n<tool_response>\n", []
        for part in result.parts:
            if isinstance(part, str):
                text += f"{part}\n"
            else:
                parts += [text, self.prepare(row.registry, part)]
                text = "\n"
        parts.append(f"{text}</tool_response>{TURN_END}{ASSISTANT}")
        try:
            encoded = encode_parts(parts, self.processor, row.position)
        except ValueError as error:
            raise ValueError(f"Task {row.task.uid}: {error}") from error
        if row.seen + len(encoded.ids) >= self.cfg.rollout.response_tokens:
            row.end = EndReason.TRUNCATED  # no room to say anything about it
            return None
        return encoded

    def _observe(self, params, state, prompt_cache, prompt_len, rows, observations: dict[int, Encoded], store):
        """Appends all observations in chunks of `rollout.observation_tokens`."""
        if not observations:
            return state
        first = iter(store.add([image for encoded in observations.values() for image in encoded.images]))
        s, b = self.cfg.rollout.observation_tokens, len(rows)
        longest = max(len(encoded.ids) for encoded in observations.values())
        for row, encoded in ((rows[i], e) for i, e in observations.items()):
            row.vision.append(encoded.vision([next(first) for _ in encoded.images]))
            row.kinds.append(np.full(len(encoded.ids), TokenKind.OBSERVATION, np.uint8))
            row.positions.append(encoded.positions)
            row.seen, row.position = row.seen + len(encoded.ids), encoded.next_position
        for begin in range(0, longest, s):
            ids, positions = np.zeros((b, s), np.int32), np.zeros((3, b, s), np.int32)
            vision, count, resume = np.full((b, s), -1, np.int32), np.zeros(b, np.int32), np.zeros(b, bool)
            for i, encoded in observations.items():
                c = count[i] = min(max(len(encoded.ids) - begin, 0), s)
                ids[i, :c] = encoded.ids[begin : begin + c]
                positions[:, i, :c] = encoded.positions[:, begin : begin + c]
                vision[i, :c] = rows[i].vision[-1][begin : begin + c]
                resume[i] = begin + s >= len(encoded.ids)
            state = sampler.observe(
                self.model, params, state, prompt_cache, prompt_len, ids, positions, vision, count, resume,
                store.features,
            )  # fmt: skip
        return state

    def _finish(self, row: Row, ids: np.ndarray, logprobs: np.ndarray) -> Trajectory:
        kinds = np.concatenate(row.kinds)
        shown = kinds == TokenKind.OBSERVATION
        return Trajectory(
            task=row.task,
            rollout=row.rollout,
            ids=ids[: row.seen].copy(),
            logprobs=np.where(shown, 0.0, logprobs[: row.seen]).astype(np.float32),
            kind=kinds,
            positions=np.concatenate(row.positions, axis=1),
            vision=np.concatenate(row.vision),
            turns=row.turns,
            end=row.end,
            answer=extract_answer(row.turns[-1].text) if row.end == EndReason.ANSWERED else None,
            registry=row.registry,
            error=row.error,
        )


class _Clock:
    """Seconds by phase; a lap that names an array waits for it first."""

    def __init__(self):
        self.times: dict[str, float] = {}
        self.last = time.perf_counter()

    def lap(self, name: str, wait=None) -> None:
        jax.block_until_ready(wait)
        now = time.perf_counter()
        self.times[name] = self.times.get(name, 0.0) + now - self.last
        self.last = now


def tool_settings(cfg: Config, processor: Processor) -> ToolSettings:
    """How tools show images, from the configuration and the model's patch geometry."""
    t = cfg.tools
    return ToolSettings(
        coordinates=t.coordinates, patch_factor=processor.patch_size * processor.merge_size, low_pixels=t.low_pixels,
        high_pixels=t.high_pixels, confirm_min_pixels=t.confirm_min_pixels, confirm_max_pixels=t.confirm_max_pixels,
        min_box=t.min_box, max_images=t.max_images,
    )  # fmt: skip


def row_keys(seed: int, rows: Sequence[Row]) -> jax.Array:
    """One random key a row, a function of (seed, task uid, rollout)."""
    uids = np.asarray([zlib.crc32(row.task.uid.encode()) for row in rows], np.uint32)
    rollouts = np.asarray([row.rollout for row in rows], np.uint32)
    return _fold(jax.random.key(seed), uids, rollouts)


@jax.jit
def _fold(key, uids, rollouts):
    return jax.vmap(lambda u, i: jax.random.fold_in(jax.random.fold_in(key, u), i))(uids, rollouts)


def token_kinds(ids: np.ndarray, text: str, processor: Processor) -> np.ndarray:
    """The kind of every sampled token of a turn: from `<tool_call>` on TOOL_CALL, the `<answer>` span ANSWER, else TEXT."""
    kinds = np.full(len(ids), TokenKind.TEXT, np.uint8)
    if "<tool_call>" in text:
        kinds[_first_token(ids, "<tool_call>", processor) :] = TokenKind.TOOL_CALL
    elif "<answer>" in text and "</answer>" in text:
        end = _first_token(ids, "</answer>", processor, end=True)
        kinds[_first_token(ids, "<answer>", processor) : end + 1] = TokenKind.ANSWER
    return kinds


def _first_token(ids: np.ndarray, marker: str, processor: Processor, end: bool = False) -> int:
    """Index of the token with which `marker` begins (or ends) in the decoded text."""
    low, high = 0, len(ids) - 1  # smallest prefix whose text holds the marker: its last token completes the marker
    while low < high:
        middle = (low + high) // 2
        if marker in processor.decode(ids[: middle + 1]):
            high = middle
        else:
            low = middle + 1
    if end:
        return low
    first = low
    while first > 0 and marker not in processor.decode(ids[first : low + 1]):
        first -= 1
    return first


def extract_answer(text: str) -> str | None:
    """What stands in the last `<answer>…</answer>` of a turn; None where there is none."""
    answers = re.findall(r"<answer>((?:(?!<answer>).)*?)</answer>", text, re.DOTALL)
    return answers[-1].strip() if answers else None
