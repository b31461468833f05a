"""The tool protocol: checks and executes a call, and returns text and numbered images.

A call ends as EXECUTED; as INVALID, a mistake of the policy, answered with one line that tells how to correct it; or as FAULT,
an error of the environment (a bug in a tool, a timeout), which is excluded from training.
"""

import json
import traceback
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from imagent_jax.chat import Call, MalformedCall
from imagent_jax.chat.prompts import Prompt
from imagent_jax.tools.calls import fault, invalid, too_deep
from imagent_jax.tools.context import ToolSettings, TrajectoryState, run_call
from imagent_jax.tools.registry import ImageRegistry
from imagent_jax.tools.schema import Tool, nearest
from imagent_jax.types import CallResult, CallStatus, ToolError, quote

_SPACES = {
    "relative_1000": ("0 to 1000", "from 0 to 1000 across the whole width and the whole height of the image"),
    "absolute": ("pixels", "in pixels of the image as it is shown to you"),
}


class ToolSet:
    """The tools that a policy may call.

    Args:
        changes: settings of the tools' own, by name (`tools.settings`); there may be some of tools of environments.

    Raises:
        ValueError: two tools have the same name, or see `Tool.configured`.
        TypeError: an item is not a `Tool`.
    """

    def __init__(self, tools: Sequence[Tool], changes: Mapping[str, Mapping[str, Any]] | None = None) -> None:
        self._tools: dict[str, Tool] = {}
        self.changes = changes or {}
        for item in tools:
            if not isinstance(item, Tool):
                raise TypeError(f"{getattr(item, '__name__', item)!s} is not a tool; put @tool above the function")
            if item.name in self._tools:
                raise ValueError(f"two tools are called {item.name}; give one another name")
            self._tools[item.name] = item.configured(self.changes[item.name]) if item.name in self.changes else item

    def __iter__(self) -> Iterator[Tool]:
        return iter(self._tools.values())

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the tools, in order."""
        return tuple(self._tools)

    def subset(self, names: Sequence[str] | None) -> "ToolSet":
        """Return the tools with these names, in the order of this set. None: this set.

        Raises:
            ValueError: a name is none of this set's.
        """
        if names is None:
            return self
        for name in names:
            if name not in self._tools:
                raise ValueError(f"there is no tool {quote(name)} among those of the run ({', '.join(self._tools) or 'none'})")
        return ToolSet([item for item in self if item.name in names], self.changes)

    def limit_s(self, call: Any) -> float | None:
        """Return the seconds that a call may take by its tool's own settings; None: it has no limit of its own."""
        item = self._tools.get(call.name) if isinstance(call, Call) else None
        return item.settings.timeout_s if item else None

    def schemas(self, settings: ToolSettings | None = None, prompt: Prompt | None = None) -> list[dict[str, Any]]:
        """Return the tools' schemas in OpenAI function form.

        In a description, "{coordinates}" becomes the coordinate space in two words, and "{space}" in a clause.

        Args:
            prompt: texts in place of the tools' own.
        """
        coordinates, space = _SPACES[(settings or ToolSettings()).coordinates]
        schemas = [prompt.described(item.schema) if prompt else item.schema for item in self._tools.values()]
        text = json.dumps(schemas, ensure_ascii=False)
        return json.loads(text.replace("{coordinates}", coordinates).replace("{space}", space))

    def tool_of(self, call: Call) -> Tool:
        """Return the tool that a call names, after checking the arguments.

        Raises:
            ToolError: the tool is unknown, or the arguments do not match its schema.
        """
        if call.name not in self._tools:
            close = nearest(call.name, self._tools)
            hint = f'did you mean "{close}"?' if close else f"tools are {', '.join(self._tools) or 'none'}"
            raise ToolError(f"there is no tool {quote(call.name)}; {hint}")
        if too_deep(call.arguments):
            raise ToolError("the arguments are nested too deeply")
        self._tools[call.name].check(call.arguments)
        return self._tools[call.name]

    def execute(
        self,
        call: Call | MalformedCall,
        registry: ImageRegistry,
        settings: ToolSettings,
        state: TrajectoryState | None = None,
    ) -> CallResult:
        """Run a call. Never raise on the policy's input or a tool's error. `state`: what tools keep between calls.

        Images made by the tool are added to `registry` only if the call is EXECUTED.
        """
        try:
            if isinstance(call, MalformedCall):
                raise ToolError(call.error)
            tool = self.tool_of(call)
        except ToolError as error:
            return invalid(error, call)
        except Exception:  # noqa: BLE001 - of a tool's own check
            return fault(traceback.format_exc(), call)
        result, fork = run_call(tool, call, registry.fork(), settings, state)
        if result.status is CallStatus.EXECUTED:
            registry.adopt(fork)
        return result
