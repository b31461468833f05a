"""The schedule of a rollout: which rows are decoded, observed and finished when."""

import itertools
import time
import zlib
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial

import jax
import numpy as np

from imagent_jax.model.interleave import Encoded, pad_prompts
from imagent_jax.rollout import sampler
from imagent_jax.rollout.turns import Row
from imagent_jax.tools.pool import CallPool
from imagent_jax.types import CallResult, Task, Trajectory


class Stopped(Exception):
    """Rollouts were given up, because `RolloutEngine.stop` said so."""


def quarters(slots: int, group_size: int) -> tuple[int, int]:
    """Slots admitted at once (a divisor of `slots`) and rows observed at once (a multiple of `sampler.parts`): about a quarter
    of either."""
    parts = sampler.parts(slots)
    return max(d for d in range(1, -(-slots // 4) + 1) if slots % d == 0), -(-slots * group_size // (4 * parts)) * parts


@dataclass
class Group:
    """A task in its slot, and what came of it."""

    index: int
    prompt: Encoded
    vision: np.ndarray
    rows: list[Row]
    trajectories: list[Trajectory] = field(default_factory=list)


class Schedule:
    """One call of `RolloutEngine.rollout`: the schedule.

    Slots are filled, live rows decode a chunk of tokens, calls run on the pool meanwhile, observations are appended, and
    a finished group makes room. Observations are of a quarter of the batch, and stragglers are decoded on a quarter or a
    sixteenth of it; while responses are short, on the first half of their cache. What is done when depends on sampled
    tokens only, not on how long a tool took (up to `tools.patience_s`), so that a run repeats to the bit.
    """

    def __init__(self, engine, params, store, tasks: list[Task], group_size: int, slots: int, sampling):
        self.engine, self.params, self.store, self.tasks, self.g = engine, params, store, tasks, group_size
        self.cfg, self.model = engine.cfg, engine.model
        self.seed, self.temperature, self.greedy = sampling
        self.slots, self.rows = slots, slots * group_size
        self.parts, (self.admitted, self.few) = sampler.parts(slots), quarters(slots, group_size)
        r = self.cfg.rollout.response_tokens
        least = max(-(-self.few // 4), min(2, self.few))  # one row, or half of a short cache, is not worth its compilation
        least = -(-least // self.parts) * self.parts
        self.sizes, self.widths = sorted({least, self.few, self.rows}), sorted({-(-r // 2) if r >= 128 else r, r})
        self.state = sampler.empty(
            self.model, slots, group_size, self.cfg.rollout.prompt_tokens, self.cfg.rollout.response_tokens
        )
        self.live, self.length = np.zeros(self.rows, bool), np.zeros(self.rows, int)
        self.queue, self.opened = deque(range(len(tasks))), deque()  # tasks to come; those with their images encoded
        self.groups, self.free = {}, list(range(slots))
        see = partial(engine.prepare, observed=True)  # beside decoding
        self.pool = CallPool(engine.tools, engine.settings, self.cfg.tools.workers, self.cfg.tools.timeout_s, see)
        self.calling: deque[int] = deque()  # rows whose calls run, oldest first
        self.late: set[int] = set()  # those whose calls were waited for in vain
        self.results: dict[int, CallResult] = {}
        self.done: list[Group] = [None] * len(tasks)
        self.clock = _Clock()
        if (shape := (slots, group_size, self.greedy, store.features.shape)) not in engine.compiled:
            engine.compiled.add(shape)
            self._compile()

    def _compile(self) -> None:
        """Every shape that may come up, so that none is compiled later."""
        self.store.compile()
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

    def _padded(self, values: Sequence[int], size: int, none: int) -> np.ndarray:
        return np.asarray([*values, *[none] * (size - len(values))], np.int32)

    def _places(self, rows: Iterable[int], size: int) -> tuple[np.ndarray, dict[int, int]]:
        """Rows among `size` as the sampler names them (`sampler.parts`), and where each stands; those that find no room, the
        later ones, are left out."""
        own, room = self.rows // self.parts, size // self.parts
        index, at, taken = np.full(size, own, np.int32), {}, Counter()
        for b in map(int, rows):
            part = b // own
            if taken[part] < room:
                at[b] = part * room + taken[part]
                index[at[b]] = b % own
                taken[part] += 1
        return index, at

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
            self.groups[slot] = Group(index, prompt, vision, rows)
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
        size = next(size for size in self.sizes if len(self._places(rows, size)[1]) == len(rows))
        self._step(rows, size, next(width for width in self.widths if width >= longest), steps)
        ids, length, live = jax.device_get((self.state.ids, self.state.length, self.state.live))
        self.clock.lap("decode")
        for b in rows[~live[rows]].tolist():
            row = self.row(b)
            text = self.engine.end_turn(row, ids[b, row.seen : length[b]])
            if text is not None:
                self.pool.submit(b, text, row.registry)
                self.calling.append(b)
        self.live, self.length = live.copy(), length.copy()
        self.clock.lap("host")

    def _step(self, rows: np.ndarray, size: int, width: int, steps: int) -> None:
        """Decodes these rows among `size` on `width` tokens of the cache, until fewer rows would do."""
        some = self._places(rows, size)[0] if size < self.rows else None
        enough = max((s for s in self.sizes if s < min(size, len(rows))), default=0)
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
        waiting = list(self._places(waiting or self.calling, self.few)[1])
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
        index, at = self._places(observations, f)
        for begin in range(0, max(len(encoded.ids) for encoded in observations.values()), s):
            ids, positions = np.zeros((f, s), np.int32), np.zeros((3, f, s), np.int32)
            vision, count = np.full((f, s), -1, np.int32), np.zeros(f, np.int32)
            for b, encoded in observations.items():
                i = at[b]
                c = count[i] = min(max(len(encoded.ids) - begin, 0), s)
                ids[i, :c] = encoded.ids[begin : begin + c]
                positions[:, i, :c] = encoded.positions[:, begin : begin + c]
                vision[i, :c] = self.row(b).vision[-1][begin : begin + c]
            self.state = sampler.observe(
                self.model, self.params, self.state, index, ids, positions, vision, count, self.store.features
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
                row.trajectory(ids[b], logprobs[b]) for b, row in enumerate(group.rows, slot * self.g)
            ]
            self.done[group.index] = group
        self.free = sorted(self.free + ended)
        self.clock.lap("host")


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
