"""Results of failed calls."""

import itertools
from typing import Any

from imagent_jax.chat import Call, MalformedCall
from imagent_jax.types import CallResult, CallStatus, ToolError

FAULT_TEXT = "Error: the tool failed."
MOST_NESTED = 100
"""Most levels of lists and objects in the arguments of a call. What copies and writes them recurses."""


def invalid(error: ToolError, call: Call | MalformedCall) -> CallResult:
    """Return the INVALID result of an error that the policy can correct. The policy reads its message on one line."""
    line = "Error: " + " ".join(str(error).split())
    return CallResult(CallStatus.INVALID, *_named(call), [line], line)


def fault(error: str, call: Call | MalformedCall) -> CallResult:
    """Return the FAULT result. The policy reads a fixed line; `error` is kept for the logs."""
    return CallResult(CallStatus.FAULT, *_named(call), [FAULT_TEXT], error)


def too_deep(arguments: dict[str, Any]) -> bool:
    """Return whether arguments are nested more than `MOST_NESTED` levels deep."""
    level: list[Any] = [arguments]
    for _ in range(MOST_NESTED):
        values = (item.values() if isinstance(item, dict) else item for item in level if isinstance(item, (dict, list)))
        level = list(itertools.chain.from_iterable(values))
    return any(isinstance(item, (dict, list)) for item in level)


def _named(call: Call | MalformedCall) -> tuple[str | None, dict | None]:
    """Return a call's name and arguments, as far as they can be recorded."""
    if isinstance(call, MalformedCall):
        return None, None
    return call.name, None if too_deep(call.arguments) else call.arguments
