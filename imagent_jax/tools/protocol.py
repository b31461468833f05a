"""The tool protocol: Qwen's call form in, text and numbered images out.

A call ends as one of three: EXECUTED; INVALID, the policy's mistake, answered with one short line it can act on; FAULT,
the world's mistake (a bug in a tool, a timeout), which must never train.
"""

import json
from collections.abc import Iterator, Sequence
from typing import Any

from imagent_jax.tools.calls import ParsedCall, format_call, invalid, parse_call
from imagent_jax.tools.context import ToolContext, ToolSettings, run_call
from imagent_jax.tools.registry import ImageRegistry
from imagent_jax.tools.schema import Tool, nearest, quote
from imagent_jax.types import CallResult, CallStatus, ToolError

__all__ = [
    "CallResult",
    "CallStatus",
    "ParsedCall",
    "ToolContext",
    "ToolError",
    "ToolSet",
    "ToolSettings",
    "format_call",
    "parse_call",
]

_TOOLS_TEXT = (
    "\n\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>"
)
_CALL_TEXT = (
    "\n</tools>\n\nFor each function call, return a json object with function name and arguments within "
    '<tool_call></tool_call> XML tags:\n<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n'
    "</tool_call>"
)


class ToolSet:
    """The tools a policy may call.

    Raises ValueError when two tools share a name, TypeError when an item was not made by `@tool`.
    """

    def __init__(self, tools: Sequence[Tool]) -> None:
        self._tools: dict[str, Tool] = {}
        for item in tools:
            if not isinstance(item, Tool):
                raise TypeError(f"{getattr(item, '__name__', item)!s} is not a tool; put @tool above the function")
            if item.name in self._tools:
                raise ValueError(f"two tools are called {item.name}; give one another name")
            self._tools[item.name] = item

    def __iter__(self) -> Iterator[Tool]:
        return iter(self._tools.values())

    @property
    def names(self) -> tuple[str, ...]:
        """The tools' names in order."""
        return tuple(self._tools)

    def schemas(self, settings: ToolSettings | None = None) -> list[dict[str, Any]]:
        """The tools' schemas in OpenAI function form; "{coordinates}" in a description becomes the declared space."""
        space = (settings or ToolSettings()).coordinates
        words = "0 to 1000" if space == "relative_1000" else "pixels"
        text = json.dumps([item.schema for item in self._tools.values()], ensure_ascii=False)
        return json.loads(text.replace("{coordinates}", words))

    def system_prompt(self, base_text: str, settings: ToolSettings | None = None) -> str:
        """`base_text` with the tools, as Qwen2.5's chat template writes a system turn; unchanged without tools."""
        if not self._tools:
            return base_text
        lines = "".join("\n" + json.dumps(schema, ensure_ascii=False) for schema in self.schemas(settings))
        return base_text + _TOOLS_TEXT + lines + _CALL_TEXT

    def prepare(self, action_text: str) -> tuple[Tool, ParsedCall] | CallResult:
        """Read and check a call without running it: the tool and its arguments, or an INVALID result."""
        call: ParsedCall | None = None
        try:
            call = parse_call(action_text)
            if call.name not in self._tools:
                close = nearest(call.name, self._tools)
                hint = f'did you mean "{close}"?' if close else f"tools are {', '.join(self._tools) or 'none'}"
                raise ToolError(f"there is no tool {quote(call.name)}; {hint}")
            item = self._tools[call.name]
            item.check(call.arguments)
            return item, call
        except ToolError as error:
            return invalid(error, call)
        except RecursionError:
            return invalid(ToolError("the arguments are nested too deeply"), call)

    def execute(self, action_text: str, registry: ImageRegistry, settings: ToolSettings) -> CallResult:
        """Run the call in a turn's text. Never raises for what the policy wrote or a tool did.

        Images that the tool made join `registry` only when the call is EXECUTED.
        """
        prepared = self.prepare(action_text)
        if isinstance(prepared, CallResult):
            return prepared
        result, fork = run_call(*prepared, registry.fork(), settings)
        if result.status is CallStatus.EXECUTED:
            registry.adopt(fork)
        return result
