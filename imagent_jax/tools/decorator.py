"""The `@tool` decorator, which turns a typed Python function into a tool."""

import functools
import inspect
import itertools
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, Literal, get_args, get_origin, get_type_hints

from imagent_jax.config import CallSettings
from imagent_jax.tools.context import ToolContext
from imagent_jax.tools.schema import Tool, matches, parse_docstring, type_schema
from imagent_jax.types import ImageNumber


def tool(function: Callable[..., Any] | None = None, *, settings: type[CallSettings] = CallSettings) -> Any:
    """Turn a function into a Tool. Its first parameter receives the ToolContext and is not part of the schema.

    A method of an environment may be a tool too; its first parameter is then `self`, and its second the ToolContext.

    The schema has OpenAI's function form, as Hugging Face's `get_json_schema` makes it and Qwen's chat template prints it.
    Types: str, int, float, bool, dict, list, list[T], tuple[T, T, ...] of fixed length, Literal, and `T | None`.
    The docstring's text before "Args:" is the description; its Args entries describe the parameters.

    The function may be `async def`. It returns text, numbers from `context.show`, or a list of these. The declared return type
    says what another number means: `int`, `float` and `bool` are results that the policy reads; `ImageNumber`, or no declared
    type, is the number of an image to show.

    Args:
        settings: the tool's own settings, as in `@tool(settings=MySettings)`: a frozen dataclass that inherits from
            `CallSettings` and has defaults. They are read from `tools.settings.<name>`; the tool finds them at `context.own`.
    Raises:
        ValueError: the first parameter or the return type can never work, a parameter lacks a supported type, the docstring is
            missing, or it describes an unknown parameter.
    """
    if function is None:
        return functools.partial(tool, settings=settings)
    if (name := getattr(function, "__name__", None)) is None:
        raise ValueError(f"{function!r} has no name and cannot be a tool; write a function that calls it")
    if not (isinstance(settings, type) and issubclass(settings, CallSettings)):
        raise ValueError(f"tool {name}: its settings must be a frozen dataclass that inherits from tools.CallSettings")
    parameters = list(inspect.signature(function).parameters.values())
    if method := bool(parameters) and parameters[0].name == "self":
        parameters = parameters[1:]
    hints = _hints(function, name)
    _check_context(parameters, hints, name)
    description, documented = parse_docstring(inspect.getdoc(function) or "")
    if not description:
        raise ValueError(f"tool {name} needs a docstring: its first paragraph tells the policy what the tool does")
    properties: dict[str, Any] = {}
    required: list[str] = []
    defaults: dict[str, Any] = {}
    for parameter in parameters[1:]:
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD, parameter.POSITIONAL_ONLY):
            raise ValueError(f"tool {name}: parameter {parameter.name} must be an ordinary named parameter")
        if parameter.name not in hints:
            raise ValueError(f"tool {name}: parameter {parameter.name} needs a type annotation")
        properties[parameter.name] = type_schema(hints[parameter.name], f"tool {name}: parameter {parameter.name}")
        if parameter.name in documented:
            properties[parameter.name]["description"] = documented.pop(parameter.name)
        if parameter.default is parameter.empty:
            required.append(parameter.name)
        elif not _matches(properties[parameter.name], parameter.default):
            raise ValueError(
                f"tool {name}: parameter {parameter.name} has the default {parameter.default!r}, which is not of its type"
            )
        elif isinstance(parameter.default, (dict, list, tuple)):
            defaults[parameter.name] = parameter.default
    documented.pop(parameters[0].name, None)
    if documented:
        raise ValueError(f"tool {name}: the docstring describes {', '.join(documented)}, which is not a parameter")
    schema = {"type": "object", "properties": properties, "required": required}
    body = {"name": name, "description": description, "parameters": schema}
    numbers = _returns_numbers(function, hints, name)
    return Tool(name, function, {"type": "function", "function": body}, numbers, method, settings(), defaults)


def _hints(function: Callable[..., Any], name: str) -> dict[str, Any]:
    """Return the types of a function's annotations.

    Raises:
        ValueError: an annotation cannot be read; the sentence names its parameter.
    """
    hints: dict[str, Any] = {}
    for parameter, annotation in getattr(function, "__annotations__", {}).items():
        one = SimpleNamespace(__annotations__={parameter: annotation})
        try:
            hints |= get_type_hints(one, getattr(inspect.unwrap(function), "__globals__", None))
        except Exception as error:  # whatever the text evaluates to
            which = "the result" if parameter == "return" else f"parameter {parameter}"
            reason = f"{which}: {type(error).__name__}: {error}"
            raise ValueError(f"tool {name}: an annotation cannot be read ({reason}); import what it names") from error
    return hints


def _matches(schema: dict[str, Any], default: Any) -> bool:
    return default is None or matches(schema, list(default) if isinstance(default, tuple) else default)


def _check_context(parameters: list[inspect.Parameter], hints: dict[str, Any], name: str) -> None:
    if not parameters:
        raise ValueError(f"tool {name} needs a first parameter for the ToolContext")
    first = parameters[0]
    by_position = first.kind in (first.POSITIONAL_ONLY, first.POSITIONAL_OR_KEYWORD)
    if not by_position or not any(_fits(leaf, ToolContext) for leaf in _leaves(hints.get(first.name, Any))):
        raise ValueError(f"tool {name}: its first parameter receives the ToolContext, which ({first}) cannot; put one before it")


def _returns_numbers(function: Callable[..., Any], hints: dict[str, Any], name: str) -> bool:
    """Return whether numbers of the declared return type are results, not images.

    Raises:
        ValueError: nothing of the declared type can be shown to a policy.
    """
    leaves = list(_leaves(hints.get("return", Any)))
    if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
        raise ValueError(f"tool {name} yields; return a list")
    if not any(_fits(leaf, str, int, float, list, tuple) for leaf in leaves):
        raise ValueError(f"tool {name} returns {hints['return']}; return text, numbers, context.show(image), or a list of them")
    return ImageNumber not in leaves and any(leaf in (int, float, bool) for leaf in leaves)


def _fits(hint: Any, *types: type) -> bool:
    """Return whether a value of one of `types` may have the type `hint`, as far as classes say it."""
    if not isinstance(hint, type) or hint in (Any, object) or getattr(hint, "_is_protocol", False):
        return True
    return any(issubclass(hint, kind) or issubclass(kind, hint) for kind in types)


def _leaves(hint: Any) -> Iterator[Any]:
    """Yield the types that a hint is made of: `list[str | int]` has str and int."""
    if get_origin(hint) is Literal:
        yield from map(type, get_args(hint))
    elif get_args(hint):
        yield from itertools.chain.from_iterable(map(_leaves, get_args(hint)))
    else:
        yield hint
