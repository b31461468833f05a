"""Tools: functions with a JSON schema, the schemas of Python types, and the check of arguments."""

import asyncio
import copy
import difflib
import functools
import inspect
import math
import re
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Union, get_args, get_origin

from imagent_jax.config import CallSettings, read_own
from imagent_jax.types import ToolError, quote

_SIMPLE = {str: "string", int: "integer", float: "number", bool: "boolean", dict: "object", list: "array"}
_EXPECTED = {
    "string": "a string",
    "integer": "an integer",
    "number": "a number",
    "boolean": "true or false",
    "object": "an object",
    "array": "a list",
}


@dataclass(frozen=True)
class Tool:
    """A function that the policy can call, `function(context, **arguments)`, with its name and its schema in OpenAI form.

    Attributes:
        returns_numbers: the numbers that it returns are results to read, not numbers of images to show.
        method: it is a method of an environment. Read from an instance, it is bound to it, as methods are.
        settings: its own settings, among them the time limit of a call.
        defaults: those of its parameters that can be changed; every call gets copies.
    """

    name: str
    function: Callable[..., Any]
    schema: dict[str, Any]
    returns_numbers: bool = False
    method: bool = False
    settings: CallSettings = CallSettings()
    defaults: Mapping[str, Any] = field(default_factory=dict)

    def __get__(self, instance: Any, owner: type | None = None) -> "Tool":
        bound = instance is not None and self.method
        return replace(self, function=functools.partial(self.function, instance), method=False) if bound else self

    def configured(self, changes: Mapping[str, Any]) -> "Tool":
        """Return the tool with some of its settings changed.

        Raises:
            ValueError: there is no such setting, or a value is of another type or out of range; the sentence names it.
        """
        return replace(self, settings=read_own(type(self.settings), changes, f"tools.settings.{self.name}"))

    def __call__(self, context: Any, /, **arguments: Any) -> Any:
        """Call the function; an `async def` function runs to its end."""
        returned = self.function(context, **copy.deepcopy(dict(self.defaults)) | arguments)
        return asyncio.run(returned) if inspect.iscoroutine(returned) else returned

    def check(self, arguments: dict[str, Any]) -> None:
        """Check arguments against the schema.

        Raises:
            ToolError: the arguments do not match; the message names the argument and what was expected.
        """
        parameters = self.schema["function"]["parameters"]
        properties = parameters["properties"]
        for name in arguments:
            if name not in properties:
                raise ToolError(f"{self.name} has no argument {quote(name)}{_suggest(name, properties)}")
        for name in parameters["required"]:
            if name not in arguments:
                raise ToolError(f"{self.name} needs the argument {name}: {expected(properties[name])}")
        for name, value in arguments.items():
            if not matches(properties[name], value):
                raise ToolError(f"{name} must be {expected(properties[name])}, got {quote(value)}")


def type_schema(hint: Any, where: str) -> dict[str, Any]:
    """Return the JSON schema of a Python type.

    Raises:
        ValueError: unsupported type; the message begins with `where`.
    """
    origin, args = get_origin(hint), get_args(hint)
    if hint in _SIMPLE:
        return {"type": _SIMPLE[hint]}
    if origin is Literal and len({type(value) for value in args}) == 1 and type(args[0]) in (str, int, bool):
        return {"type": _SIMPLE[type(args[0])], "enum": list(args)}
    if origin is list and args:
        return {"type": "array", "items": type_schema(args[0], where)}
    if origin is tuple and args and len(set(args)) == 1:
        return {"type": "array", "items": type_schema(args[0], where), "minItems": len(args), "maxItems": len(args)}
    if origin in (Union, types.UnionType) and len(args) == 2 and type(None) in args:
        inner = next(arg for arg in args if arg is not type(None))
        return {**type_schema(inner, where), "nullable": True}
    raise ValueError(f"{where} has the type {hint}; use str, int, float, bool, dict, list[T], tuple[T, T], Literal or T | None")


def parse_docstring(text: str) -> tuple[str, dict[str, str]]:
    """Split a Google-style docstring into its description and {parameter: description}, each on one line."""
    head, _, rest = text.partition("Args:\n")
    description = re.split(r"^(?:Returns|Raises|Yields):", head, maxsplit=1, flags=re.MULTILINE)[0]
    documented: dict[str, str] = {}
    name = ""
    for line in inspect.cleandoc(re.split(r"^\S", rest, maxsplit=1, flags=re.MULTILINE)[0]).splitlines():
        entry = re.match(r"(\w+)(?:\s*\([^)]*\))?:\s*(.*)", line)
        if entry:
            name, documented[entry[1]] = entry[1], entry[2].strip()
        elif name and line.strip():
            documented[name] = f"{documented[name]} {line.strip()}".strip()
    return " ".join(description.split()), documented


def matches(schema: dict[str, Any], value: Any) -> bool:
    """Return whether a JSON value matches a schema of `type_schema`. Numbers must be finite; true does not equal 1."""
    if value is None:
        return schema.get("nullable", False)
    if "enum" in schema:
        return any(type(value) is type(choice) and value == choice for choice in schema["enum"])
    kind = schema["type"]
    if kind == "number":
        return type(value) in (int, float) and _finite(value)
    if kind == "array":
        length = type(value) is list and len(value)
        return (
            type(value) is list
            and schema.get("minItems", 0) <= length <= schema.get("maxItems", length)
            and all(matches(schema.get("items", {}) or {"type": "any"}, item) for item in value)
        )
    python_types = {"string": str, "integer": int, "boolean": bool, "object": dict}
    return type(value) is python_types[kind] if kind in python_types else True


def expected(schema: dict[str, Any]) -> str:
    """Return what a schema accepts, in words: "a list of 4 numbers", "low or high"."""
    if "enum" in schema:
        return " or ".join(str(choice) for choice in schema["enum"])
    kind = schema["type"]
    if kind == "array" and "items" in schema:
        items = f"{schema['items']['type']}s".replace("arrays", "lists")
        items = f"items, each {expected(schema['items'])}" if "enum" in schema["items"] else items
        return f"a list of {schema['minItems']} {items}" if "minItems" in schema else f"a list of {items}"
    return _EXPECTED[kind]


def nearest(name: str, names: Any) -> str | None:
    """Return the name most similar to `name`, or None if none is close."""
    close = difflib.get_close_matches(name[:100], list(names), n=1, cutoff=0.5)
    return close[0] if close else None


def _suggest(name: str, names: Any) -> str:
    close = nearest(name, names)
    return f'; did you mean "{close}"?' if close else f"; it has {', '.join(names) or 'none'}"


def _finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond the range of float
        return False
