"""Rollouts: N tasks x G rollouts, many turns, tools on the host, observations appended to the kept cache."""

import contextlib
import io
import itertools
import re
import time
import zlib
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx
from PIL import Image

from imagent_jax import hosts
from imagent_jax.config import Config
from imagent_jax.data.task import Task
from imagent_jax.model.features import COUNTS, FeatureStore
from imagent_jax.model.images import PreparedImage, fit_budget, to_rgb
from imagent_jax.model.interleave import Encoded, encode_parts, pad_prompts
from imagent_jax.model.processor import Processor
from imagent_jax.model.qwen2_vl import Model
from imagent_jax.model.sharding import rollout_params
from imagent_jax.rl import sampler
from imagent_jax.rl.trajectory import EndReason, TokenKind, Trajectory, Turn
from imagent_jax.tools import CallResult, CallStatus, ImageEntry, ImageRegistry, ToolSet, ToolSettings
from imagent_jax.tools.pool import CallPool

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

    def book_observation(self, encoded: Encoded, vision: np.ndarray) -> None:
        """Adds what a call showed, its images' feature rows being `vision` (int32 [S])."""
        self.kinds.append(np.full(len(encoded.ids), TokenKind.OBSERVATION, np.uint8))
        self.positions.append(encoded.positions)
        self.vision.append(vision)
        self.seen, self.position = self.seen + len(encoded.ids), encoded.next_position


@dataclass
class RolloutBatch:
    """What a rollout returns: G trajectories per task, the encoded prompts and the encoded images behind both."""

    tasks: list[Task]
    prompts: list[Encoded]
    prompt_vision: list[np.ndarray]
    trajectories: list[list[Trajectory]]
    store: FeatureStore | SimpleNamespace
    times: dict[str, float]
    sampled_tokens: int
    image_token_id: int


class Weights(NamedTuple):
    """Parameters as rollouts read them: `sharding.rollout_params`."""

    params: nnx.State


class Stopped(Exception):
    """Rollouts were given up, because `RolloutEngine.stop` said so."""


class RolloutEngine:
    """Runs rollouts of a fixed shape; all that is random is a function of (seed, task uid, rollout, token).

    Attributes:
        look: what the policy is shown in place of an image (registry, entry, is it an observation?); None: the image.
        stop: asked before every chunk of tokens; once it says True, rollouts are given up (`Stopped`).
    """

    look: Callable[[ImageRegistry, ImageEntry, bool], Image.Image] | None = None
    stop: Callable[[], bool] = staticmethod(lambda: False)

    def __init__(self, model: Model, processor: Processor, tools: ToolSet, cfg: Config):
        self.model, self.processor, self.tools, self.cfg = model, processor, tools, cfg
        self.settings = tool_settings(cfg, processor)
        self.warm: set[tuple] = set()  # shapes of rollouts whose programs are compiled
        self.system = tools.system_prompt(cfg.tools.system, self.settings)
        markers = ("<|im_end|>", "<|endoftext|>", "</tool_call>")
        stops = [ids for ids in (processor.encode(marker) for marker in markers) if len(ids) <= sampler.STOP_WIDTH]
        self.opener, self.opened = ThreadPoolExecutor(cfg.tools.workers, "prompts"), {}  # prompts begun ahead, by task
        self.stops = np.full((len(stops), sampler.STOP_WIDTH), -1, np.int32)
        for row, ids in zip(self.stops, stops, strict=True):
            row[-len(ids) :] = ids

    # ---- prompts -------------------------------------------------------------------------------------------------

    def prepare(self, registry: ImageRegistry, number: int, observed: bool = False) -> PreparedImage:
        """Image `number` in the size its registry says the policy sees. `observed`: a call shows it."""
        entry = registry[number]
        image = self.look(registry, entry, observed) if self.look else entry.image
        return self.processor.prepare(image, min_pixels=entry.min_pixels, max_pixels=entry.max_pixels)

    def open_registry(self, task: Task) -> ImageRegistry:
        """The given images of a task, numbered from 1, with the size the policy sees them at.

        Raises:
            ValueError: an image does not decode; the sentence names the task and the image.
        """
        cfg, s, registry = self.cfg.images, self.settings, ImageRegistry()
        for number, data in enumerate(task.images, 1):
            try:
                image = to_rgb(Image.open(io.BytesIO(data)))
                shown, low, high = fit_budget(
                    (image.height, image.width), s.patch_factor, cfg.min_pixels, cfg.max_pixels, s.most_pixels
                )
            except (OSError, ValueError) as error:
                raise ValueError(f"Task {task.uid}: Image {number} cannot be used ({error}); mend or drop it.") from error
            registry.add(image, shown=shown, min_pixels=low, max_pixels=high)
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

    def open_ahead(self, tasks: Sequence[Task]) -> None:
        """Begins to open tasks, these very objects, that a later rollout of this process is of; one that fails says so then."""
        self.opened = {id(task): self.opener.submit(self.open_task, task) for task in hosts.share(tasks)}

    # ---- the rollout ---------------------------------------------------------------------------------------------

    def weights(self, params: nnx.State) -> Weights:
        """The copy that rollouts read; the parameters may change while it is read."""
        return Weights(rollout_params(self.model.dtype, params))

    def rollout(
        self,
        params: nnx.State | Weights,
        tasks: Sequence[Task],
        *,
        group_size: int,
        seed: int,
        temperature: float = 1.0,
        greedy: bool = False,
        slots: int | None = None,
        packs: int | None = None,
    ) -> RolloutBatch:
        """`group_size` rollouts of every task, until each has ended. Of several processes each runs its share, with its own
        tools and images, on its own devices; they return the same batch, whose images only their own process has.

        Args:
            slots: groups in progress at a time (default: all tasks); a finished group's slot goes to the next task.
            packs: see `FeatureStore` (default: `images.packs`).

        Raises:
            ValueError: a task whose prompt does not fit, or whose images do not match (the task is named).
            Stopped: see `stop`.
        """
        params = (params if isinstance(params, Weights) else self.weights(params)).params
        sampling = seed, temperature, greedy
        if jax.process_count() == 1:
            return self._rollout(params, tasks, group_size, sampling, slots or len(tasks), packs)
        own, part, room = None, hosts.share(tasks), -(-(slots or len(tasks)) // jax.process_count())
        params = hosts.own_copy(params)
        with contextlib.suppress(Stopped), hosts.alone():
            own = self._rollout(params, part, group_size, sampling, room, packs)
        if any(hosts.gather(own is None)):
            raise Stopped
        return join_batches(own, tasks)

    def _rollout(self, params, tasks, group_size: int, sampling, slots: int, packs: int | None) -> RolloutBatch:
        """On the current mesh."""
        frozen = self.cfg.model.freeze_vision and not self.cfg.lora.merger
        store = FeatureStore(
            self.model, params, self.cfg.images.pack_blocks, packs or self.cfg.images.packs, remainders=frozen
        )
        run = _Run(self, params, store, list(tasks), group_size, slots, sampling)
        run.to_the_end()
        store.params = None  # it encodes no more: gathered parameters are not kept while training
        done = run.done
        count = sum(turn.stop - turn.start for group in done for t in group.trajectories for turn in t.turns)
        return RolloutBatch(
            list(tasks), [group.prompt for group in done], [group.vision for group in done],
            [group.trajectories for group in done], store, run.clock.times, count, self.processor.image_token_id,
        )  # fmt: skip

    def end_turn(self, row: Row, ids: np.ndarray) -> str | None:
        """Books the sampled tokens of a turn. The call that it makes, as text; None where the trajectory ended with it."""
        text, length = self.processor.decode(ids), row.seen + len(ids)
        row.turns.append(Turn(row.seen, length, text, None))
        row.seen = length
        row.positions.append(np.tile(row.position + np.arange(len(ids), dtype=np.int32), (3, 1)))
        row.position += len(ids)
        row.vision.append(np.full(len(ids), -1, np.int32))
        row.kinds.append(token_kinds(ids, text, self.processor))
        full = length >= self.cfg.rollout.response_tokens
        if "<tool_call>" in text:
            if full and not text.endswith("</tool_call>"):
                row.end = EndReason.TRUNCATED
            elif sum(turn.call is not None for turn in row.turns) >= self.cfg.tools.max_turns:
                row.end = EndReason.OVER_TURNS
            else:
                return text
        elif extract_answer(text) is not None:
            row.end = EndReason.ANSWERED
        else:
            row.end = EndReason.TRUNCATED if full else EndReason.VOID
        return None

    def respond(self, row: Row, result) -> Encoded | None:
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
                parts += [text, self.prepare(row.registry, part, observed=True)]
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


def quarters(slots: int, group_size: int) -> tuple[int, int]:
    """Slots admitted at once (a divisor of `slots`) and rows observed at once: at most, and about, a quarter of either."""
    return max(d for d in range(1, -(-slots // 4) + 1) if slots % d == 0), -(-slots * group_size // 4)


def join_batches(own: RolloutBatch, tasks: Sequence[Task]) -> RolloutBatch:
    """The batch of all `tasks`, of which this process has rolled out its share: the others' trajectories come without
    images, and everybody's encoded images are stacked, on the current mesh."""
    rows = max(hosts.gather(own.store.features.shape[0]))
    features, first = hosts.stack_rows(own.store.features, rows)

    def moved(vision):
        return np.where(vision >= 0, vision + first, -1).astype(np.int32)

    own.prompt_vision = [moved(vision) for vision in own.prompt_vision]
    for t in (t for group in own.trajectories for t in group):
        t.vision = moved(t.vision)
    light = replace(
        own, tasks=[], store=SimpleNamespace(**{name: getattr(own.store, name) for name in COUNTS}),
        prompts=[prompt._replace(images=[]) for prompt in own.prompts],
        trajectories=[[replace(t, registry=None, task=replace(t.task, images=())) for t in group] for group in own.trajectories],
    )  # fmt: skip
    everyone = hosts.gather(light)
    everyone[jax.process_index()].trajectories = own.trajectories

    def chain(name):
        return [item for one in everyone for item in getattr(one, name)]

    return RolloutBatch(
        list(tasks), chain("prompts"), chain("prompt_vision"), chain("trajectories"),
        SimpleNamespace(features=features, **{name: sum(getattr(one.store, name) for one in everyone) for name in COUNTS}),
        {name: max(one.times.get(name, 0.0) for one in everyone) for name in everyone[0].times},
        sum(one.sampled_tokens for one in everyone), own.image_token_id,
    )  # fmt: skip


@dataclass
class _Group:
    """A task in its slot, and what came of it."""

    index: int
    prompt: Encoded
    vision: np.ndarray
    rows: list[Row]
    trajectories: list[Trajectory] = field(default_factory=list)


class _Run:
    """One call of `RolloutEngine.rollout`: the schedule.

    Slots are filled, live rows decode a chunk of tokens, calls run on the pool meanwhile, observations are appended, and
    a finished group makes room. Observations are of a quarter of the batch, and stragglers are decoded on a quarter or a
    sixteenth of it; while responses are short, on the first half of their cache. What is
    done when depends on sampled tokens only, not on how long a tool took (up to `tools.patience_s`), so that a run
    repeats to the bit.
    """

    def __init__(self, engine: RolloutEngine, params, store, tasks: list[Task], group_size: int, slots: int, sampling):
        self.engine, self.params, self.store, self.tasks, self.g = engine, params, store, tasks, group_size
        self.cfg, self.model = engine.cfg, engine.model
        self.seed, self.temperature, self.greedy = sampling
        self.slots, self.rows = slots, slots * group_size
        self.admitted, self.few = quarters(slots, group_size)
        r = self.cfg.rollout.response_tokens
        least = max(-(-self.few // 4), min(2, self.few))  # one row, or half of a short cache, is not worth its compilation
        self.sizes, self.widths = sorted({least, self.few, self.rows}), sorted({-(-r // 2) if r >= 128 else r, r})
        self.state = sampler.empty(
            self.model, slots, group_size, self.cfg.rollout.prompt_tokens, self.cfg.rollout.response_tokens
        )
        self.live, self.length = np.zeros(self.rows, bool), np.zeros(self.rows, int)
        self.queue, self.opened = deque(range(len(tasks))), deque()  # tasks to come; those with their images encoded
        self.groups, self.free = {}, list(range(slots))
        self.pool = CallPool(engine.tools, engine.settings, self.cfg.tools.workers, self.cfg.tools.timeout_s)
        self.calling: deque[int] = deque()  # rows whose calls run, oldest first
        self.late: set[int] = set()  # those whose calls were waited for in vain
        self.results: dict[int, CallResult] = {}
        self.done: list[_Group] = [None] * len(tasks)
        self.clock = _Clock()
        if (shape := (slots, group_size, self.greedy, store.features.shape)) not in engine.warm:
            engine.warm.add(shape)
            self._compile()

    def _compile(self) -> None:
        """Every shape that may come up, so that none is compiled later."""
        self.store.warm()
        for size, width in itertools.product(self.sizes, self.widths):
            self._step(np.zeros(0, int), size, width, 0)
        self.clock.lap("compile", self.state.logits)

    def to_the_end(self) -> None:
        while self.queue or self.opened or self.groups:
            while (self.queue or self.opened) and (len(self.free) >= self.admitted or not self.groups):
                self._admit()
            while due := self._due():
                self._observe(due)
            if self.engine.stop():
                raise Stopped
            if self.live.any():
                self._decode()
            self._collect()

    def row(self, b: int) -> Row:
        return self.groups[b // self.g].rows[b % self.g]

    def _padded(self, rows: Sequence[int], size: int, none: int) -> np.ndarray:
        return np.asarray([*rows, *[none] * (size - len(rows))], np.int32)

    def _prepare(self) -> None:
        """Opens the next tasks, as many as one pack of images holds, and encodes their images together."""
        opened, patches = [], [0]
        while self.queue and (len(opened) < self.admitted or sum(patches) + max(patches) <= self.store.pack):
            index = self.queue.popleft()
            begun = self.engine.opened.pop(id(self.tasks[index]), None)
            opened.append((index, *(begun.result() if begun else self.engine.open_task(self.tasks[index]))))
            patches.append(sum(len(image.patches) for image in opened[-1][1].images))
        self.clock.lap("prepare")
        first = iter(self.store.add([image for _, prompt, _ in opened for image in prompt.images]))
        for index, prompt, registry in opened:
            self.opened.append((index, prompt, registry, prompt.vision([next(first) for _ in prompt.images])))
        self.clock.lap("vision", self.store.features)

    def _admit(self) -> None:
        """The next tasks into free slots."""
        if len(self.opened) < self.admitted:
            self._prepare()
        slots = self.free[: min(self.admitted, len(self.opened))]
        admitted = [self.opened.popleft() for _ in slots]
        self.free = self.free[len(slots) :]
        for slot, (index, prompt, registry, vision) in zip(slots, admitted, strict=True):
            rows = [Row(self.tasks[index], i, registry.fork(), position=prompt.next_position) for i in range(self.g)]
            self.groups[slot] = _Group(index, prompt, vision, rows)
            self.live[slot * self.g : (slot + 1) * self.g] = True
            self.length[slot * self.g : (slot + 1) * self.g] = 0
        indices, prompts, _, vision = map(list, zip(*admitted, strict=True))
        more = self.admitted - len(prompts)  # filled up with repeats that go nowhere
        ids, positions, shown = pad_prompts(
            prompts + prompts[:1] * more, vision + vision[:1] * more, self.cfg.rollout.prompt_tokens
        )

        def column(values):
            return self._padded(values, self.admitted, 1)

        self.state = sampler.admit(
            self.model, self.params, self.state, self._padded(slots, self.admitted, self.slots), ids, positions, shown,
            column([len(prompt.ids) for prompt in prompts]), column([prompt.next_position for prompt in prompts]),
            column([zlib.crc32(self.tasks[i].uid.encode()) >> 1 for i in indices]),
            np.uint32(self.seed % 2**32), self.store.features,
        )  # fmt: skip
        self.clock.lap("prefill", self.state.logits)

    def _decode(self) -> None:
        """A chunk of tokens for all live rows; turns that ended are booked and their calls begun."""
        rows, steps = np.flatnonzero(self.live), self.cfg.rollout.decode_chunk
        longest = min(self.length[rows].max() + steps, self.widths[-1])
        size, width = (next(n for n in sizes if n >= least) for sizes, least in ((self.sizes, len(rows)), (self.widths, longest)))
        self._step(rows, size, width, steps)
        ids, length, live = jax.device_get((self.state.ids, self.state.length, self.state.live))
        self.clock.lap("decode")
        for b in rows[~live[rows]]:
            row = self.row(b)
            text = self.engine.end_turn(row, ids[b, row.seen : length[b]])
            if text is not None:
                self.pool.submit(int(b), text, row.registry)
                self.calling.append(int(b))
        self.live, self.length = live.copy(), length.copy()
        self.clock.lap("host")

    def _step(self, rows: np.ndarray, size: int, width: int, steps: int) -> None:
        """Decodes these rows among `size` on `width` tokens of the cache, until fewer rows would do."""
        some = self._padded(rows, size, self.rows) if size < self.rows else None
        enough = max((s for s in self.sizes if s < size), default=0)
        self.state = sampler.decode(
            self.model, self.greedy, width, self.params, self.state, some, self.engine.stops, self.temperature, steps, enough
        )

    def _due(self) -> list[int]:
        """Rows whose observations come next: those that called first, as soon as they are a quarter of the batch or
        nothing else is left to do. Their calls are waited for, but while others could go on only for
        `tools.patience_s`; what is slower than that comes whenever it is there."""
        self.results.update(self.pool.poll())
        waiting = [b for b in self.calling if b not in self.late or b in self.results]
        if len(waiting) < self.few and self.live.any():
            return []
        waiting = (waiting or list(self.calling))[: self.few]
        give_up = time.perf_counter() + self.cfg.tools.patience_s
        while any(b not in self.results for b in waiting):
            self.results.update(self.pool.poll(0.1))
            others = self.live.any() or any(b in self.results for b in waiting)
            if others and time.perf_counter() > give_up:
                self.late.update(b for b in waiting if b not in self.results)
                break
        self.clock.lap("tools")
        due = [b for b in waiting if b in self.results]
        self.calling = deque(b for b in self.calling if b not in due)
        self.late.difference_update(due)
        return due

    def _observe(self, rows: list[int]) -> None:
        """Appends what the calls of these rows showed, in chunks of `rollout.observation_tokens`."""
        responses = {b: self.engine.respond(self.row(b), self.results.pop(b)) for b in rows}
        observations = {b: encoded for b, encoded in responses.items() if encoded is not None}
        if not observations:
            return
        first = iter(self.store.add([image for encoded in observations.values() for image in encoded.images]))
        self.clock.lap("vision", self.store.features)
        s, f = self.cfg.rollout.observation_tokens, self.few
        for b, encoded in observations.items():
            self.row(b).book_observation(encoded, encoded.vision([next(first) for _ in encoded.images]))
            self.live[b], self.length[b] = True, self.row(b).seen
        index = self._padded(list(observations), f, self.rows)
        for begin in range(0, max(len(encoded.ids) for encoded in observations.values()), s):
            ids, positions = np.zeros((f, s), np.int32), np.zeros((3, f, s), np.int32)
            vision, count, resume = np.full((f, s), -1, np.int32), np.zeros(f, np.int32), np.zeros(f, bool)
            for i, (b, encoded) in enumerate(observations.items()):
                c = count[i] = min(max(len(encoded.ids) - begin, 0), s)
                ids[i, :c] = encoded.ids[begin : begin + c]
                positions[:, i, :c] = encoded.positions[:, begin : begin + c]
                vision[i, :c] = self.row(b).vision[-1][begin : begin + c]
                resume[i] = begin + s >= len(encoded.ids)
            self.state = sampler.observe(
                self.model, self.params, self.state, index, ids, positions, vision, count, resume, self.store.features
            )
        self.clock.lap("observe", self.state.logits)

    def _collect(self) -> None:
        """Takes finished groups out of their slots."""
        ended = [slot for slot, group in self.groups.items() if all(row.end is not None for row in group.rows)]
        if not ended:
            return
        ids, logprobs = jax.device_get((self.state.ids, self.state.logprobs))
        for slot in ended:
            group = self.groups.pop(slot)
            group.trajectories = [
                _trajectory(row, ids[b], logprobs[b]) for b, row in enumerate(group.rows, slot * self.g)
            ]
            self.done[group.index] = group
        self.free = sorted(self.free + ended)
        self.clock.lap("host")


def _trajectory(row: Row, ids: np.ndarray, logprobs: np.ndarray) -> Trajectory:
    kinds = np.concatenate(row.kinds)
    return Trajectory(
        task=row.task,
        rollout=row.rollout,
        ids=ids[: row.seen].copy(),
        logprobs=np.where(kinds == TokenKind.OBSERVATION, 0.0, logprobs[: row.seen]).astype(np.float32),
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
        min_box=t.min_box, max_images=t.max_images, most_pixels=cfg.images.vision_block * processor.patch_size**2,
    )  # fmt: skip


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
