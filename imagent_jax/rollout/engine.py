"""The decoding engine: token ids and images in, tokens out. It knows neither tasks nor tools.

An engine has slots. A slot holds a prompt and the G rows that continue it; row b belongs to slot b // G. Prompts wait until a
slot is free; rows decode together, stop by themselves at the end of a turn, and go on once something is appended to them.
"""

import itertools
import time
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from imagent_jax.model.features import FeatureStore
from imagent_jax.model.interleave import Encoded, pad_prompts
from imagent_jax.model.vlm import Model
from imagent_jax.rollout import sampler


class EngineShape(NamedTuple):
    """The compiled shapes of an engine.

    Attributes:
        slots: prompts in progress at a time.
        group_size: rows of a prompt.
        prompt_tokens, response_tokens: most tokens of a prompt, and of a row after its prompt.
        observation_tokens: tokens appended in one call.
        decode_chunk: tokens decoded before `Engine.step` returns.
    """

    slots: int
    group_size: int
    prompt_tokens: int
    response_tokens: int
    observation_tokens: int
    decode_chunk: int


class Request(NamedTuple):
    """A prompt to continue.

    Attributes:
        key: names the request to the caller.
        stream: number below 2**31. Random numbers are a function of (seed, stream, row in the group, token).
        temperature: of the sampled softmax; 0 takes the likeliest token.
    """

    key: Any
    prompt: Encoded
    seed: int
    stream: int
    temperature: float = 1.0


class Admitted(NamedTuple):
    """A request in its slot: the numbers of its rows, and the feature row of every prompt token (-1: text; int32 [S])."""

    key: Any
    rows: range
    vision: np.ndarray


def quarters(slots: int, group_size: int) -> tuple[int, int]:
    """Slots admitted at once (a divisor of `slots`) and rows observed at once (a multiple of `sampler.parts`): about a quarter
    of either."""
    parts = sampler.parts(slots)
    return max(d for d in range(1, -(-slots // 4) + 1) if slots % d == 0), -(-slots * group_size // (4 * parts)) * parts


class Clock:
    """Seconds by phase."""

    def __init__(self):
        self.times: dict[str, float] = {}
        self.last = time.perf_counter()

    def lap(self, name: str, wait=None) -> None:
        """Add the time since the last lap to a phase, after waiting for the array `wait`."""
        jax.block_until_ready(wait)
        now = time.perf_counter()
        self.times[name] = self.times.get(name, 0.0) + now - self.last
        self.last = now


class Engine:
    """Continuous decoding of many rows on the current mesh.

    Use `submit` and `admit` to fill slots, `step` to decode, `append` to add an observation to rows that stopped, `cancel` to
    stop rows, and `release` to take finished slots out. Most rows appended at once: `quarter`. While few rows are live, they
    are decoded on a quarter or a sixteenth of the batch, and while responses are short, on the first half of their cache.
    What a row samples depends on none of this.

    Args:
        params: as `sharding.rollout_params` gives them.
        store: encodes the images.
        stops: automaton that finds where a turn ends, int16 [states V] (see `stops.stop_table`).
        warm: the programs of this shape and store were compiled before.

    Attributes:
        decoded: rows computed by decoding, summed over its steps; those not live count too.
    """

    def __init__(
        self, model: Model, params: nnx.State, store: FeatureStore, shape: EngineShape, stops: np.ndarray, *, warm: bool = False
    ):
        self.model, self.params, self.store, self.shape, self.stops = model, params, store, shape, jnp.asarray(stops)
        self.rows, self.parts = shape.slots * shape.group_size, sampler.parts(shape.slots)
        self.admitted, self.quarter = quarters(shape.slots, shape.group_size)
        least = max(-(-self.quarter // 4), min(2, self.quarter))  # one row is not worth its compilation
        least = -(-least // self.parts) * self.parts
        r = shape.response_tokens  # half of a short cache is not worth its compilation either
        self.sizes, self.widths = sorted({least, self.quarter, self.rows}), sorted({-(-r // 2) if r >= 128 else r, r})
        self.state = sampler.empty(model, shape.slots, shape.group_size, shape.prompt_tokens, r)
        self.live, self.length, self.seen = np.zeros(self.rows, bool), np.zeros(self.rows, int), np.zeros(self.rows, int)
        self.waiting: deque[Request] = deque()
        self.encoded: deque[tuple[Request, np.ndarray]] = deque()
        self.busy: dict[int, Request] = {}  # by slot
        self.free = list(range(shape.slots))
        self.clock, self.decoded = Clock(), 0
        if not warm:
            self._compile()

    def _compile(self) -> None:
        """Compile every shape that may come up, so that none is compiled later."""
        self.store.compile()
        for size, width in itertools.product(self.sizes, self.widths):
            self._decode(np.zeros(0, int), size, width, 0)
        self.clock.lap("compile", self.state.logits)

    # ---- prompts ------------------------------------------------------------------------------------------------------

    @property
    def has_room(self) -> bool:
        """Whether prompts can be admitted: a quarter of the slots is free, or all of them."""
        return len(self.free) >= self.admitted or not self.busy

    @property
    def hungry(self) -> bool:
        """Whether another prompt is of use now: there is a slot for it, or room in the pack of images of those that wait."""
        if not self.has_room or len(self.encoded) >= self.admitted:
            return False
        patches = [sum(len(image.patches) for image in request.prompt.images) for request in self.waiting]
        return len(patches) < self.admitted or sum(patches) + max(patches) <= self.store.pack

    def submit(self, request: Request) -> None:
        """Queue a prompt.

        Raises:
            ValueError: it is longer than `prompt_tokens`.
        """
        if len(request.prompt.ids) > self.shape.prompt_tokens:
            raise ValueError(f"A prompt of {len(request.prompt.ids)} tokens is longer than {self.shape.prompt_tokens}.")
        self.waiting.append(request)

    def admit(self) -> list[Admitted]:
        """Encode the images of queued prompts and prefill the first of them into free slots, a quarter of the slots at most."""
        if len(self.encoded) < self.admitted and self.waiting:
            self._encode_waiting()
        slots = self.free[: min(self.admitted, len(self.encoded))]
        if not slots:
            return []
        chosen = [self.encoded.popleft() for _ in slots]
        self.free = self.free[len(slots) :]
        self._prefill(slots, chosen)
        g, found = self.shape.group_size, []
        for slot, (request, vision) in zip(slots, chosen, strict=True):
            self.busy[slot] = request
            rows = range(slot * g, (slot + 1) * g)
            self.live[rows], self.length[rows], self.seen[rows] = True, 0, 0
            found.append(Admitted(request.key, rows, vision))
        return found

    def _encode_waiting(self) -> None:
        requests, self.waiting = list(self.waiting), deque()
        first = iter(self.store.add([image for request in requests for image in request.prompt.images]))
        for request in requests:
            self.encoded.append((request, request.prompt.vision([next(first) for _ in request.prompt.images])))
        self.clock.lap("vision", self.store.newest)

    def _prefill(self, slots: list[int], chosen: list[tuple[Request, np.ndarray]]) -> None:
        more = self.admitted - len(chosen)  # filled up with repeats that go nowhere
        requests, vision = map(list, zip(*chosen, *chosen[:1] * more, strict=True))
        prompts = [request.prompt for request in requests]
        ids, positions, rows = pad_prompts(prompts, vision, self.shape.prompt_tokens)

        def column(values: Iterable[int], dtype=np.int32):
            return np.asarray([*values], dtype)

        self.state = sampler.admit(
            self.model,
            self.params,
            self.state,
            column([*slots, *[self.shape.slots] * more]),
            ids,
            positions,
            rows,
            column(len(prompt.ids) for prompt in prompts),
            column(prompt.next_position for prompt in prompts),
            column(request.stream for request in requests),
            column((r.seed % 2**32 for r in requests), np.uint32),
            column((request.temperature for request in requests), np.float32),
            self.store.show(rows),
        )
        self.clock.lap("prefill", self.state.logits)

    # ---- tokens -------------------------------------------------------------------------------------------------------

    def step(self) -> dict[int, np.ndarray]:
        """Decode a chunk of tokens for all live rows. Returns the sampled ids of every row whose turn ended, by row."""
        rows = np.flatnonzero(self.live)
        if not len(rows):
            return {}
        before = self.length[rows]
        longest = min(self.length[rows].max() + self.shape.decode_chunk, self.widths[-1])
        size = next(size for size in self.sizes if len(self._places(rows, size)[1]) == len(rows))
        self._decode(rows, size, next(width for width in self.widths if width >= longest), self.shape.decode_chunk)
        ids, length, live = jax.device_get((self.state.ids, self.state.length, self.state.live))
        self.clock.lap("decode")
        turns = {b: ids[b, self.seen[b] : length[b]] for b in rows[~live[rows]].tolist()}
        self.live, self.length = live.copy(), length.copy()
        self.decoded += size * int((length[rows] - before).max())  # the last row to stop was live in every step
        for b in turns:
            self.seen[b] = length[b]
        return turns

    def append(self, observations: Mapping[int, Encoded]) -> dict[int, np.ndarray]:
        """Append text and images to rows that stopped, at most `quarter` of them, in chunks of `observation_tokens`. The rows
        decode again. Returns the feature row of every token appended (-1: text; int32 [S]), by row."""
        first = iter(self.store.add([image for encoded in observations.values() for image in encoded.images]))
        self.clock.lap("vision", self.store.newest)
        vision = {b: encoded.vision([next(first) for _ in encoded.images]) for b, encoded in observations.items()}
        index, at = self._places(observations, self.quarter)
        s, f = self.shape.observation_tokens, self.quarter
        for begin in range(0, max(len(encoded.ids) for encoded in observations.values()), s):
            ids, positions = np.zeros((f, s), np.int32), np.zeros((3, f, s), np.int32)
            rows, count = np.full((f, s), -1, np.int32), np.zeros(f, np.int32)
            for b, encoded in observations.items():
                i = at[b]
                c = count[i] = min(max(len(encoded.ids) - begin, 0), s)
                ids[i, :c] = encoded.ids[begin : begin + c]
                positions[:, i, :c] = encoded.positions[:, begin : begin + c]
                rows[i, :c] = vision[b][begin : begin + c]
            self.state = sampler.observe(
                self.model, self.params, self.state, index, ids, positions, rows, count, self.store.show(rows)
            )
        for b, encoded in observations.items():
            self.live[b] = True
            self.length[b] = self.seen[b] = self.seen[b] + len(encoded.ids)
        self.clock.lap("observe", self.state.logits)
        return vision

    def cancel(self, rows: Sequence[int]) -> None:
        """Stop rows where they are. A slot whose rows are all cancelled can be released."""
        self.state = sampler.stop(self.state, np.asarray([*rows, *[self.rows] * (self.rows - len(rows))], np.int32))
        self.live[list(rows)] = False

    def release(self, slots: Iterable[int]) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        """Free slots. Returns all ids and log-probabilities of each slot's rows, [G R] each, by slot."""
        slots, g = list(slots), self.shape.group_size
        if not slots:
            return {}
        ids, logprobs = jax.device_get((self.state.ids, self.state.logprobs))
        for slot in slots:
            del self.busy[slot]
        self.free = sorted(self.free + slots)
        return {slot: (ids[slot * g : (slot + 1) * g], logprobs[slot * g : (slot + 1) * g]) for slot in slots}

    def _decode(self, rows: np.ndarray, size: int, width: int, steps: int) -> None:
        """Decode these rows among `size` on `width` tokens of the cache, until fewer rows would do."""
        some = self._places(rows, size)[0] if size < self.rows else None
        enough = max((s for s in self.sizes if s < min(size, len(rows))), default=0)
        self.state = sampler.decode(self.model, width, self.params, self.state, some, self.stops, steps, enough)

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

    def fitting(self, rows: Iterable[int]) -> list[int]:
        """Return the first of these rows that one `append` takes: on a mesh, each device observes its own."""
        return list(self._places(rows, self.quarter)[1])
