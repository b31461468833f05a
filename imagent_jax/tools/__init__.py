"""Tools that show images to the policy: registry, call protocol, and the two visual tools."""

from collections.abc import Sequence

from imagent_jax.config.naming import import_path
from imagent_jax.tools.calls import fault, invalid
from imagent_jax.tools.context import ToolContext, ToolSettings
from imagent_jax.tools.decorator import tool
from imagent_jax.tools.pool import CallPool
from imagent_jax.tools.protocol import ToolSet
from imagent_jax.tools.registry import ImageRegistry
from imagent_jax.tools.schema import Tool, nearest
from imagent_jax.tools.visual import VISUAL_TOOLS, to_bbox, to_pixels, visual_confirmation, visual_reflection
from imagent_jax.types import CallResult, CallStatus, ImageEntry, ImageNumber, ToolError

__all__ = [
    "VISUAL_TOOLS",
    "CallPool",
    "CallResult",
    "CallStatus",
    "ImageEntry",
    "ImageNumber",
    "ImageRegistry",
    "Tool",
    "ToolContext",
    "ToolError",
    "ToolSet",
    "ToolSettings",
    "fault",
    "invalid",
    "to_bbox",
    "to_pixels",
    "tool",
    "tools_by_name",
    "visual_confirmation",
    "visual_reflection",
]


def tools_by_name(names: Sequence[str]) -> ToolSet:
    """Return the tool set with these names, in order: built-in tools, or user-defined tools as 'package.module:name'.

    Raises:
        ValueError: unknown name (the message suggests the nearest), or a path that cannot be imported or is not a tool.
    """
    return ToolSet([_named(name) for name in names])


def _named(name: str) -> Tool:
    if ":" in name:
        item = import_path(name, "tools.names")
        if not isinstance(item, Tool):
            raise ValueError(f"tools.names {name!r} is not a tool; put @tool above the function.")
        return item
    if name not in VISUAL_TOOLS:
        close = nearest(name, VISUAL_TOOLS)
        hint = f'did you mean "{close}"?' if close else f"there are {', '.join(VISUAL_TOOLS)}"
        raise ValueError(f'tools.names: there is no tool "{name}"; {hint}')
    return VISUAL_TOOLS[name]
