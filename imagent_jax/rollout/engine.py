"""Rollouts: N tasks x G rollouts, many turns, tools on the host, observations appended to the kept cache."""

import contextlib
import io
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx
from PIL import Image

from imagent_jax.config import Config
from imagent_jax.distributed import processes as hosts
from imagent_jax.distributed.mesh import GROUPS, ways
from imagent_jax.images.prepare import PreparedImage, fit_budget, to_rgb
from imagent_jax.model.features import COUNTS, EncodedPacks, FeatureStore
from imagent_jax.model.interleave import Encoded, encode_parts
from imagent_jax.model.processor import Processor
from imagent_jax.model.qwen2_vl import Model
from imagent_jax.model.sharding import rollout_params
from imagent_jax.rollout import sampler
from imagent_jax.rollout.schedule import Schedule, Stopped
from imagent_jax.rollout.turns import ASSISTANT, TURN_END, Row, extract_answer, token_kinds
from imagent_jax.tools import ImageRegistry, ToolSet, ToolSettings
from imagent_jax.types import CallStatus, EndReason, ImageEntry, Task, TokenKind, Trajectory, Turn


@dataclass
class RolloutBatch:
    """What a rollout returns: G trajectories per task, the encoded prompts and the encoded images behind both."""

    tasks: list[Task]
    prompts: list[Encoded]
    prompt_vision: list[np.ndarray]
    trajectories: list[list[Trajectory]]
    store: EncodedPacks
    times: dict[str, float]
    sampled_tokens: int
    image_token_id: int


class Weights(NamedTuple):
    """Parameters as rollouts read them: `sharding.rollout_params`."""

    params: nnx.State


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
        self.compiled: set[tuple] = set()  # shapes of rollouts whose programs are compiled
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
            self.model, params, self.cfg.images.pack_blocks, packs or self.cfg.images.packs, frozen=frozen
        )
        run = Schedule(self, params, store, list(tasks), group_size, slots, sampling)
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
        row.turns[-1].call, seen = result, result.seen
        result.seen = []  # pixels are not kept
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
        seen = iter(seen or [self.prepare(row.registry, number, observed=True) for number in result.images])
        for part in result.parts:
            if isinstance(part, str):
                text += f"{part}\n"
            else:
                parts += [text, next(seen)]
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


def join_batches(own: RolloutBatch, tasks: Sequence[Task]) -> RolloutBatch:
    """The batch of all `tasks`, of which this process has rolled out its share: the others' trajectories come without
    images, and everybody's encoded images are stacked, on the current mesh. Pixels stay where they are."""
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

    store = EncodedPacks(own.store.model, features, own.store.pack, lanes=jax.process_count())
    if not own.store.frozen:
        store.packs = spread_packs(own.store)
    for name in COUNTS:
        setattr(store, name, sum(getattr(one.store, name) for one in everyone))
    return RolloutBatch(
        list(tasks), chain("prompts"), chain("prompt_vision"), chain("trajectories"), store,
        {name: max(one.times.get(name, 0.0) for one in everyone) for name in everyone[0].times},
        sum(one.sampled_tokens for one in everyone), own.image_token_id,
    )  # fmt: skip


def spread_packs(own: FeatureStore) -> list[tuple[jax.Array, ...]]:
    """The n-th packs of all processes as one, each on its process's devices; a process that has fewer adds blank ones."""
    most = max(hosts.gather(len(own.packs)))
    packs = [*own.packs, *[own.blank(own.sizes[-1])] * (most - len(own.packs))]
    shares = ways(GROUPS) // jax.process_count()
    size = -(-own.sizes[-1] // shares) * shares * own.model.vision_block  # so that every device has as many blocks

    def filled(x, value):
        return hosts.spread(np.pad(x, [(0, size - len(x))] + [(0, 0)] * (x.ndim - 1), constant_values=value))

    return [(filled(patches, 0), filled(coords, 0), filled(image, -1)) for patches, coords, image in packs]


def tool_settings(cfg: Config, processor: Processor) -> ToolSettings:
    """How tools show images, from the configuration and the model's patch geometry."""
    t = cfg.tools
    return ToolSettings(
        coordinates=t.coordinates, patch_factor=processor.patch_size * processor.merge_size, low_pixels=t.low_pixels,
        high_pixels=t.high_pixels, confirm_min_pixels=t.confirm_min_pixels, confirm_max_pixels=t.confirm_max_pixels,
        min_box=t.min_box, max_images=t.max_images, most_pixels=cfg.images.vision_block * processor.patch_size**2,
    )  # fmt: skip
