"""Prompts: texts of the system turn and of tools, shipped and of one's own, and the command that prints them."""

import json

import pytest
from conftest import small_config

from imagent_jax.chat.prompts import SHIPPED, read_prompt
from imagent_jax.config import Config
from imagent_jax.rollout import show_prompt
from imagent_jax.tools import ToolSettings, tool, tools_by_name

TOOLS = tools_by_name(("visual_reflection", "visual_confirmation"))
CROP = (
    '{"type": "function", "function": {"name": "visual_confirmation", "description": "Crop and enlarge.", "parameters": {"type": '
    '"object", "properties": {"image": {"type": "integer", "description": "image number"}, "bbox_2d": {"type": "array", "items": '
    '{"type": "number"}, "minItems": 4, "maxItems": 4, "description": "[x1, y1, x2, y2], 0 to 1000"}, '
    '"label": {"type": "string"}}, "required": ["image", "bbox_2d"]}}}'
)
"""As the tiny base read it in its training."""


@tool
def weigh(context, image: int) -> str:
    """Weigh an image.

    Args:
        image: which one
    """


def described(schemas, name: str) -> dict:
    return next(schema["function"] for schema in schemas if schema["function"]["name"] == name)


def test_the_tiny_base_reads_what_it_was_trained_with():
    prompt = read_prompt("tiny")
    assert prompt.text(True) == prompt.text(False) == "Answer with <answer>...</answer>."
    assert json.dumps(TOOLS.schemas(prompt=prompt)[1]) == CROP
    assert small_config().tools.prompt == "tiny" and Config().tools.prompt == "default"


def test_a_real_model_reads_how_to_answer_and_of_tools_where_it_has_some():
    prompt = read_prompt("default")
    assert "<answer> and </answer>" in prompt.text(False) and "call" not in prompt.text(False)
    assert prompt.text(True).startswith(prompt.text(False)) and "call tools" in prompt.text(True)
    for coordinates, words in (("relative_1000", "from 0 to 1000 across"), ("absolute", "in pixels of the image as it is shown")):
        schemas = TOOLS.schemas(ToolSettings(coordinates=coordinates), prompt)
        arguments = [a for s in schemas for a in s["function"]["parameters"]["properties"].values()]
        assert all(argument["description"] for argument in arguments) and "{" not in "".join(a["description"] for a in arguments)
        assert words in described(schemas, "visual_confirmation")["parameters"]["properties"]["bbox_2d"]["description"]


def test_a_file_of_ones_own_replaces_texts_and_leaves_other_tools_alone(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(
        "system: |\n  Be brief.\ntools:\n  visual_reflection:\n    description: Look again.\n    arguments: {images: which}\n"
    )
    schemas = tools_by_name(("visual_reflection", "visual_confirmation")).schemas(prompt=read_prompt(str(file)))
    again = described(schemas, "visual_reflection")
    assert again["description"] == "Look again." and again["parameters"]["properties"]["images"]["description"] == "which"
    assert "description" not in again["parameters"]["properties"]["resolution"]
    assert described(schemas, "visual_confirmation") == described(TOOLS.schemas(), "visual_confirmation")
    assert read_prompt(str(file)).text(True) == "Be brief." and read_prompt(str(file)).described(weigh.schema) == weigh.schema


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (None, "There is no prompt .*; name a YAML file, or one of default, tiny"),
        ("system: [", "is not YAML"),
        ("Be brief.", "needs a text `system`"),
        ("system: 3", "needs a text `system`"),
        ("system: a\nsytem: b", "needs a text `system`"),
        ("system: a\nwith_tools: [b]", "`with_tools` is a text"),
        ("system: a\ntools: [b]", "`tools` maps names"),
        ("system: a\ntools: {f: b}", "f needs a text `description`"),
        ("system: a\ntools: {f: {arguments: {x: y}}}", "f needs a text `description`"),
        ("system: a\ntools: {f: {description: d, arguments: [x]}}", "f needs a text `description`"),
    ],
)
def test_what_is_no_prompt_is_one_sentence(tmp_path, text, sentence):
    file = tmp_path / "mine.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ValueError, match=sentence) as error:
        read_prompt(str(file))
    assert "\n" not in str(error.value)


def test_the_command_prints_what_a_rollout_begins_with(capsys, parts):
    assert set(SHIPPED) == {"default", "tiny"}
    assert show_prompt.main(["--task", "3", "--split", "test"]) == 0
    out = capsys.readouterr().out
    text, _, count = out.rpartition("\n\n")
    task = parts.test_tasks(4)[3]
    opened = parts.collector.open_task(task)
    assert count.strip() == f"{task.uid}: {len(opened.prompt.ids)} of 112 tokens (rollout.prompt_tokens)."
    shown = parts.processor.decode(opened.prompt.ids)
    for image in opened.prompt.images:
        tokens = image.grid[0] * image.grid[1] // 4
        line = f"[an image of {image.size[1]} x {image.size[0]} pixels: {tokens} tokens]"
        shown = shown.replace(f"<|vision_start|>{tokens * '<|image_pad|>'}<|vision_end|>", line, 1)
    assert text.rstrip("\n") == shown.rstrip("\n")
    assert show_prompt.main(["--task", "99999999"]) == 2
    assert "There is no task 99999999; the split train has tasks 0 to" in capsys.readouterr().err
