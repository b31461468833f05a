"""Rewards: small named functions of a trajectory, summed by weight."""

import math
import traceback
from collections.abc import Callable

from imagent_jax.chat import well_formed_answer
from imagent_jax.config import RewardConfig
from imagent_jax.config.naming import import_path
from imagent_jax.scoring import score
from imagent_jax.types import EndReason, Trajectory

Reward = Callable[[Trajectory], float]


def answer(t: Trajectory) -> float:
    """1 for a right answer, by the task's own kind of scoring (F1 gives parts)."""
    return score(t.answer, t.task.answer, t.task.answer_type)


def well_formed(t: Trajectory) -> float:
    """1 for a trajectory without invalid calls that ends with its only answer, not blank, and a stop."""
    text = "".join(turn.text for turn in t.turns)
    return float(t.end == EndReason.ANSWERED and well_formed_answer(text) and t.invalid_calls == 0)


def tool_gain(t: Trajectory) -> float:
    """1 for a right answer after at least one executed call (the tool-use reward gain)."""
    return float(t.executed_calls > 0 and answer(t) == 1.0)


REWARDS: dict[str, Reward] = {"answer": answer, "format": well_formed, "tool_gain": tool_gain}


def custom_reward(path: str) -> Reward:
    """The function at 'package.module:function'.

    Raises:
        ValueError: it cannot be imported, or is no function.
    """
    function = import_path(path, "reward.custom")
    if not callable(function):
        raise ValueError(f"reward.custom {path!r} is not a function; name a function of a trajectory.")
    return function


def reward_functions(cfg: RewardConfig) -> dict[str, tuple[float, Reward]]:
    """Weight and function of every reward, by name. Call it once at the start: a bad path is refused there.

    Raises:
        ValueError: see `custom_reward`.
    """
    named = {name: (getattr(cfg, name), function) for name, function in REWARDS.items()}
    return named | {path: (1.0, custom_reward(path)) for path in cfg.custom}


def score_trajectory(t: Trajectory, cfg: RewardConfig) -> dict[str, float]:
    """Every reward by name and their weighted `total`.

    A reward that raises, or is no finite number, is a fault of the world: the result has `fault` set (and zeros, which
    must neither train nor count), and `t.error` says what happened unless it already held an earlier error.
    """
    functions = reward_functions(cfg)
    try:
        parts = {name: float(function(t)) for name, (_, function) in functions.items()}
        for name, value in parts.items():
            if not math.isfinite(value):
                raise ValueError(f"Reward {name!r} is {value}; it must be a finite number.")
    except Exception:
        t.error = t.error or traceback.format_exc()
        return {name: 0.0 for name in functions} | {"total": 0.0, "fault": True}
    return parts | {"total": sum(weight * parts[name] for name, (weight, _) in functions.items())}
