"""Results of failed calls."""

from imagent_jax.chat import Call, MalformedCall
from imagent_jax.types import CallResult, CallStatus, ToolError

FAULT_TEXT = "Error: the tool failed."


def invalid(error: ToolError, call: Call | MalformedCall) -> CallResult:
    """Return the INVALID result of an error that the policy can correct. The policy reads its message on one line."""
    line = "Error: " + " ".join(str(error).split())
    return CallResult(CallStatus.INVALID, *_named(call), [line], line)


def fault(error: str, call: Call | MalformedCall) -> CallResult:
    """Return the FAULT result. The policy reads a fixed line; `error` is kept for the logs."""
    return CallResult(CallStatus.FAULT, *_named(call), [FAULT_TEXT], error)


def _named(call: Call | MalformedCall) -> tuple[str | None, dict | None]:
    return (call.name, call.arguments) if isinstance(call, Call) else (None, None)
