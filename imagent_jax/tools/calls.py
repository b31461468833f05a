"""A tool call as text, and what came of it.

A call is Qwen's `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`. Text from a model is read by
`json.loads` alone.
"""

import json
import re
from typing import Any, NamedTuple

from imagent_jax.tools.schema import quote
from imagent_jax.types import CallResult, CallStatus, ToolError

OPEN, CLOSE = "<tool_call>", "</tool_call>"
FAULT_TEXT = "Error: the tool failed."


class ParsedCall(NamedTuple):
    """A well-formed call: the tool's name and its arguments."""

    name: str
    arguments: dict[str, Any]


def invalid(error: ToolError, call: ParsedCall | None = None) -> CallResult:
    """The INVALID result of a repairable error: its message on one line, as the policy reads it."""
    line = plain("Error: " + " ".join(str(error).split()))
    name, arguments = call if call is not None else (None, None)
    return CallResult(CallStatus.INVALID, name, arguments, [line], line)


def fault(error: str, call: ParsedCall | None = None) -> CallResult:
    """The FAULT result: the policy reads a fixed line, `error` is kept for the logs."""
    name, arguments = call if call is not None else (None, None)
    return CallResult(CallStatus.FAULT, name, arguments, [FAULT_TEXT], error)


def plain(text: str) -> str:
    """Text that cannot become a marker token: "<|image_pad|>" turns into "< |image_pad|>", lone surrogates into "?".

    Observation text quotes the policy and, for some tools, the world; neither may place an image or end a turn.
    """
    text = text.encode("utf-8", "replace").decode("utf-8")
    return re.sub(r"<(?=\||/?(?:tool_|answer|think))", "< ", text)


def format_call(name: str, arguments: dict[str, Any]) -> str:
    """A call as Qwen2.5's chat template writes it."""
    return f"{OPEN}\n{json.dumps({'name': name, 'arguments': arguments}, ensure_ascii=False)}\n{CLOSE}"


def parse_call(text: str) -> ParsedCall:
    """Read the one call in a turn's text. Text around it is ignored.

    Raises ToolError, saying what to repair, when there is none or more than one, when it is not closed, or when it is
    not strict JSON (no NaN, no repeated keys) of the form {"name": text, "arguments": object}.
    """
    opened, closed = text.count(OPEN), text.count(CLOSE)
    if opened == 0:
        raise ToolError("there is no tool call" if closed == 0 else "the tool call is not opened")
    if opened > 1 or closed > 1:
        raise ToolError("make one tool call at a time")
    body = text.partition(OPEN)[2]
    if closed == 0 or CLOSE not in body:
        raise ToolError("the tool call is not closed")
    call = _load_json(body.partition(CLOSE)[0])
    if not isinstance(call, dict):
        raise ToolError('the tool call must be an object {"name": ..., "arguments": {...}}')
    for key in call:
        if key not in ("name", "arguments"):
            raise ToolError(f'the tool call has an unexpected key {quote(key)}; it takes "name" and "arguments"')
    if not isinstance(call.get("name"), str):
        raise ToolError('the tool call needs "name": the name of a tool')
    if not isinstance(call.get("arguments"), dict):
        raise ToolError('the tool call needs "arguments": an object')
    return ParsedCall(call["name"], call["arguments"])


def _load_json(text: str) -> Any:
    """json.loads with everything beyond JSON refused; ToolError with the place of the mistake."""

    def refuse_constant(word: str) -> None:
        raise ToolError(f"bad JSON: {word} is not a JSON number")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) < len(pairs):
            keys = [key for key, _ in pairs]
            raise ToolError(f"bad JSON: {quote(next(k for k in keys if keys.count(k) > 1))} is given twice")
        return result

    try:
        return json.loads(text, parse_constant=refuse_constant, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        raise ToolError(f"bad JSON at character {error.pos} of the call: {error.msg}") from error
    except RecursionError as error:
        raise ToolError("bad JSON: nested too deeply") from error
    except ValueError as error:  # an integer of thousands of digits
        raise ToolError("bad JSON: a number is too long") from error
