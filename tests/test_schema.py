"""Tools from typed functions: their schemas, the values that fit, and what is refused."""

import inspect
from typing import Dict, List, Literal  # noqa: UP035

import pytest
from test_tools import search, with_context
from transformers.utils.chat_template_utils import get_json_schema

from imagent_jax.tools import (
    tool,
)
from imagent_jax.tools.schema import expected, matches, parse_docstring, quote, type_schema


def test_the_schema_of_a_function_is_the_one_hugging_face_makes():
    assert tool(with_context(search)).schema == get_json_schema(search)


TYPES = [  # annotation, JSON schema, in words, values that fit, values that do not
    (str, {"type": "string"}, "a string", ["", "3"], [3, None, ["a"]]),
    (int, {"type": "integer"}, "an integer", [0, -3], [1.0, True, "1"]),
    (float, {"type": "number"}, "a number", [1, -0.5], [True, "1", float("inf"), float("nan"), 10**400]),
    (bool, {"type": "boolean"}, "true or false", [True, False], [0, 1, "true"]),
    (dict, {"type": "object"}, "an object", [{}, {"a": 1}], [[], "{}"]),
    (list, {"type": "array"}, "a list", [[], [1, "a", [2]]], [{}, "ab"]),
    (list[str], {"type": "array", "items": {"type": "string"}}, "a list of strings", [[], ["a"]], [["a", 1], [None], "a"]),
    (list[list[int]], {"type": "array", "items": {"type": "array", "items": {"type": "integer"}}}, "a list of lists",
     [[[1], []]], [[1], [["a"]]]),
    (tuple[float, float], {"type": "array", "items": {"type": "number"}, "minItems": 2, "maxItems": 2},
     "a list of 2 numbers", [[1, 2.5]], [[1], [1, 2, 3], [], [1, "2"]]),
    (Literal["low", "high"], {"type": "string", "enum": ["low", "high"]}, "low or high", ["high", "low"], ["", "full", None]),
    (Literal[1, 2], {"type": "integer", "enum": [1, 2]}, "1 or 2", [1, 2], [True, 1.0, 3, "1"]),
    (list[Literal["a", "b"]], {"type": "array", "items": {"type": "string", "enum": ["a", "b"]}}, "a list of items, each a or b",
     [[], ["b", "a"]], [["c"], "a"]),
    (tuple[Literal[1, 2], Literal[1, 2]],
     {"type": "array", "items": {"type": "integer", "enum": [1, 2]}, "minItems": 2, "maxItems": 2},
     "a list of 2 items, each 1 or 2", [[1, 2]], [[1, 3], [1]]),
    (int | None, {"type": "integer", "nullable": True}, "an integer", [None, 3], ["a", 1.5]),
    (list[int] | None, {"type": "array", "items": {"type": "integer"}, "nullable": True}, "a list of integers",
     [None, [1]], [[None], 1]),
]  # fmt: skip


@pytest.mark.parametrize(("hint", "schema", "words", "right", "wrong"), TYPES, ids=[str(case[0]) for case in TYPES])
def test_a_type_has_a_schema_words_and_the_values_that_fit_it(hint, schema, words, right, wrong):
    assert type_schema(hint, "here") == schema and expected(schema) == words
    assert [matches(schema, value) for value in right] == [True] * len(right)
    assert [matches(schema, value) for value in wrong] == [False] * len(wrong)


BARE = List, Dict  # noqa: UP006 - what is tested


@pytest.mark.parametrize("hint", [Literal[1, "a"], Literal[b"a"], tuple[int, str], tuple[()], int | str, bytes, *BARE])
def test_a_type_without_a_schema_is_named(hint):
    with pytest.raises(ValueError, match="^tool f: parameter x has the type .*; use str, int, float, bool"):
        type_schema(hint, "tool f: parameter x")


def test_a_docstring_gives_a_description_and_parameters_each_on_one_line():
    text = """Find a thing
    in a place.

    Returns:
        what was found

    Args:
        context: the trajectory's images
        size (int, optional): how large
            it may be
        name:
            what it is called

    Raises:
        ToolError: note: never
    """
    described = {"context": "the trajectory's images", "size": "how large it may be", "name": "what it is called"}
    assert parse_docstring(inspect.cleandoc(text)) == ("Find a thing in a place.", described)

    def find(context, size: int, name: str = "it"):
        pass

    find.__doc__ = text
    body = tool(find).schema["function"]
    assert body["description"] == "Find a thing in a place." and body["parameters"]["required"] == ["size"]
    assert [p["description"] for p in body["parameters"]["properties"].values()] == [described["size"], described["name"]]


def test_what_a_call_wrote_is_quoted_in_few_characters_of_one_line():
    assert quote("a" * 24) == f'"{"a" * 24}"' and quote("b" * 25) == f'"{"b" * 21}..."'
    assert quote("a\nb\u200bc") == '"a b c"' and quote([1, "a"]) == "[1, 'a']"
    assert quote("abcdef", 5) == '"ab..."' and quote(1234567, 6) == "123..."
