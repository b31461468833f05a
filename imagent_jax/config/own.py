"""Settings of a part that is not ours, such as a user's tool: a frozen dataclass, read and checked as the sections are."""

import dataclasses
import typing
from argparse import ArgumentError
from collections.abc import Mapping
from typing import Any

from jsonargparse import ArgumentParser

from imagent_jax.config.loading import check_range, kind_in_words


def read_own(kind: type[Any], values: Mapping[str, Any], place: str) -> Any:
    """Return an instance of a dataclass. What `values` do not name keeps its default.

    Args:
        place: dotted name of the mapping in the settings, for sentences.
    Raises:
        ValueError: there is no such setting, or a value is of another type or out of range.
    """
    hints = typing.get_type_hints(kind)
    parser, bounds, defaults = ArgumentParser(exit_on_error=False), {}, kind()
    for field in dataclasses.fields(kind):
        parser.add_argument(f"--{field.name}", type=hints[field.name], default=getattr(defaults, field.name))
        bounds[field.name] = _said(kind, field.name).get("bounds", {})
    found = {}
    for name, value in values.items():
        if name not in bounds:
            raise ValueError(f"There is no setting {place}.{name}; there are {', '.join(bounds)}.")
        if value is None and hints[name] is not Any and type(None) not in typing.get_args(hints[name]):
            raise ValueError(f"{place}.{name} is empty; it must be {kind_in_words(hints[name])}, or be left out for its default.")
        try:
            found[name] = parser.parse_object({name: value})[name]
        except ArgumentError:
            raise ValueError(f"{place}.{name} is {value!r}; it must be {kind_in_words(hints[name])}.") from None
        check_range(f"{place}.{name}", found[name], bounds[name])
    try:
        return kind(**found)
    except ValueError as error:  # of a check of the dataclass's own
        raise ValueError(f"{place}: {error}") from error


def lines(own: Any) -> list[str]:
    """Return a line for every setting of an instance: its name, its value, and its help where it has one."""
    told = [(field.name, getattr(own, field.name)) for field in dataclasses.fields(own)]
    helps = {name: _said(type(own), name).get("help") for name, _ in told}
    return [f"{name}: {value}" + (f" ({helps[name]})" if helps[name] else "") for name, value in told]


def _said(kind: type, name: str) -> Mapping[str, Any]:
    """What `setting` says of a field, in the class itself or in one from which it inherits."""
    classes = [base for base in kind.__mro__ if dataclasses.is_dataclass(base)]
    found = [field.metadata for base in classes for field in dataclasses.fields(base) if field.name == name and field.metadata]
    return found[0] if found else {}
