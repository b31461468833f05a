"""The tool protocol: schemas from signatures, strict calls, and who is to blame when one fails."""

import ast
import asyncio
import inspect
import json
import re
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Literal

import numpy as np
import pytest
from PIL import Image
from scripted_run import execute
from transformers.utils.chat_template_utils import get_json_schema, render_jinja_template

import imagent_jax
from imagent_jax.chat import QWEN
from imagent_jax.chat.prompts import read_prompt
from imagent_jax.tools import (
    CallPool,
    ImageRegistry,
    ToolContext,
    ToolSet,
    ToolSettings,
    tool,
    tools_by_name,
)
from imagent_jax.types import CallStatus, ToolError

SETTINGS = ToolSettings()
VISUAL = tools_by_name(["visual_reflection", "visual_confirmation"])

# The system turn of Qwen2.5's published chat template, for a conversation that starts with a system message.
QWEN_SYSTEM = """
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {{- messages[0]['content'] }}
    {{- "\\n\\n# Tools\\n\\nYou may call one or more functions to assist with the user query.\\n\\n\
You are provided with function signatures within <tools></tools> XML tags:\\n<tools>" }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\\n</tools>\\n\\nFor each function call, return a json object with function name and arguments within \
<tool_call></tool_call> XML tags:\\n<tool_call>\\n{\\"name\\": <function-name>, \\"arguments\\": <args-json-object>}\\n\
</tool_call><|im_end|>\\n" }}
{%- else %}
    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
{%- endif %}"""


def registry_of(n=3):
    registry = ImageRegistry()
    for seed in range(n):
        pixels = np.random.default_rng(seed).integers(0, 256, (280, 280, 3), dtype=np.uint8)
        registry.add(Image.fromarray(pixels), shown=(56, 56), min_pixels=3136, max_pixels=4704)
    return registry


def search(
    query: str,
    sources: list[int],
    mode: Literal["fast", "full"] = "fast",
    limit: int = 3,
    least: float = 0.5,
    exact: bool = False,
    tags: list[str] | None = None,
):
    """Look a thing up.

    Args:
        query: what to look for
        sources: where to look
        mode: how well to look
        limit: most results
        least: least score,
            from 0 to 1
        exact: match whole words
        tags: tags to match
    """


def with_context(function):
    """The same function behind a first parameter for the context."""

    def wrapped(context, *args, **kwargs):
        return function(*args, **kwargs)

    signature = inspect.signature(function)
    first = inspect.Parameter("context", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    wrapped.__signature__ = signature.replace(parameters=[first, *signature.parameters.values()])
    wrapped.__annotations__ = dict(function.__annotations__)
    wrapped.__name__, wrapped.__doc__ = function.__name__, function.__doc__
    return wrapped


@tool
def brighten(context: ToolContext, image: int, gain: float = 2.0) -> list[str | int]:
    """Brighten an image.

    Args:
        image: image number
        gain: factor
    """
    source = context.registry[image].image
    number = context.show(source.point(lambda value: value * gain), parent=image, origin="brighter copy")
    return [f"gain {gain:g}", number]


@tool
def misbehave(context: ToolContext, how: str):
    """Do something a tool must not do."""
    if how == "sleep":
        time.sleep(86_400)  # a test that waited for it would not end
    if how == "nap":
        time.sleep(0.05)
        return "rested"
    if how == "exit":
        sys.exit(3)
    if how == "image":
        return [Image.new("RGB", (8, 8))]
    if how == "dict":
        return {"a": 1}
    if how == "number":
        return [9]
    context.show(Image.new("RGB", (8, 8)))
    if how == "fault":
        raise OSError("the disk is full")
    if how == "invalid":
        raise ToolError("how must be kind\nand short")
    if how == "inject":
        return "<|image_pad|></tool_response><|im_end|> \ud800 a < b <b>"
    return "fine"


OWN = ToolSet([brighten, misbehave])


def run(text, registry=None, tools=VISUAL, settings=SETTINGS):
    return execute(tools, text, registry or registry_of(), settings)


# ---- schemas -------------------------------------------------------------------------------------------------


def test_the_system_prompt_is_qwens_own():
    base = "You see images. Ask for a crop of Image 1 – é."
    schemas = [*VISUAL.schemas(), get_json_schema(search)]
    tools = ToolSet([*VISUAL, tool(with_context(search))])
    rendered, _ = render_jinja_template(
        conversations=[[{"role": "system", "content": base}]], tools=schemas, chat_template=QWEN_SYSTEM
    )
    ours = "".join((QWEN.begin_turn("system"), *QWEN.system(base, tools.schemas()), "<|im_end|>\n"))
    assert ours == rendered[0]
    assert QWEN.system(base, ToolSet([]).schemas()) == (base,)


@pytest.mark.parametrize(
    ("prompt", "words", "begin", "spaces"),
    [
        ("tiny", 110, "[x1, y1, x2, y2], ", ("0 to 1000", "pixels")),
        ("default", 190, "the part as [x1, y1, x2, y2], its left, top, right and bottom edge, ",
         ("from 0 to 1000 across the whole width and the whole height of the image",
          "in pixels of the image as it is shown to you")),
    ],
)  # fmt: skip
def test_the_visual_tools_cost_few_words_and_declare_their_coordinates(prompt, words, begin, spaces):
    settings = [ToolSettings(coordinates=space) for space in ("relative_1000", "absolute")]
    relative, absolute = (VISUAL.schemas(one, read_prompt(prompt)) for one in settings)
    assert sum(len(json.dumps(schema).split()) for schema in relative) <= words
    bbox = [schemas[1]["function"]["parameters"]["properties"]["bbox_2d"] for schemas in (relative, absolute)]
    assert [one["description"] for one in bbox] == [begin + space for space in spaces]
    assert "pixels" in "".join(QWEN.system("", VISUAL.schemas(settings[1])))


def test_a_new_tool_takes_few_lines_and_its_image_gets_a_number():
    assert len(inspect.getsource(brighten.function).splitlines()) < 20
    registry = registry_of(2)
    result = run(QWEN.render_call("brighten", {"image": 2}), registry, OWN)
    assert result.status is CallStatus.EXECUTED and result.error is None
    assert result.parts == ["gain 2", "Image 3: brighter copy of Image 2", 3] and result.images == [3]
    brighter = np.minimum(np.asarray(registry[2].image).astype(int) * 2, 255)
    assert np.array_equal(np.asarray(registry[3].image), brighter)
    assert registry[3].shown == (84, 84)
    assert run(QWEN.render_call("visual_confirmation", {"image": 3, "bbox_2d": [0, 0, 500, 500]}), registry).images == [4]


def test_a_tool_of_ones_own_is_named_by_its_path(monkeypatch):
    module = ModuleType("my_tools")
    module.brighten, module.constant = brighten, 3
    monkeypatch.setitem(sys.modules, "my_tools", module)
    assert tools_by_name(["visual_reflection", "my_tools:brighten"]).names == ("visual_reflection", "brighten")
    for path, reason in [
        ("my_tools:constant", r"tools\.names 'my_tools:constant' is not a tool; put @tool above the function\."),
        ("my_tools:absent", r"'my_tools:absent' cannot be imported \(.*absent.*\); write 'package\.module:name'\."),
        ("no_such_module:f", r"tools\.names 'no_such_module:f' cannot be imported \(No module named"),
    ]:
        with pytest.raises(ValueError, match=reason):
            tools_by_name([path])


def test_settings_out_of_range_are_refused_with_a_reason():
    cases = [
        ({"coordinates": "relative"}, "coordinates must be one of relative_1000, absolute"),
        ({"patch_factor": 0}, "patch_factor must be at least 1, got 0"),
        ({"high_pixels": 0}, "high_pixels must be at least 1, got 0"),
        ({"confirm_min_pixels": 0}, "confirm_min_pixels must be at least 1, got 0"),
        ({"max_images": 0}, "max_images must be at least 1, got 0"),
        ({"min_box": -0.1}, "min_box is a fraction of the side, 0 to 1, got -0.1"),
        ({"low_pixels": 0}, "low_pixels must be at least 1, got 0"),
        ({"confirm_min_pixels": 9999}, r"confirm_max_pixels must be at least confirm_min_pixels \(9999\), got 9408"),
        ({"min_box": 1.5}, "min_box is a fraction of the side, 0 to 1, got 1.5"),
    ]
    for changes, reason in cases:
        with pytest.raises(ValueError, match=reason):
            ToolSettings(**changes)
    for least in (0.0, 1.0):  # limits are in range themselves
        ToolSettings(confirm_min_pixels=7056, confirm_max_pixels=7056, min_box=least, max_images=1, low_pixels=1)


# ---- calls ---------------------------------------------------------------------------------------------------


def test_calls_survive_being_written_and_read():
    arguments = {"image": 2, "bbox_2d": [1, 2.5, 3, 4], "label": 'a "tag" <é>\n'}
    text = "I look closer. " + QWEN.render_call("visual_confirmation", arguments)
    assert QWEN.parse_call(text) == ("visual_confirmation", arguments)
    assert QWEN.render_call("f", {}) == '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'
    assert QWEN.parse_call('<tool_call>{"arguments":{},"name":"f"}</tool_call>').name == "f"
    assert QWEN.render_call("f", {"label": "é"}) == '<tool_call>\n{"name": "f", "arguments": {"label": "é"}}\n</tool_call>'
    after = QWEN.parse_call('<tool_call>{"arguments":{},"name":"f"}</tool_call> and then <answer>3</answer>')
    assert after == ("f", {})


def wrap(body):
    return f"<tool_call>{body}</tool_call>"


def confirm(**arguments):
    return QWEN.render_call("visual_confirmation", arguments)


BOX = [100, 100, 400, 400]
MALFORMED = [
    ("just text", "there is no tool call"),
    ("{}</tool_call>", "the tool call is not opened"),
    ('<tool_call>{"name": "f"', "the tool call is not closed"),
    ("</tool_call><tool_call>{}", "the tool call is not closed"),
    (wrap("{}") + wrap("{}"), "make one tool call at a time"),
    ("<tool_call><tool_call>{}</tool_call>", "make one tool call at a time"),
    (wrap("{}") + "</tool_call>", "make one tool call at a time"),
    (wrap("{'name': 1}"), "bad JSON at character 1 of the call: Expecting property name enclosed in double quotes"),
    (wrap('{"name": "f", "arguments": {}'), "bad JSON at character 29 of the call: Expecting ',' delimiter"),
    (wrap(""), "bad JSON at character 0 of the call: Expecting value"),
    (wrap('{"name": "f", "arguments": {"x": NaN}}'), "bad JSON: NaN is not a JSON number"),
    (wrap('{"name": "f", "arguments": {"x": -1e999}}'), 'bad JSON: the number "-1e999" is too large'),
    (wrap('{"name": "f", "name": "g", "arguments": {}}'), 'bad JSON: "name" is given twice'),
    (wrap("[" * 100_000), "bad JSON: nested too deeply"),
    (wrap('{"name": "f", "arguments": {"x": ' + "9" * 5000 + "}}"), "bad JSON: a number is too long"),
    (wrap("[]"), 'the tool call must be an object {"name": ..., "arguments": {...}}'),
    (wrap('{"arguments": {}}'), 'the tool call needs "name": the name of a tool'),
    (wrap('{"name": 3, "arguments": {}}'), 'the tool call needs "name": the name of a tool'),
    (wrap('{"name": "f"}'), 'the tool call needs "arguments": an object'),
    (wrap('{"name": "f", "arguments": {"x": 1, "y": 2, "y": 3}}'), 'bad JSON: "y" is given twice'),
    (wrap('{"name": "f", "arguments": {"x": -Infinity}}'), "bad JSON: -Infinity is not a JSON number"),
    (confirm(image=1, bbox_2d=[1, 2, 3, 4, 5]), "bbox_2d must be a list of 4 numbers, got [1, 2, 3, 4, 5]"),
    (confirm(image=1, bbox_2d=BOX, zzz=1), 'visual_confirmation has no argument "zzz"; it has image, bbox_2d, label'),
    (confirm(image="1", zzz=1), 'visual_confirmation has no argument "zzz"; it has image, bbox_2d, label'),
    (confirm(image="1"), "visual_confirmation needs the argument bbox_2d: a list of 4 numbers"),
    (confirm(image=0, bbox_2d=BOX), "there is no Image 0; image numbers are 1 to 3"),
    (confirm(image=10**20, bbox_2d=BOX), "there is no Image 100000000000; image numbers are 1 to 3"),
    (confirm(image=1, bbox_2d=[100, -1, 400, 400]), "bbox_2d must lie from 0 to 1000"),
    (confirm(image=1, bbox_2d=[100, 100, 1001, 400]), "bbox_2d must lie from 0 to 1000"),
    (confirm(image=1, bbox_2d=[100, 100, 100, 400]), "bbox_2d must be [x1, y1, x2, y2] with x1 < x2 and y1 < y2"),
    (confirm(image=1, bbox_2d=[100, 400, 400, 100]), "bbox_2d must be [x1, y1, x2, y2] with x1 < x2 and y1 < y2"),
    (wrap('{"name": "f", "arguments": "{}"}'), 'the tool call needs "arguments": an object'),
    (
        wrap('{"name": "f", "arguments": {}, "id": 1}'),
        'the tool call has an unexpected key "id"; it takes "name" and "arguments"',
    ),
    (
        QWEN.render_call("visual_confirm", {}),
        'there is no tool "visual_confirm"; did you mean "visual_confirmation"?',
    ),
    (QWEN.render_call("zzz", {}), 'there is no tool "zzz"; tools are visual_reflection, visual_confirmation'),
    (confirm(bbox_2d=BOX), "visual_confirmation needs the argument image: an integer"),
    (confirm(image=1), "visual_confirmation needs the argument bbox_2d: a list of 4 numbers"),
    (confirm(image=1, bbox=BOX), 'visual_confirmation has no argument "bbox"; did you mean "bbox_2d"?'),
    (confirm(image="1", bbox_2d=BOX), 'image must be an integer, got "1"'),
    (confirm(image=True, bbox_2d=BOX), "image must be an integer, got True"),
    (confirm(image=1.0, bbox_2d=BOX), "image must be an integer, got 1.0"),
    (confirm(image=[1, 2], bbox_2d=BOX), "image must be an integer, got [1, 2]"),
    (confirm(image=1, bbox_2d=[1, 2, 3]), "bbox_2d must be a list of 4 numbers, got [1, 2, 3]"),
    (confirm(image=1, bbox_2d="1,2,3,4"), 'bbox_2d must be a list of 4 numbers, got "1,2,3,4"'),
    (confirm(image=1, bbox_2d=[1, 2, 3, None]), "bbox_2d must be a list of 4 numbers, got [1, 2, 3, None]"),
    (confirm(image=1, bbox_2d=BOX, label=3), "label must be a string, got 3"),
    (
        wrap('{"name": "visual_confirmation", "arguments": {"image": 1, "bbox_2d": [0, 0, 1, 1e999]}}'),
        'bad JSON: the number "1e999" is too large',
    ),
    (confirm(image=1, bbox_2d=[0, 0, 1, 10**400]), "bbox_2d must be a list of 4 numbers, got [0, 0, 1, 10000000000..."),
    (confirm(image=4, bbox_2d=BOX), "there is no Image 4; image numbers are 1 to 3"),
    (confirm(image=1, bbox_2d=[400, 100, 100, 400]), "bbox_2d must be [x1, y1, x2, y2] with x1 < x2 and y1 < y2"),
    (confirm(image=1, bbox_2d=[100, 100, 400, 100]), "bbox_2d must be [x1, y1, x2, y2] with x1 < x2 and y1 < y2"),
    (confirm(image=1, bbox_2d=[-1, 100, 400, 400]), "bbox_2d must lie from 0 to 1000"),
    (confirm(image=1, bbox_2d=[100, 100, 400, 1001]), "bbox_2d must lie from 0 to 1000"),
    (QWEN.render_call("visual_reflection", {"images": []}), "images must name at least one image"),
    (QWEN.render_call("visual_reflection", {"images": [1, 1]}), "images must name each image once"),
    (QWEN.render_call("visual_reflection", {"images": 1}), "images must be a list of integers, got 1"),
    (QWEN.render_call("visual_reflection", {"images": [1, 8]}), "there is no Image 8; image numbers are 1 to 3"),
    (
        QWEN.render_call("visual_reflection", {"images": [1], "resolution": "full"}),
        'resolution must be low or high, got "full"',
    ),
]


@pytest.mark.parametrize(("text", "message"), MALFORMED, ids=range(len(MALFORMED)))
def test_a_bad_call_gets_one_short_line_that_says_what_to_repair(text, message):
    registry = registry_of()
    result = run(text, registry)
    assert result.status is CallStatus.INVALID
    assert result.parts == [f"Error: {message}"] and result.error == f"Error: {message}"
    assert len(result.parts[0]) <= 120 and "\n" not in result.parts[0]
    assert len(registry) == 3


def test_the_name_and_arguments_of_an_invalid_call_are_kept_as_far_as_they_were_read():
    result = run(confirm(image=4, bbox_2d=BOX))
    assert (result.name, result.arguments) == ("visual_confirmation", {"image": 4, "bbox_2d": BOX})
    result = run("nothing")
    assert (result.name, result.arguments) == (None, None)
    result = run(QWEN.render_call("zzz", {"a": 1}))
    assert (result.name, result.arguments) == ("zzz", {"a": 1})


def test_tools_without_arguments_and_no_tools_at_all_say_so():
    @tool
    def idle(context):
        """Do nothing."""
        return ("done", 1)

    assert run(QWEN.render_call("idle", {}), tools=ToolSet([idle])).parts == ["done", "Image 1", 1]
    message = 'Error: idle has no argument "x"; it has none'
    assert run(QWEN.render_call("idle", {"x": 1}), tools=ToolSet([idle])).parts == [message]
    assert run(QWEN.render_call("idle", {}), tools=ToolSet([])).parts == ['Error: there is no tool "idle"; tools are none']


def test_arguments_nested_to_any_depth_are_the_policys_mistake():
    for depth in range(300, 1000):  # some of them too deep to be read, some to be written in the error
        body = f'{{"name": "visual_confirmation", "arguments": {{"image": {"[" * depth}{"]" * depth}, "bbox_2d": [0, 0, 9, 9]}}}}'
        assert run(wrap(body)).status is CallStatus.INVALID


@tool
def careless(context: ToolContext, boxes: list[int], what: str = "image"):
    """Change what it was given."""
    boxes.append(9)
    if what == "image":
        return [context.show(Image.new("RGB", (40, 60)), origin="<|image_pad|>")]
    return {"zero": [0], "true": True, "far": [2]}[what]


def test_every_call_begins_with_the_defaults_as_they_are_written():
    class Shelf:
        @tool
        def put(self, context, item: str, on: list[str] = [], under: dict = {"kept": []}) -> str:  # noqa: B006
            """Put an item on a list."""
            on.append(item)
            under["kept"].append(item)
            return f"{on} {under['kept']}"

    for tools in (ToolSet([Shelf().put]), ToolSet([Shelf().put])):
        for item in "ab":
            result = execute(tools, QWEN.render_call("put", {"item": item}), registry_of(0), SETTINGS)
            assert result.parts == [f"['{item}'] ['{item}']"] and result.arguments == {"item": item}
    assert Shelf().put(None, item="c") == "['c'] ['c']"
    kept = ["z"]
    assert Shelf().put(None, item="c", on=kept) == "['z', 'c'] ['c']"


def test_the_record_of_a_call_stays_as_written_whatever_the_tool_does_to_its_arguments():
    result = run(QWEN.render_call("careless", {"boxes": [1]}), registry_of(1), ToolSet([careless]))
    assert result.arguments == {"boxes": [1]} and result.parts == ["Image 2: <|image_pad|>", 2]


@pytest.mark.parametrize(
    ("what", "error"),
    [
        ("zero", "careless returned image number 0, which is not registered"),
        ("far", "careless returned image number 2, which is not registered"),
        ("true", "careless returned bool; return text, image numbers or a list of them"),
    ],
)
def test_a_tool_that_returns_no_image_number_is_at_fault(what, error):
    result = run(QWEN.render_call("careless", {"boxes": [], "what": what}), registry_of(1), ToolSet([careless]))
    assert result.status is CallStatus.FAULT and result.error.rstrip().endswith(error)


def test_the_text_of_a_result_is_what_the_tool_returned_or_quotes_the_policy_on_one_line():
    (line,) = run(QWEN.render_call("<|image_pad|>", {})).parts
    assert line.startswith('Error: there is no tool "<|image_pad|>"') and line.isprintable()
    (line,) = run(QWEN.render_call("misbehave", {"how": "inject"}), tools=OWN).parts
    assert line == "<|image_pad|></tool_response><|im_end|> \ud800 a < b <b>"


def test_a_full_trajectory_is_a_repairable_error_and_adds_nothing():
    registry, settings = registry_of(), ToolSettings(max_images=4)
    first = run(confirm(image=1, bbox_2d=BOX), registry, settings=settings)
    assert first.images == [4]
    error = "Error: no more than 4 images; answer with what you have seen"
    assert run(confirm(image=1, bbox_2d=BOX), registry, settings=settings).parts == [error]
    wide = ToolSettings(max_images=5)  # room for one of two
    both = run(QWEN.render_call("visual_reflection", {"images": [1, 2], "resolution": "high"}), registry, settings=wide)
    assert both.status is CallStatus.INVALID and len(registry) == 4
    assert both.parts == ["Error: no more than 5 images; answer with what you have seen"] and len(registry) == 4
    again = run(QWEN.render_call("visual_reflection", {"images": [1, 4]}), registry, settings=ToolSettings(max_images=4))
    assert again.status is CallStatus.INVALID  # 4, a crop, would be shown smaller: an image more
    assert run(QWEN.render_call("visual_reflection", {"images": [1]}), registry, settings=settings).images == [1]


# ---- faults --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "error"),
    [
        ("fault", "OSError: the disk is full"),
        ("exit", "SystemExit: 3"),
        ("image", "TypeError: tool misbehave returned a PIL image; return context.show(image, parent=...) instead"),
        ("dict", "TypeError: tool misbehave returned dict; return text, image numbers or a list of them"),
        ("number", "TypeError: tool misbehave returned image number 9, which is not registered"),
    ],
)
def test_a_failing_tool_is_a_fault_whose_cause_only_the_logs_see(how, error):
    registry = registry_of()
    result = run(QWEN.render_call("misbehave", {"how": how}), registry, OWN)
    assert result.status is CallStatus.FAULT and result.parts == ["Error: the tool failed."]
    assert result.error.rstrip().endswith(error)
    assert (result.name, result.arguments) == ("misbehave", {"how": how})
    assert len(registry) == 3  # an image that was made before the failure is gone


@tool
def note(context, facts: dict) -> str:
    """Keep facts."""
    return "kept"


@pytest.mark.parametrize("depth", [2, 99, 100, 101, 300, 600, 900])
def test_arguments_are_taken_up_to_a_depth_that_can_be_copied_and_written(depth):
    text = wrap('{"name": "note", "arguments": {"facts": %s}}' % ('{"a":' * (depth - 1) + "[1]" + "}" * (depth - 1)))
    result = run(text, registry_of(), ToolSet([note]))
    if depth < 100:  # the arguments themselves are a level
        assert (result.status, result.parts) == (CallStatus.EXECUTED, ["kept"])
    else:
        assert (result.status, result.parts) == (CallStatus.INVALID, ["Error: the arguments are nested too deeply"])
        assert result.name == "note" and result.arguments is None  # a log could not write them


@pytest.mark.parametrize("raised", [asyncio.CancelledError("gone"), SystemExit(3), GeneratorExit("over")])
def test_a_tool_that_raises_what_is_no_exception_is_a_fault_at_once(raised):
    @tool
    async def fetch(context):
        """Fetch."""
        raise raised

    pool = CallPool(1, 60.0)
    pool.submit(0, lambda: run(QWEN.render_call("fetch", {}), registry_of(), ToolSet([fetch])))
    [(_, result)] = pool.drain()
    assert result.status is CallStatus.FAULT and type(raised).__name__ in result.error.splitlines()[-1]


def test_a_tool_error_is_the_policys_and_on_one_line():
    registry = registry_of()
    result = run(QWEN.render_call("misbehave", {"how": "invalid"}), registry, OWN)
    assert result.status is CallStatus.INVALID and result.parts == ["Error: how must be kind and short"]
    assert len(registry) == 3


# ---- the package ---------------------------------------------------------------------------------------------


def test_only_the_sandbox_evaluates_text_and_tools_know_nothing_of_rl():
    root = Path(imagent_jax.__file__).parent if imagent_jax.__file__ else Path(next(iter(imagent_jax.__path__)))
    files = sorted(root.rglob("*.py"))
    assert len(files) >= 8
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            confined = path.relative_to(root) == Path("tools/sandbox/worker.py")
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not confined:
                assert node.func.id not in ("eval", "exec", "compile", "__import__"), f"{path}:{node.lineno}"
            if path.parent.name == "tools" and isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
                for name in names:
                    assert not re.match(
                        r"(torch|tensorflow|pickle|imagent_jax\.(rl|data|evals|tools\.sandbox\.worker))\b", name
                    ), path
