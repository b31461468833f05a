"""Tools of the policy: registry of images, call protocol, the two visual tools, Python in a sandbox, and search."""

from collections.abc import Callable, Mapping, Sequence

from imagent_jax.chat.prompts import Prompt
from imagent_jax.config import CallSettings, SandboxConfig, SearchConfig
from imagent_jax.config.naming import import_path
from imagent_jax.tools.calls import fault, invalid
from imagent_jax.tools.context import ToolContext, ToolSettings, TrajectoryState
from imagent_jax.tools.decorator import tool
from imagent_jax.tools.pool import CallPool, limited
from imagent_jax.tools.protocol import ToolSet
from imagent_jax.tools.python import python_tool
from imagent_jax.tools.registry import ImageRegistry
from imagent_jax.tools.sandbox import open_sandbox
from imagent_jax.tools.schema import Tool, nearest
from imagent_jax.tools.search import search_tool
from imagent_jax.tools.visual import ALIASES, VISUAL_TOOLS, to_bbox, to_pixels, visual_confirmation, visual_reflection
from imagent_jax.types import CallResult, CallStatus, ImageEntry, ImageNumber, ToolError

__all__ = [
    "VISUAL_TOOLS",
    "CallPool",
    "CallResult",
    "CallSettings",
    "CallStatus",
    "ImageEntry",
    "ImageNumber",
    "ImageRegistry",
    "Tool",
    "ToolContext",
    "ToolError",
    "ToolSet",
    "ToolSettings",
    "TrajectoryState",
    "fault",
    "invalid",
    "limited",
    "python_tool",
    "search_tool",
    "to_bbox",
    "to_pixels",
    "tool",
    "tools_by_name",
    "visual_confirmation",
    "visual_reflection",
]


def tools_by_name(
    names: Sequence[str], sandbox: SandboxConfig | None = None, search: SearchConfig | None = None, prompt: Prompt | None = None
) -> ToolSet:
    """Return the tool set with these names, in order: shipped tools, or user-defined tools as 'package.module:name'.

    Args:
        sandbox: limits of the tool 'python'.
        search: where the tool 'search' finds passages.
        prompt: says how passages are shown.

    Raises:
        ValueError: unknown name (the message suggests the nearest), a path that cannot be imported or is not a tool, or 'python'
            where there is no sandbox, or 'search' where `search` names no index or server that can be used.
    """
    resources = {
        "python": lambda: python_tool(open_sandbox(sandbox or SandboxConfig())),
        "search": lambda: search_tool(search or SearchConfig(), (prompt or Prompt("")).passage),
    }
    return ToolSet([_named(name, resources) for name in names])


def _named(name: str, resources: Mapping[str, Callable[[], Tool]]) -> Tool:
    if ":" in name:
        item = import_path(name, "tools.names")
        if not isinstance(item, Tool):
            raise ValueError(f"tools.names {name!r} is not a tool; put @tool above the function.")
        return item
    if name in resources:
        return resources[name]()
    visual = VISUAL_TOOLS | ALIASES
    if name not in visual:
        shipped = [*visual, *resources]
        close = nearest(name, shipped)
        hint = f'did you mean "{close}"?' if close else f"there are {', '.join(shipped)}"
        raise ValueError(f'tools.names: there is no tool "{name}"; {hint}')
    return visual[name]
