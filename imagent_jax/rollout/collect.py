"""Rollouts: tasks in, groups of trajectories out, for training and evaluation."""

import contextlib
import threading
import traceback
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx

from imagent_jax.chat import QWEN
from imagent_jax.chat.prompts import read_prompt
from imagent_jax.config import Config
from imagent_jax.distributed import processes
from imagent_jax.images.originals import Originals
from imagent_jax.images.prepare import PreparedImage
from imagent_jax.model import lora
from imagent_jax.model.features import FeatureStore
from imagent_jax.model.interleave import Encoded, encode_parts
from imagent_jax.model.processor import Processor
from imagent_jax.model.sharding import rollout_params
from imagent_jax.model.vlm import Model
from imagent_jax.rollout.batch import Grade, Refill, RolloutBatch, join_batches
from imagent_jax.rollout.engine import Engine, EngineShape, Request
from imagent_jax.rollout.environment import ToolEnvironment, answered, environment_class
from imagent_jax.rollout.episode import Episode, Rules
from imagent_jax.rollout.pending import PendingCalls
from imagent_jax.rollout.prompt_check import PromptCheck, check_length
from imagent_jax.rollout.stops import stop_table
from imagent_jax.tools import ToolSet, ToolSettings
from imagent_jax.types import CallResult, Task, Trajectory, Turn


class Stopped(Exception):
    """Rollouts were given up because the collector was told to stop."""


class Weights(NamedTuple):
    """Parameters as rollouts read them: `sharding.rollout_params`."""

    params: nnx.State


class OpenedTask(NamedTuple):
    """A task whose images are decoded and whose prompt is encoded.

    Attributes:
        error: what its environment raised; a default environment is in its place. None: nothing.
    """

    task: Task
    prompt: Encoded
    environment: ToolEnvironment
    error: str | None = None

    def episode(self, collector: "Collector", rollout: int, seed: int) -> Episode:
        """Begin a rollout. Where the environment raises, the rollout ends with a FAULT."""
        error, start = self.error, self.prompt.next_position
        try:
            own = collector.rules.ask(self.environment, lambda: self.environment.fork(seed))
        except Exception:  # noqa: BLE001 - of an environment of the user's
            own, error = collector.plain(self.task), traceback.format_exc()
        return Episode(collector.rules, self.task, rollout, own, start, error)


class Collector:
    """Collects rollouts of a policy. All that is random is a function of (seed, task uid, draw, rollout, token), `draw` being how
    often the batch held the task before.

    Args:
        environment: makes the environment of a task that names none; called as `ToolEnvironment` is. None: `tools.environment`.
        stop: once it is set, rollouts are given up (`Stopped`).
    """

    def __init__(
        self,
        model: Model,
        processor: Processor,
        tools: ToolSet,
        cfg: Config,
        *,
        environment: Callable[..., ToolEnvironment] | None = None,
        stop: threading.Event | None = None,
    ):
        self.model, self.processor, self.tools, self.cfg = model, processor, tools, cfg
        self.stop = stop or threading.Event()
        self.settings = tool_settings(cfg, processor)
        self.make_environment = environment or environment_class(cfg.tools.environment, "tools.environment")
        self.prompt = read_prompt(cfg.tools.prompt)
        self.chat = QWEN
        limits = cfg.rollout.response_tokens, cfg.tools.max_turns, cfg.tools.max_repeats, cfg.tools.timeout_s
        self.rules = Rules(self.chat, processor, *limits)
        self.systems: dict[tuple, tuple[str, ...]] = {}
        self.stops = stop_table(processor, self.chat.stop_strings, model.cfg.text.vocab_size)
        self.openers = ThreadPoolExecutor(cfg.tools.workers, "prompts")
        self.warm: set[tuple] = set()  # shapes whose programs are compiled
        self.names = self.offered().names  # of all tools that a task may call

    # ---- prompts ------------------------------------------------------------------------------------------------------

    def environment(self, tools: Sequence[str] | None = None, path: str = "") -> ToolEnvironment:
        """Return a new environment that offers some of the run's tools. None: all. `path`: see `Task.environment`."""
        make = environment_class(path, "environment") if path else self.make_environment
        return make(self.tools.subset(tools), self.settings, self.cfg.images)

    def plain(self, task: Task) -> ToolEnvironment:
        """Return a default environment of a task, in place of one that has failed.

        Raises:
            ValueError: the run has no such tool, or see `ToolEnvironment.reset`.
        """
        plain = ToolEnvironment(self.tools.subset(task.tools), self.settings, self.cfg.images)
        plain.reset(task)
        return plain

    def offered(self, tools: Sequence[str] | None = None, path: str = "") -> ToolSet:
        """Return the tools that a new environment offers, see `environment`.

        Raises:
            ValueError: the run has no such tool, or there is no such environment, or it raises.
        """
        try:
            return self.environment(tools, path).tools
        except ValueError:
            raise
        except Exception as error:
            what = f"The environment {path or self.cfg.tools.environment!r} cannot be used"
            raise ValueError(f"{what} ({type(error).__name__}: {error}); mend it.") from error

    def system(self, tools: tuple[str, ...] | None = None, environment: str = "") -> tuple[str, ...]:
        """Return the content of the system turn of tasks with these tools and environment; see `Collector.environment`.

        Raises:
            ValueError: see `offered`.
        """
        if (tools, environment) not in self.systems:
            self.systems[tools, environment] = self._system(self.offered(tools, environment))
        return self.systems[tools, environment]

    def _system(self, offered: ToolSet) -> tuple[str, ...]:
        text = self.cfg.tools.system or self.prompt.text(bool(offered.names))
        return self.chat.system(text, offered.schemas(self.settings, self.prompt))

    def open_task(self, task: Task) -> OpenedTask:
        """Decode the images of a task and encode its prompt. Where the environment raises, `OpenedTask.error` says what.

        Raises:
            ValueError: an image does not decode, the prompt does not fit `rollout.prompt_tokens` (the task is named), the run has
                no such tool, or there is no such environment.
        """
        task = replace(task)  # what the environment does to its facts ends with this opening
        self.tools.subset(task.tools)
        environment_class(task.environment, "environment")  # what is missing is no fault of a trajectory

        def begin(environment: ToolEnvironment) -> list[str | tuple[str, ...] | PreparedImage]:
            environment.reset(task)
            return self.parts(task, self.given(environment))

        try:
            environment = answered(lambda: self.environment(task.tools, task.environment), self.rules.timeout_s)
            parts, error = self.rules.ask(environment, lambda: begin(environment)), None
        except Exception:  # noqa: BLE001 - of an environment of the user's, unless the default one raises too
            environment, parts, error = self.plain(task), None, traceback.format_exc()
        try:
            parts = parts or self.chat.render_task(self._system(environment.tools), task.shown, self.given(environment))
            prompt = encode_parts(parts, self.processor)
            check_length(len(prompt.ids), self.cfg.rollout.prompt_tokens)
        except ValueError as wrong:
            raise ValueError(f"Task {task.uid}: {wrong}") from wrong
        return OpenedTask(task, prompt, environment, error)

    def given(self, environment: ToolEnvironment) -> list[PreparedImage]:
        """Return the images of a prompt, in the sizes at which the policy sees them."""
        return [self.rules.prepare(environment, entry, observed=False) for entry in environment.images]

    def parts(self, task: Task, images: Sequence[PreparedImage]) -> list[str | tuple[str, ...] | PreparedImage]:
        """Return the prompt of a task in parts (`interleave.encode_parts`), given its images."""
        return self.chat.render_task(self.system(task.tools, task.environment), task.shown, images)

    @cached_property
    def check(self) -> PromptCheck:
        """Tries whether `open_task` can open a task, for whole data sets."""
        limit, without = self.cfg.rollout.prompt_tokens, {"judge"} - self.cfg.used_rewards
        rewards = [name for name in (*self.cfg.reward.weights, "environment") if name not in without]
        return PromptCheck(self.chat, self.processor, self.system, self.environment(), limit, rewards)

    def open_in_background(self, tasks: Sequence[Task], spares: Sequence[Task] = ()) -> list[Future[OpenedTask]]:
        """Open this process's share of tasks and of spare tasks on threads. Errors surface when `collect` uses the task."""
        return [self.openers.submit(self.open_task, task) for part in (tasks, spares) for task in processes.share(part)]

    # ---- rollouts -----------------------------------------------------------------------------------------------------

    def weights(self, params: nnx.State) -> Weights:
        """Return the copy of the parameters that rollouts read. The parameters may change while it is read."""
        return Weights(rollout_params(self.model.dtype, params))

    def collect(
        self,
        params: nnx.State | Weights,
        tasks: Sequence[Task],
        *,
        group_size: int,
        seed: int,
        temperature: float = 1.0,
        slots: int | None = None,
        opened: Sequence[Future[OpenedTask]] | None = None,
        refill: Refill | None = None,
    ) -> RolloutBatch:
        """Collect `group_size` rollouts of every task, each until it has ended. With several processes, each runs its share on
        its own devices, with its own tools and images. All return the same batch; only the own process has a trajectory's
        images.

        Args:
            temperature: of the sampled softmax; 0 takes the likeliest tokens.
            slots: groups in progress at a time (default: all tasks); a finished group's slot goes to the next task.
            opened: of `open_in_background` for the tasks and the spares, where that was called.
            refill: every group without spread starts a spare task. The batch has the groups with spread, then groups without,
                each in the order of tasks and spares. The spares used are the fewest, from the first on, that complete the batch;
                they depend on what was sampled only. With several processes, each uses its share of the spares.
        Raises:
            ValueError: a task whose prompt does not fit, or whose images do not match (the task is named).
            Stopped: `stop` was set.
        """
        params = (params if isinstance(params, Weights) else self.weights(params)).params
        sampling, n = (group_size, seed, temperature), len(tasks)
        drawn, room = draws([*tasks, *(refill.spares if refill else ())]), -(-(slots or n) // jax.process_count())
        own, parts, grade = None, [processes.share(part) for part in (drawn[:n], drawn[n:])], refill and refill.grade
        if jax.process_count() == 1:
            return self._collect(params, parts, opened, room, sampling, grade)
        params = processes.own_copy(params)
        with contextlib.suppress(Stopped), processes.alone():
            own = self._collect(params, parts, opened, room, sampling, grade)
        if any(processes.gather(own is None)) or own is None:
            raise Stopped
        return join_batches(own)

    def stream(
        self, params: nnx.State | Weights, task: Task, *, seed: int = 0, temperature: float = 1.0
    ) -> Iterator[Turn | Trajectory]:
        """Run one rollout of a task. Yields every turn once its call is answered, and at the end the trajectory.

        Raises:
            ValueError: see `open_task`.
            Stopped: `stop` was set.
        """
        params = (params if isinstance(params, Weights) else self.weights(params)).params
        run = _Run(self, self._engine(params, 1, 1), (draws([task]), ()), None, (1, seed, temperature))
        yield from run.turns()
        yield run.done[0].trajectories[0]

    def _engine(self, params, slots: int, group_size: int) -> Engine:
        """Return an engine on the current mesh. The first of its shape compiles its programs."""
        r, images, frozen = self.cfg.rollout, self.cfg.images, self.cfg.model.freeze_vision and not lora.adapts_vision(params)
        store = FeatureStore(self.model, params, images.pack_blocks, images.pages, frozen=frozen)
        shape = EngineShape(slots, group_size, r.prompt_tokens, r.response_tokens, r.observation_tokens, r.decode_chunk)
        engine = Engine(self.model, params, store, shape, self.stops, warm=shape in self.warm)
        self.warm.add(shape)
        return engine

    def _collect(self, params, parts, opened, slots: int, sampling: tuple[int, int, float], grade) -> RolloutBatch:
        """Collect on the current mesh."""
        engine = self._engine(params, slots, sampling[0])
        run = _Run(self, engine, parts, opened, sampling, grade)
        for _ in run.turns():
            pass
        engine.store.params = None  # it encodes no more: gathered parameters are not kept while training
        groups = sorted(run.done.values(), key=lambda group: (bool(group.grade and not group.grade.spread), group.index))
        count = sum(turn.stop - turn.start for group in groups for t in group.trajectories for turn in t.turns)
        kept, replaced = groups[: len(parts[0])], groups[len(parts[0]) :]
        return RolloutBatch(
            [run.drawn[group.index].task for group in kept],
            [group.prompt for group in kept],
            [group.vision for group in kept],
            [group.trajectories for group in kept],
            engine.store,
            engine.clock.times,
            count,
            self.processor.image_token_id,
            [group.trajectories for group in replaced],
            [run.drawn[index].place for index in run.spares],
            [group.grade.scores for group in groups if group.grade],
            self.names,
            engine.decoded,
        )


class Draw(NamedTuple):
    """A task of a batch, its place there, and the number of its stream of random numbers, below 2**31."""

    task: Task
    place: int
    stream: int


def draws(tasks: Sequence[Task]) -> list[Draw]:
    """Return the tasks of a batch with streams that differ where a task occurs more than once."""
    before, found = Counter(), []
    for place, task in enumerate(tasks):
        again = f"\0{before[task.uid]}" if task.uid in before else ""
        found.append(Draw(task, place, zlib.crc32(f"{task.uid}{again}".encode()) >> 1))
        before[task.uid] += 1
    return found


@dataclass
class Group:
    """The rollouts of a task in their slot, and the trajectories that come of them."""

    index: int
    prompt: Encoded
    vision: np.ndarray
    episodes: list[Episode]
    trajectories: list[Trajectory]
    grade: Grade | None = None


class _Run:
    """One call of `Collector.collect`: joins an engine and environments.

    Slots are filled, rows decode a chunk of tokens, calls run on threads meanwhile, observations are appended, and a finished
    group makes room for the next. What is done when depends on sampled tokens only, not on how long a tool took (up to
    `tools.patience_s`), so that a run repeats to the bit.

    Args:
        parts: tasks, and spares.
        opened: of both, or None.
        sampling: group size, seed, temperature.
        grade: of a finished group; one without spread starts a spare.
    """

    def __init__(
        self,
        collector: Collector,
        engine: Engine,
        parts: Sequence[Sequence[Draw]],
        opened,
        sampling,
        grade=None,
    ):
        self.collector, self.engine, self.drawn = collector, engine, [*parts[0], *parts[1]]
        (_, self.seed, self.temperature), self.futures, self.grade = sampling, opened, grade
        self.queue = deque(range(len(parts[0])))
        self.spares = deque(range(len(parts[0]), len(self.drawn)))
        self.submitted: dict[int, OpenedTask] = {}
        self.groups: dict[int, Group] = {}  # by slot
        self.episodes: dict[int, Episode] = {}  # by row
        self.done: dict[int, Group] = {}  # by place in `drawn`
        self.calls = PendingCalls(collector.rules, collector.cfg.tools)

    def turns(self) -> Iterator[Turn]:
        """Run to the end. Yields every turn once its call is answered; a turn without a call once it ends."""
        try:
            yield from self._turns()
        finally:
            for episode in self.episodes.values():
                if episode.end is None:  # it was given up
                    with contextlib.suppress(Exception):  # of an environment of the user's; another error is on its way
                        answered(episode.environment.close, self.collector.rules.timeout_s)

    def _turns(self) -> Iterator[Turn]:
        while self.queue or self.submitted or self.groups:
            self._fill()
            while due := self.calls.due(self.engine):
                self._respond(due)
                yield from (self.episodes[row].turns[-1] for row in due)
            if self.collector.stop.is_set():
                raise Stopped
            for row, ids in self.engine.step().items():
                if (call := self.episodes[row].end_turn(ids)) is not None:
                    self.calls.submit(row, self.episodes[row], call)
                else:
                    yield self.episodes[row].turns[-1]
            self._finish_groups()

    def _fill(self) -> None:
        """Open the next tasks as far as there is room for them."""
        while self.engine.has_room and (self.queue or self.submitted):
            while self.queue and self.engine.hungry:
                self._submit(self.queue.popleft())
            self.engine.clock.lap("prepare")
            for key, rows, vision in self.engine.admit():
                opened, stream = self.submitted.pop(key), self.drawn[key].stream
                seeds = [zlib.crc32(f"{self.seed} {stream} {i}".encode()) for i in range(len(rows))]
                episodes = [opened.episode(self.collector, i, seed) for i, seed in enumerate(seeds)]
                self.groups[rows[0] // len(rows)] = Group(key, opened.prompt, vision, episodes, [])
                self.episodes |= dict(zip(rows, episodes, strict=True))

    def _submit(self, index: int) -> None:
        task, _, stream = self.drawn[index]
        opened = self.futures[index].result() if self.futures else self.collector.open_task(task)
        self.submitted[index] = opened
        self.engine.submit(Request(index, opened.prompt, self.seed, stream, self.temperature))

    def _respond(self, due: dict[int, tuple[CallResult, list[PreparedImage]]]) -> None:
        """Give rows the results of their calls."""
        responses = {row: self.episodes[row].respond(*result) for row, result in due.items()}
        observations = {row: encoded for row, encoded in responses.items() if encoded is not None}
        if observations:
            for row, vision in self.engine.append(observations).items():
                self.episodes[row].observe(observations[row], vision)

    def _finish_groups(self) -> None:
        """Take finished groups out of their slots."""
        ended = [slot for slot, group in self.groups.items() if all(e.end is not None for e in group.episodes)]
        for slot, (ids, logprobs) in self.engine.release(ended).items():
            group = self.groups.pop(slot)
            group.trajectories = [e.trajectory(ids[i], logprobs[i]) for i, e in enumerate(group.episodes)]
            self.done[group.index] = group
            if self.grade:
                group.grade = self.grade(group.trajectories)
                if self.spares and not group.grade.spread:
                    self.queue.append(self.spares.popleft())
        self.engine.clock.lap("host")


def tool_settings(cfg: Config, processor: Processor) -> ToolSettings:
    """How tools show images, from the configuration and the model's patch geometry."""
    t = cfg.tools
    return ToolSettings(
        coordinates=t.coordinates,
        patch_factor=processor.patch_size * processor.merge_size,
        low_pixels=t.low_pixels,
        high_pixels=t.high_pixels,
        confirm_min_pixels=t.confirm_min_pixels,
        confirm_max_pixels=t.confirm_max_pixels,
        min_box=t.min_box,
        max_images=t.max_images,
        most_pixels=cfg.images.vision_block * processor.patch_size**2,
        originals=Originals(1e9 * cfg.images.originals_gb),
    )
