"""Rollouts of a group share pixels and a task: what a tool, an environment or a reward does to them stays its own."""

import copy
import dataclasses

import numpy as np
import pytest
from conftest import tiny_config
from PIL import Image, ImageDraw
from scripted_run import ANSWER, crop, play, scripted_collector

from imagent_jax.chat import Call
from imagent_jax.config import ImagesConfig
from imagent_jax.rollout.environment import ToolEnvironment
from imagent_jax.tiny.world import task_at
from imagent_jax.tools import ToolContext, ToolSet, ToolSettings, tool
from imagent_jax.types import CallStatus, Task

CANVAS = Image.new("RGB", (60, 60))
WAYS = {
    "rectangle": lambda image: ImageDraw.Draw(image).rectangle((0, 0, 50, 50), fill=(255, 0, 0)),
    "putpixel": lambda image: image.putpixel((0, 0), (1, 2, 3)),
    "paste": lambda image: image.paste((9, 9, 9), (0, 0, 20, 20)),
    "pixel access": lambda image: image.load().__setitem__((5, 5), (7, 7, 7)),
    "frombytes": lambda image: image.frombytes(bytes(3 * image.width * image.height)),
    "thumbnail": lambda image: image.thumbnail((10, 10)),
}


@tool
def draw(context: ToolContext, how: str) -> list[int]:
    """Draw on an image.

    Args:
        how: way to draw
    """
    image = context.registry[1].image
    WAYS[how](image)
    return [context.show(image, parent=1, origin="drawing")]


@tool
def sketch(context: ToolContext, grey: int) -> list[int]:
    """Show a canvas that all calls share, painted anew.

    Args:
        grey: 0 to 255
    """
    CANVAS.paste((grey,) * 3, (0, 0, 60, 60))
    return [context.show(CANVAS)]


@pytest.fixture(scope="module")
def task():
    return dataclasses.replace(task_at(3, "train", 0), meta={"boxes": [1, 2]})


def environment_of(task, kind=ToolEnvironment):
    environment = kind(ToolSet([draw, sketch]), ToolSettings(), ImagesConfig())
    environment.reset(task)
    return environment


@pytest.mark.parametrize("how", WAYS)
def test_a_drawing_on_an_image_changes_no_image_of_the_group(task, how):
    opened = environment_of(task)
    before = [entry.pixels.tobytes() for entry in opened.images]
    one, other = opened.fork(), opened.fork()
    result = one.step(Call("draw", {"how": how}))
    assert result.status is CallStatus.EXECUTED
    made = one.images[-1]
    assert made.describe().endswith("drawing of Image 1") and made.pixels.tobytes() != before[0]
    for environment in (opened, one, other):
        assert [entry.pixels.tobytes() for entry in environment.images][: len(before)] == before


def test_what_a_tool_has_shown_does_not_change_with_the_tools_own_image(task):
    opened = environment_of(task)
    one, other = opened.fork(), opened.fork()
    one.step(Call("sketch", {"grey": 10}))
    other.step(Call("sketch", {"grey": 200}))
    assert [e.images[-1].pixels.getpixel((0, 0)) for e in (one, other)] == [(10,) * 3, (200,) * 3]


def test_forks_of_an_environment_have_their_own_state(task):
    class Counting(ToolEnvironment):
        def reset(self, task):
            super().reset(task)
            self.counts, self.seen, self.grid = {"steps": [0]}, [], np.zeros(3)
            self.names, self.shared = {1}, (object(),)

        def step(self, call):
            self.counts["steps"][0] += 1
            self.seen.append(call)
            self.names.add(2)
            self.grid += 1
            return super().step(call)

    opened = environment_of(task, Counting)
    one, other = opened.fork(), opened.fork()
    one.step(Call("sketch", {"grey": 1}))
    for environment, steps in ((one, 1), (other, 0), (opened, 0)):
        assert environment.counts == {"steps": [steps]} and len(environment.seen) == steps
        assert environment.grid.tolist() == [steps] * 3 and len(environment.names) == 1 + steps
        assert environment.shared is opened.shared and environment.tools is opened.tools


def test_rewards_of_a_group_have_their_own_task_and_read_only_arrays(task):
    collector = scripted_collector(tiny_config({"rollout": {"prompt_tokens": 512, "response_tokens": 1024}}))
    one, other = (play(collector, task, i, [crop(1, 0, 0, 500, 500), ANSWER.format("7")]) for i in range(2))
    ids = one.ids.tolist()
    one.task.meta["boxes"].append(3)
    one.task.meta["used"] = True
    assert other.task.meta == task.meta == {"boxes": [1, 2]}
    for name in ("ids", "logprobs", "kind", "positions", "vision"):
        with pytest.raises(ValueError, match="read-only"):
            getattr(one, name)[..., 0] = 0
    assert one.ids.tolist() == ids
    ImageDraw.Draw(one.images[0].image).rectangle((0, 0, 50, 50), fill=(255, 0, 0))
    assert one.images[0].pixels.tobytes() == other.images[0].pixels.tobytes()


def test_a_task_has_its_own_facts():
    facts = {"boxes": [1]}
    made = Task("a", "?", (), "1", meta=facts)
    again = dataclasses.replace(made, answer="2")
    again.meta["boxes"].append(2)
    facts["boxes"].append(3)
    assert made.meta == {"boxes": [1]} and copy.copy(made) == made
