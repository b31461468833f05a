"""`@tool`: which functions can be tools, what their context is, and what they return."""

import asyncio
import functools
from typing import Any, List, Literal, Protocol  # noqa: UP035

import pytest
from PIL import Image
from test_tools import brighten, registry_of, run, search

from imagent_jax.chat import QWEN
from imagent_jax.tools import ImageNumber, ToolContext, ToolSet, tool, tools_by_name
from imagent_jax.types import CallStatus, ToolError


def test_functions_that_cannot_be_tools_are_refused_with_a_reason():
    def untyped(context, x):
        """Text."""

    def odd(context, x: complex):
        """Text."""

    def silent(context, x: int):
        pass

    def typo(context, number: int):
        """Text.

        Args:
            nunber: a number
        """

    def variadic(context, *numbers: int):
        """Text."""

    def bare():
        """Text."""

    def keywords(context, **numbers: int):
        """Text."""

    def positional(context, number: int, /):
        """Text."""

    def typed_first(image: int, factor: float):
        """Text."""

    def pixels_first(image: Image.Image, factor: float):
        """Text."""

    def listed_first(boxes: list[float] | None):
        """Text."""

    def keyword_first(*, context):
        """Text."""

    def catch_all(**everything):
        """Text."""

    def yields(context):
        """Text."""
        yield "text"

    async def yields_later(context):
        """Text."""
        yield "text"

    def gives_pixels(context) -> Image.Image:
        """Text."""

    def gives_records(context) -> list[dict]:
        """Text."""

    def gives_nothing(context) -> None:
        """Text."""

    def unknown(context: "Contxt"):
        """Text."""

    def unclosed(context, sides: "list[int"):  # noqa: F722 - what is tested
        """Text."""

    def missing(context, side: "functools.nothing"):
        """Text."""

    def lost(context) -> "Nowhere":
        """Text."""

    def any_list(context, sides: List):  # noqa: UP006 - what is tested
        """Text."""

    def worded(context, number: int = "many"):
        """Text."""

    class Object:
        def __call__(self, context):
            """Text."""

    cases = [
        (untyped, "parameter x needs a type annotation"),
        (odd, r"parameter x has the type <class 'complex'>; use str"),
        (silent, "tool silent needs a docstring"),
        (typo, "describes nunber, which is not a parameter"),
        (variadic, "must be an ordinary named parameter"),
        (keywords, "parameter numbers must be an ordinary named parameter"),
        (positional, "parameter number must be an ordinary named parameter"),
        (bare, "needs a first parameter"),
        (typed_first, r"first parameter receives the ToolContext, which \(image: int\) cannot"),
        (pixels_first, r"which \(image: .*Image\) cannot; put one before it"),
        (listed_first, r"which \(boxes: .*\) cannot"),
        (keyword_first, r"which \(context\) cannot"),
        (catch_all, r"which \(\*\*everything\) cannot"),
        (yields, "tool yields yields; return a list"),
        (yields_later, "tool yields_later yields; return a list"),
        (gives_pixels, r"returns <class 'PIL.Image.Image'>; return text, numbers, context.show\(image\)"),
        (gives_records, r"returns list\[dict\]; return text"),
        (gives_nothing, "returns <class 'NoneType'>; return text"),
        (unknown, "tool unknown: an annotation cannot be read .*Contxt"),
        (unclosed, r"tool unclosed: an annotation cannot be read \(parameter sides: SyntaxError"),
        (missing, r"tool missing: an annotation cannot be read \(parameter side: AttributeError"),
        (lost, r"tool lost: an annotation cannot be read \(the result: NameError"),
        (any_list, r"tool any_list: parameter sides has the type typing\.List; use str"),
        (worded, "parameter number has the default 'many', which is not of its type"),
        (Object(), "has no name and cannot be a tool; write a function that calls it"),
        (functools.partial(silent, x=1), "has no name and cannot be a tool"),
    ]
    for function, reason in cases:
        with pytest.raises(ValueError, match=reason):
            tool(function)
    with pytest.raises(TypeError, match="search is not a tool; put @tool above the function"):
        ToolSet([search])
    with pytest.raises(ValueError, match="two tools are called brighten"):
        ToolSet([brighten, brighten])
    with pytest.raises(ValueError, match='no tool "visual_reflect"; did you mean "visual_reflection"'):
        tools_by_name(["visual_reflect"])
    names = "visual_reflection, visual_confirmation, image_zoom_in_tool, python"
    with pytest.raises(ValueError, match=f'no tool "zzz"; there are {names}'):
        tools_by_name(["zzz"])


def test_a_first_parameter_that_can_be_the_context_is_taken_whatever_it_is_called_or_typed_as():
    class Shows(Protocol):
        settings: Any

    class Mine(ToolContext):
        pass

    for hint in (ToolContext, "ToolContext", Mine, Shows, Any, object, ToolContext | None):

        def look(anything, image: int):
            """Look."""

        look.__annotations__["anything"] = hint
        assert list(tool(look).schema["function"]["parameters"]["properties"]) == ["image"]


@pytest.mark.parametrize(
    "hint, numbers",
    [
        (int, True), (float, True), (bool, True), (list[float], True), (tuple[str, int], True), (Literal[1, 2], True),
        (str, False),
        (ImageNumber, False), (list[ImageNumber], False), (list[str | ImageNumber], False), (ImageNumber | int, False),
        (list, False), (Any, False), (object, False), (str | None, False), (Any | None, False),
    ],
)  # fmt: skip
def test_the_declared_return_type_says_whether_numbers_are_results(hint, numbers):
    def count(context):
        """Count."""

    assert not tool(count).returns_numbers
    count.__annotations__["return"] = hint
    assert tool(count).returns_numbers == numbers


# ---- what a tool returns ------------------------------------------------------------------------------------------


def returned(function):
    """The result of a call of a tool without arguments, on two images."""
    return run(QWEN.render_call(function.__name__, {}), registry_of(2), ToolSet([tool(function)]))


def test_a_number_is_a_result_where_the_tool_declares_numbers_and_an_image_where_it_does_not():
    def added(context) -> int:
        """Add."""
        return 1 + 1

    def shares(context) -> list[float]:
        """Divide."""
        return [0.5, 2, 1e-9]

    def larger(context) -> bool:
        """Compare."""
        return True

    def again(context):
        """Show."""
        return 2

    def declared(context) -> ImageNumber:
        """Show."""
        return 2

    def made(context) -> int:
        """Show: the number comes from the context."""
        return context.show(Image.new("RGB", (40, 60)), origin="blank")

    def both(context) -> list[str | int]:
        """Show and count."""
        return ["two of", context.registry[2].number, 2]

    assert [returned(f).parts for f in (added, shares, larger)] == [["2"], ["0.5", "2", "1e-09"], ["true"]]
    assert [returned(f).parts for f in (again, declared)] == [["Image 2", 2]] * 2
    assert returned(made).parts == ["Image 3: blank", 3] and returned(both).parts == ["two of", "Image 2", 2, "2"]
    assert all(type(part) in (str, int) for part in returned(made).parts)


def test_an_async_tool_runs_to_its_end_and_fails_as_any_other():
    async def waits(context) -> str:
        """Wait."""
        await asyncio.sleep(0.001)
        return "waited"

    async def breaks(context) -> str:
        """Break."""
        raise OSError("the disk is full")

    async def refuses(context) -> str:
        """Refuse."""
        raise ToolError("not now")

    assert returned(waits).parts == ["waited"]
    assert returned(breaks).status is CallStatus.FAULT and "the disk is full" in returned(breaks).error
    assert returned(refuses).parts == ["Error: not now"]
