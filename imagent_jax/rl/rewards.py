"""Rewards: small named functions of a trajectory, summed by weight."""

import importlib
import traceback
from collections.abc import Callable

from imagent_jax.config import RewardConfig
from imagent_jax.evals.scoring import score
from imagent_jax.rl.trajectory import EndReason, Trajectory


def answer(t: Trajectory) -> float:
    """1 for a right answer, by the task's own kind of scoring (F1 gives parts)."""
    return score(t.answer, t.task.answer, t.task.answer_type)


def well_formed(t: Trajectory) -> float:
    """1 for a trajectory that ended with exactly one answer and made no invalid call."""
    return float(t.end == EndReason.ANSWERED and t.turns[-1].text.count("<answer>") == 1 and t.invalid_calls == 0)


def tool_gain(t: Trajectory) -> float:
    """1 for a right answer after at least one executed call (the tool-use reward gain)."""
    return float(t.executed_calls > 0 and answer(t) == 1.0)


REWARDS: dict[str, Callable[[Trajectory], float]] = {"answer": answer, "format": well_formed, "tool_gain": tool_gain}


def custom_reward(path: str) -> Callable[[Trajectory], float]:
    """The function at 'package.module:function'.

    Raises:
        ValueError: it cannot be imported.
    """
    module, _, name = path.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"reward.custom {path!r} cannot be imported ({error}); write 'package.module:function'.") from error


def score_trajectory(t: Trajectory, cfg: RewardConfig) -> dict[str, float]:
    """Every reward by name and their weighted `total`.

    A reward function that raises is a fault of the world: the result has `fault` set, and `t.error` says what happened.
    """
    functions = [(name, getattr(cfg, name), function) for name, function in REWARDS.items()]
    functions += [(path, 1.0, custom_reward(path)) for path in cfg.custom]
    try:
        parts = {name: float(function(t)) for name, _, function in functions}
    except Exception:
        t.error = traceback.format_exc()
        return {name: 0.0 for name, _, _ in functions} | {"total": 0.0, "fault": True}
    return parts | {"total": sum(weight * parts[name] for name, weight, _ in functions)}
