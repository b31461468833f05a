"""Rewards: named functions of trajectories, combined as a weighted sum. `docs/rewards.md` describes every kind."""

import asyncio
import functools
import inspect
import math
import threading
import traceback
from collections.abc import Awaitable, Callable, Collection, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple

from imagent_jax.chat import well_formed_answer
from imagent_jax.config import JudgeConfig, RewardConfig
from imagent_jax.config.naming import import_path
from imagent_jax.rl.llm_judge import LLMJudge
from imagent_jax.rl.published import PUBLISHED
from imagent_jax.scoring import BadReference
from imagent_jax.scoring.expressions import check_installed
from imagent_jax.types import EndReason, Trajectory

Reward = Callable[..., Any]
"""A function of a trajectory that returns a number, or None where it abstains. Its first parameter may be declared as
`list[Trajectory]`: it then receives all trajectories of a step (with `rollout.refill`, of a group) and returns a list. It may
be `async def`."""


class Part(NamedTuple):
    """A reward as a part of the sum.

    Attributes:
        timeout_s: seconds an async call may take; None: no limit but its own.
    """

    weight: float
    function: Reward
    timeout_s: float | None = None


# ---- the rewards ------------------------------------------------------------------------------------------------------


def answer(t: Trajectory) -> float:
    """Return the answer's score in 0..1 by the task's answer type."""
    return t.score


def well_formed(t: Trajectory) -> float:
    """Return 1 if the trajectory has no invalid call and ends with exactly one answer, not blank, and a stop; else 0."""
    text = "".join(turn.text for turn in t.turns)
    return float(t.end == EndReason.ANSWERED and well_formed_answer(text) and t.invalid_calls == 0)


def tool_gain(t: Trajectory) -> float:
    """Return 1 for a right answer after at least one executed call (the tool-use reward gain), else 0."""
    return float(t.executed_calls > 0 and t.right)


def environment(t: Trajectory) -> float | None:
    """Return what the environment of the task paid (`ToolEnvironment.reward`)."""
    return t.environment_reward


def scored_as(answer_type: str) -> Reward:
    """Return the reward that scores the answer by one answer type in all tasks; it abstains where a reference is not of it."""

    def reward(t: Trajectory) -> float | None:
        try:
            return t.scored_as(answer_type)
        except BadReference:
            return None

    return reward


ALWAYS: dict[str, Reward] = {"answer": answer, "format": well_formed, "tool_gain": tool_gain}
"""Rewards that are computed, and reported, without a weight too. They never abstain."""
REWARDS: dict[str, Reward] = ALWAYS | {
    "iou": scored_as("box"), "point_in_box": scored_as("point"), "set_f1": scored_as("set_f1"), "math_verify": scored_as("math"),
    "environment": environment,
} | PUBLISHED  # fmt: skip


def custom_reward(path: str) -> Reward:
    """Import the reward function at 'package.module:function'.

    Raises:
        ValueError: the path cannot be imported or is not a function.
    """
    function = import_path(path, "reward.custom")
    if not callable(function):
        raise ValueError(f"reward.custom {path!r} is not a function; name a function of a trajectory.")
    return function


def reward_functions(cfg: RewardConfig, judge: JudgeConfig | None = None, used: Collection[str] = ()) -> dict[str, Part]:
    """Return every reward by name. Call it at start-up, so that invalid settings fail early; it asks the judge one question.

    Args:
        judge: default: the settings' defaults.
        used: rewards that have a weight for some tasks, whatever `cfg` says.
    Raises:
        ValueError: see `custom_reward` and `LLMJudge`; math-verify is not installed.
    """
    if cfg.math_verify or "math_verify" in used:
        check_installed()
    parts = {name: Part(getattr(cfg, name), REWARDS[name]) for name in REWARDS}
    if cfg.judge or "judge" in used:
        model = LLMJudge(judge or JudgeConfig())
        parts["judge"] = Part(cfg.judge, model)
        asyncio.run_coroutine_threadsafe(model.check(), _loop()).result()
    return parts | {path: Part(weight, custom_reward(path), cfg.timeout_s) for path, weight in cfg.custom_weights.items()}


# ---- scoring ----------------------------------------------------------------------------------------------------------


def score_trajectories(
    trajectories: Sequence[Trajectory], functions: dict[str, Part], concurrency: int = 16
) -> list[dict[str, Any]]:
    """Return every reward of every trajectory by name, and their weighted sum, `total`.

    A reward that abstains is left out. Where all with a weight abstain, there is no `total`. A reward that raises, takes too long
    or is not finite is an environment error: the result then has zero rewards, which must neither train nor count, and `fault`,
    the reward's name and error. `t.error` is set to the traceback unless it holds an earlier error.

    Args:
        concurrency: async calls at once.
    """
    slots = asyncio.Semaphore(concurrency)

    def begun(name: str, part: Part) -> list[Any]:  # async calls begin here, and run while the others do
        if takes_list(part.function):
            return [_call(part, list(trajectories), slots)]
        return [_call(part, t, slots) if asked_for(name, t, functions) else None for t in trajectories]

    calls = {name: begun(name, part) for name, part in functions.items()}
    results = {name: [c.result() if isinstance(c, Future) else c for c in made] for name, made in calls.items()}
    for name, part in functions.items():
        if takes_list(part.function):
            results[name] = _spread(name, results[name][0], len(trajectories))
    return [_sum(t, {name: values[i] for name, values in results.items()}, functions) for i, t in enumerate(trajectories)]


def weight_of(name: str, t: Trajectory, functions: dict[str, Part]) -> float:
    """Return the weight of a reward for a trajectory: its task's, or that of the run."""
    return t.task.reward.get(name, functions[name].weight)


def asked_for(name: str, t: Trajectory, functions: dict[str, Part]) -> bool:
    """Return whether a reward is computed for a trajectory. Shipped ones are not where they have no weight, and what an
    environment pays is not where it pays nothing."""
    if name == "environment" and t.environment_reward is None:
        return False
    return name in ALWAYS or name not in REWARDS or bool(weight_of(name, t, functions))


def takes_list(function: Reward) -> bool:
    """Return whether a function's first parameter is declared as a list: `list[Trajectory]` or `Sequence[Trajectory]`."""
    try:
        first = next(iter(inspect.signature(function).parameters.values()))
    except (ValueError, TypeError, StopIteration):  # some built-in functions; no parameter
        return False
    name = str(getattr(first.annotation, "__name__", first.annotation))
    return name.partition("[")[0].rpartition(".")[2].lower() in ("list", "sequence")


def _call(part: Part, argument: Any, slots: asyncio.Semaphore) -> Any:
    """Return what a reward returns or raises; of an async one, or of one that returns a Future, the Future of that."""
    try:
        result = part.function(argument)
    except (Exception, SystemExit) as error:  # noqa: BLE001 - a reward of the user's
        return error
    if not isinstance(result, Future) and not inspect.isawaitable(result):
        return result
    return asyncio.run_coroutine_threadsafe(_bounded(result, slots, part.timeout_s), _loop())


async def _bounded(result: Awaitable[Any] | Future, slots: asyncio.Semaphore, timeout_s: float | None) -> Any:
    try:
        async with slots, asyncio.timeout(timeout_s) as limit:
            return await (asyncio.wrap_future(result) if isinstance(result, Future) else result)
    except (Exception, SystemExit, asyncio.CancelledError) as error:
        return TimeoutError(f"no result within {timeout_s:g} s") if limit.expired() else error


@functools.cache
def _loop() -> asyncio.AbstractEventLoop:
    """Return the event loop of async rewards, on a thread of its own: connections that a reward keeps outlive a step."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="rewards", daemon=True).start()
    return loop


def _spread(name: str, result: Any, count: int) -> list[Any]:
    """Return the values of a reward that takes all trajectories; an error is that of each."""
    if isinstance(result, BaseException):
        return [result] * count
    if not hasattr(result, "__len__") or len(result) != count:
        return [ValueError(f"Reward {name!r} returned {result!r:.80} for {count} trajectories; return a value for each.")] * count
    return list(result)


def _sum(t: Trajectory, values: dict[str, Any], functions: dict[str, Part]) -> dict[str, float | str]:
    parts = {}
    for name, value in values.items():
        if value is not None and not isinstance(value, BaseException):
            try:
                value = parts[name] = _finite(name, value)
            except Exception as error:  # float() of whatever a reward returned
                value = error
        if isinstance(value, BaseException):
            t.error = t.error or "".join(traceback.format_exception(value))
            asked = [name for name in functions if asked_for(name, t, functions)]
            return dict.fromkeys(asked, 0.0) | {"total": 0.0, "fault": f"reward {name}: {_described(value)}"}
    weighed = [weight * value for name, value in parts.items() if (weight := weight_of(name, t, functions))]
    return parts | ({"total": sum(weighed)} if weighed else {})


def _finite(name: str, value: Any) -> float:
    if not math.isfinite(number := float(value)):
        raise ValueError(f"Reward {name!r} is {number}; it must be a finite number.")
    return number


def _described(error: BaseException) -> str:
    """Return an error's type, message and place on one line."""
    words = " ".join("".join(traceback.format_exception_only(error)).split())
    places = traceback.extract_tb(error.__traceback__)
    return f"{words} ({Path(places[-1].filename).name}, line {places[-1].lineno})" if places else words
