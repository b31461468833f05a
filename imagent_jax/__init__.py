"""imagent-jax: multi-image vision agents trained end to end by reinforcement learning, in JAX."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from imagent_jax.agent import Agent
    from imagent_jax.config import Config, load_config
    from imagent_jax.rollout.collect import Collector
    from imagent_jax.rollout.environment import ToolEnvironment
    from imagent_jax.rollout.policy import Policy
    from imagent_jax.tools import ToolSet, tool
    from imagent_jax.types import Task, ToolError, Trajectory

__version__ = "0.1.0"
__all__ = [
    "Agent",
    "Collector",
    "Config",
    "Policy",
    "Task",
    "ToolEnvironment",
    "ToolError",
    "ToolSet",
    "Trajectory",
    "load_config",
    "tool",
]
_PLACES = {
    "Agent": "agent",
    "Collector": "rollout.collect",
    "Config": "config",
    "Policy": "rollout.policy",
    "Task": "types",
    "ToolEnvironment": "rollout.environment",
    "ToolError": "types",
    "ToolSet": "tools",
    "Trajectory": "types",
    "load_config": "config",
    "tool": "tools",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is asked for, so that importing the package is fast and starts no device."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_PLACES[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
