"""The visual tools under settings other than the defaults."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from test_tools import confirm, registry_of, run

from imagent_jax.chat import QWEN
from imagent_jax.rollout.collect import tool_settings
from imagent_jax.tools import (
    ImageRegistry,
    ToolContext,
    ToolSettings,
    tools_by_name,
)


def test_every_setting_of_the_configuration_reaches_the_tools(config):
    """tool_settings names each by its own name; the geometry is the model's."""
    values = {
        "coordinates": "absolute", "low_pixels": 3136, "high_pixels": 6272, "confirm_min_pixels": 4704,
        "confirm_max_pixels": 14112, "min_box": 0.25, "max_images": 7,
    }  # fmt: skip
    changed = replace(config, tools=replace(config.tools, **values), images=replace(config.images, vision_block=80))
    settings = tool_settings(changed, SimpleNamespace(patch_size=16, merge_size=3))
    assert settings == ToolSettings(**values, patch_factor=48, most_pixels=80 * 16 * 16)


@pytest.mark.parametrize(
    ("changes", "box", "shown", "budget"),
    [  # of an image of 280 x 280 pixels, box [400, 400, 600, 600]: 56 pixels a side
        ({}, (112, 112, 168, 168), (84, 84), (7056, 9408)),
        ({"min_box": 0.5}, (70, 70, 210, 210), (84, 84), (7056, 9408)),
        ({"min_box": 1.0}, (0, 0, 280, 280), (84, 84), (7056, 9408)),
        ({"confirm_min_pixels": 3136, "confirm_max_pixels": 4704}, (112, 112, 168, 168), (56, 56), (3136, 4704)),
        ({"confirm_min_pixels": 12544, "confirm_max_pixels": 20000}, (112, 112, 168, 168), (112, 112), (12544, 20000)),
        ({"patch_factor": 32}, (112, 112, 168, 168), (96, 96), (7056, 9408)),
        ({"confirm_min_pixels": 20000, "confirm_max_pixels": 20000, "most_pixels": 12544}, (112, 112, 168, 168), (112, 112),
         (11723, 11723)),
    ],
)  # fmt: skip
def test_a_crop_is_cut_and_shown_as_the_settings_say(changes, box, shown, budget):
    registry = registry_of(2)
    result = run(confirm(image=2, bbox_2d=[400, 400, 600, 600]), registry, settings=ToolSettings(**changes))
    entry = registry[3]
    assert result.parts == ["Image 3: crop of Image 2", 3]
    assert (entry.box, entry.shown, (entry.min_pixels, entry.max_pixels)) == (box, shown, budget)
    assert np.array_equal(np.asarray(entry.image), np.asarray(registry[2].image.crop(box)))


@pytest.mark.parametrize(
    ("changes", "resolution", "line", "shown", "budget"),
    [  # an image of 280 x 280 pixels, shown at 56 x 56
        ({}, None, "Image 1", (56, 56), (3136, 4704)),
        ({"low_pixels": 12544}, None, "Image 2: larger view of Image 1", (112, 112), (3136, 12544)),
        ({"low_pixels": 12544}, "low", "Image 2: larger view of Image 1", (112, 112), (3136, 12544)),
        ({"low_pixels": 1000}, "low", "Image 2: smaller view of Image 1", (28, 28), (1000, 1000)),
        ({"low_pixels": 12544}, "high", "Image 2: larger view of Image 1", (84, 84), (3136, 7056)),
        ({"high_pixels": 20000}, "high", "Image 2: larger view of Image 1", (140, 140), (3136, 20000)),
        ({"high_pixels": 20000, "most_pixels": 7056}, "high", "Image 2: larger view of Image 1", (84, 84), (3136, 11723)),
    ],
)
def test_an_image_is_shown_again_as_the_settings_say(changes, resolution, line, shown, budget):
    registry = registry_of(1)
    arguments = {"images": [1]} | ({"resolution": resolution} if resolution else {})
    result = run(QWEN.render_call("visual_reflection", arguments), registry, settings=ToolSettings(**changes))
    assert result.parts == [line, len(registry)]
    entry = registry[len(registry)]
    assert (entry.shown, (entry.min_pixels, entry.max_pixels)) == (shown, budget)
    assert entry.source is registry[1].source and entry.box is None


def test_an_image_without_a_budget_of_its_own_is_not_enlarged_to_be_seen_again():
    registry = ImageRegistry()
    registry.add(Image.new("RGB", (64, 64)), shown=(64, 64))
    run(QWEN.render_call("visual_reflection", {"images": [1]}), registry, settings=ToolSettings(patch_factor=32, low_pixels=1500))
    assert registry[2].shown == (32, 32) and (registry[2].min_pixels, registry[2].max_pixels) == (1024, 1500)


def test_what_a_tool_shows_has_the_budget_and_the_words_that_the_tool_gives():
    registry = registry_of(1)
    context, image = ToolContext(registry, ToolSettings(confirm_min_pixels=12544, confirm_max_pixels=12600)), registry[1].image
    small = context.show(image, min_pixels=784, max_pixels=3136)
    assert (registry[small].shown, registry[small].min_pixels, registry[small].max_pixels) == ((56, 56), 784, 3136)
    assert registry[small].describe() == "Image 2" and registry[small].parent is None
    assert registry[context.show(image)].shown == (112, 112)  # the settings' budget
    assert registry[context.show(image, parent=2)].describe() == "Image 4: made of Image 2"
    piece = context.show(image.crop((0, 0, 140, 70)), parent=1, box=(0, 0, 140, 70), origin="strip")
    assert registry[piece].describe() == "Image 5: strip of Image 1" and registry[piece].box == (0, 0, 140, 70)
    assert registry[piece].shown == (84, 168)  # 70 x 140 pixels, enlarged


def test_a_sliver_that_cannot_be_shown_is_a_repairable_error():
    result = run(confirm(image=1, bbox_2d=[0, 0, 1000, 1]), settings=ToolSettings(min_box=0.0))
    assert result.parts == ["Error: a piece of 280 x 1 pixels is too narrow to show"]


@pytest.mark.parametrize("coordinates", ["relative_1000", "absolute"])
def test_the_zoom_tool_of_other_models_is_a_close_look_with_images_from_0_and_relative_boxes(coordinates):
    """Qwen-Agent's name and arguments, whatever the space of visual_confirmation's boxes."""
    zoom, settings = tools_by_name(("image_zoom_in_tool",)), ToolSettings(coordinates=coordinates)
    (schema,) = zoom.schemas(settings)
    assert schema["function"]["parameters"]["required"] == ["bbox_2d", "label", "img_idx"]

    def call(**arguments):
        registry = registry_of(2)
        return run(QWEN.render_call("image_zoom_in_tool", arguments), registry, zoom, settings), registry

    result, registry = call(bbox_2d=[400, 400, 600, 600], label="tag", img_idx=1)
    assert result.parts == ["Image 3: crop of Image 2", 3] and registry[3].box == (112, 112, 168, 168)
    assert call(bbox_2d=[0, 0, 500, 500], label="tag", img_idx=0)[1][3].parent == 1
    for wrong in (-1, 2):
        assert call(bbox_2d=[0, 0, 500, 500], label="tag", img_idx=wrong)[0].error == "Error: img_idx must be from 0 to 1"
    none = QWEN.render_call("image_zoom_in_tool", {"bbox_2d": [0, 0, 500, 500], "label": "tag", "img_idx": 0})
    assert zoom.execute(QWEN.parse(none), ImageRegistry(), settings).error == "Error: there are no images"
