"""Rewards: named functions of a trajectory, combined as a weighted sum."""

import math
import traceback
from collections.abc import Callable
from pathlib import Path

from imagent_jax.chat import well_formed_answer
from imagent_jax.config import RewardConfig
from imagent_jax.config.naming import import_path
from imagent_jax.types import EndReason, Trajectory

Reward = Callable[[Trajectory], float]


def answer(t: Trajectory) -> float:
    """Return the answer's score in 0..1 by the task's answer type (only F1 gives partial credit)."""
    return t.score


def well_formed(t: Trajectory) -> float:
    """Return 1 if the trajectory has no invalid call and ends with exactly one answer, not blank, and a stop; else 0."""
    text = "".join(turn.text for turn in t.turns)
    return float(t.end == EndReason.ANSWERED and well_formed_answer(text) and t.invalid_calls == 0)


def tool_gain(t: Trajectory) -> float:
    """Return 1 for a right answer after at least one executed call (the tool-use reward gain), else 0."""
    return float(t.executed_calls > 0 and t.right)


REWARDS: dict[str, Reward] = {"answer": answer, "format": well_formed, "tool_gain": tool_gain}


def custom_reward(path: str) -> Reward:
    """Import the reward function at 'package.module:function'.

    Raises:
        ValueError: the path cannot be imported or is not a function.
    """
    function = import_path(path, "reward.custom")
    if not callable(function):
        raise ValueError(f"reward.custom {path!r} is not a function; name a function of a trajectory.")
    return function


def reward_functions(cfg: RewardConfig) -> dict[str, tuple[float, Reward]]:
    """Return weight and function of every reward, by name. Call it at start-up, so that invalid paths fail early.

    Raises:
        ValueError: see `custom_reward`.
    """
    named = {name: (getattr(cfg, name), function) for name, function in REWARDS.items()}
    return named | {path: (1.0, custom_reward(path)) for path in cfg.custom}


def score_trajectory(t: Trajectory, functions: dict[str, tuple[float, Reward]]) -> dict[str, float | str]:
    """Return every reward by name and their weighted sum, `total`. Weights of the task (`Task.reward`) replace those of the run.

    A reward that raises or is not finite is an environment error: the result then has zero rewards, which must neither train nor
    count, and `fault`, the reward's name and error. `t.error` is set to the traceback unless it holds an earlier error.
    """
    parts = {}
    for name, (_, function) in functions.items():
        try:
            parts[name] = float(function(t))
            if not math.isfinite(parts[name]):
                raise ValueError(f"Reward {name!r} is {parts[name]}; it must be a finite number.")
        except (Exception, SystemExit) as error:  # noqa: BLE001 - a reward of the user's
            t.error = t.error or traceback.format_exc()
            return {name: 0.0 for name in functions} | {"total": 0.0, "fault": f"reward {name}: {_described(error)}"}
    return parts | {"total": sum(t.task.reward.get(name, w) * parts[name] for name, (w, _) in functions.items())}


def _described(error: BaseException) -> str:
    """Return an error's type, message and place on one line."""
    *_, place = traceback.extract_tb(error.__traceback__)
    return (
        f"{' '.join(''.join(traceback.format_exception_only(error)).split())} ({Path(place.filename).name}, line {place.lineno})"
    )
