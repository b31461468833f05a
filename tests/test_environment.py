"""Worlds of a user's own: the drawer of the documentation, played by a script, and environments that fail."""

import dataclasses
import re
import sys
import types
from pathlib import Path

import pytest
from conftest import small_config
from PIL import Image
from scripted_run import ANSWER, play, scripted_collector

from imagent_jax import ToolEnvironment, tool
from imagent_jax.chat import QWEN, Call
from imagent_jax.rl.judge import judge
from imagent_jax.rl.rewards import reward_functions, score_trajectories
from imagent_jax.types import CallStatus, EndReason, Task

PAGE = (Path(__file__).parent.parent / "docs" / "tools.md").read_text()
TAKE = QWEN.render_call("take", {})
ROOM = {"rollout": {"prompt_tokens": 1024, "response_tokens": 600}}


@pytest.fixture
def drawer(monkeypatch):
    """The module of the documentation."""
    [code] = re.findall(r"```python\n(# drawer\.py\n.*?)```", PAGE, re.DOTALL)
    module = types.ModuleType("drawer")
    monkeypatch.setitem(sys.modules, "drawer", module)
    exec(compile(code, "docs/tools.md", "exec"), module.__dict__)
    return module


@pytest.fixture
def task(tmp_path):
    files = []
    for colour in ("red", "lime", "blue"):
        Image.new("RGB", (56, 56), colour).save(tmp_path / f"{colour}.png")
        files.append(str(tmp_path / f"{colour}.png"))
    return Task("drawer-1", "Which colour has the second photograph?", (), "lime", meta={"drawer": files})


def collector_of(**tools):
    return scripted_collector(small_config(**ROOM, tools={"max_turns": 5, "max_repeats": 5} | tools))


def test_the_drawer_opens_image_by_image_for_each_rollout_alone(drawer, task):
    collector = collector_of(environment="drawer:Drawer")
    assert collector.names == ("visual_reflection", "visual_confirmation", "broken", "take")
    assert "Take the next photograph out of the drawer" in "".join(collector.system())
    crop = QWEN.render_call("visual_confirmation", {"image": 2, "bbox_2d": [0, 0, 500, 500]})
    t = play(collector, task, 0, [TAKE, TAKE, crop, TAKE, TAKE, ANSWER.format("lime")])
    assert [image.describe() for image in t.images] == [
        "Image 1: photograph", "Image 2: photograph", "Image 3: crop of Image 2", "Image 4: photograph",
    ]  # fmt: skip
    assert [image.pixels.getpixel((5, 5)) for image in t.images] == [(255, 0, 0), (0, 255, 0), (0, 255, 0), (0, 0, 255)]
    last = t.turns[-2].call
    assert (last.status, last.error) == (CallStatus.INVALID, "Error: the drawer is empty") and t.end == EndReason.ANSWERED
    opened = collector.open_task(task).environment
    one, other = opened.fork(1), opened.fork(2)
    for world, count in ((one, 2), (other, 1)):
        for _ in range(count):
            assert world.step(Call("take", {})).status == CallStatus.EXECUTED
    assert (len(one.closed), len(other.closed), len(opened.closed), len(task.meta["drawer"])) == (1, 2, 3, 3)
    assert [e.pixels.getpixel((0, 0)) for e in other.images] == [(255, 0, 0)]


def test_what_an_environment_pays_is_a_part_of_the_reward_with_its_weight(drawer, task):
    collector = collector_of(environment="drawer:Drawer")
    t = play(collector, task, 0, [TAKE, TAKE, ANSWER.format("lime")])
    plain = play(collector_of(), dataclasses.replace(task, uid="plain"), 0, [ANSWER.format("lime")])
    functions = reward_functions(small_config(reward={"tool_gain": 0.0, "environment": 2.0}).reward)
    paid, unpaid = score_trajectories([t, plain], functions)
    assert paid["environment"] == pytest.approx(-0.1) and paid["total"] == pytest.approx(1 + 0.1 - 0.2)
    assert "environment" not in unpaid and unpaid["total"] == pytest.approx(1.1)


def test_a_row_may_name_its_world_and_others_keep_the_runs(drawer, task):
    collector = collector_of()
    own = dataclasses.replace(task, environment="drawer:Drawer", tools=())
    t = play(collector, own, 0, [TAKE, QWEN.render_call("visual_reflection", {"images": [1]}), ANSWER.format("lime")])
    assert [turn.call.status for turn in t.turns[:2]] == [CallStatus.EXECUTED, CallStatus.INVALID]
    other = play(collector, task, 0, [TAKE, ANSWER.format("lime")])
    assert other.turns[0].call.error.startswith('Error: there is no tool "take"')
    prompts = [collector.processor.decode(collector.open_task(each).prompt.ids) for each in (own, task)]
    assert ["photograph out" in prompt for prompt in prompts] == [True, False]


class Clumsy(ToolEnvironment):
    """Fails where its `at` says."""

    at = ""

    def _fail(self, place):
        if place == self.at:
            raise OSError(f"the {place} is stuck")

    def step(self, call):
        self._fail("step")
        return super().step(call)

    def view(self, entry, observed):
        self._fail("view" if observed else "")
        return super().view(entry, observed)

    def close(self):
        super().close()
        self._fail("close")

    def reward(self, trajectory):
        self._fail("reward")
        return None


@pytest.mark.slow(30)
@pytest.mark.parametrize("at", ["step", "view", "close", "reward"])
def test_whatever_a_world_raises_is_a_fault_of_its_trajectory(parts, config, tasks, monkeypatch, at):
    """By the engine itself, with the shipped base, which looks at its images again."""
    monkeypatch.setattr(Clumsy, "at", at)
    monkeypatch.setitem(sys.modules, "clumsy", types.SimpleNamespace(World=Clumsy))
    collector = type(parts.collector)(
        parts.model, parts.processor, parts.tools,
        dataclasses.replace(config, tools=dataclasses.replace(config.tools, environment="clumsy:World")),
    )  # fmt: skip
    batch = collector.collect(parts.params, tasks[:2], group_size=2, seed=11)
    flat = [t for group in batch.trajectories for t in group]
    failed = [t for t in flat if t.end == EndReason.FAULT]
    if at in ("close", "reward"):
        assert len(failed) == len(flat) and all(f"the {at} is stuck" in t.error for t in flat)
        with pytest.raises(ValueError, match=f"the {at} is stuck"):
            judge(config, batch, reward_functions(config.reward))
    else:
        called = [t for t in flat if t.turns[0].call]
        assert called and failed == called and all(f"the {at} is stuck" in t.error for t in failed)


def test_a_world_that_cannot_be_is_refused_in_one_sentence(drawer, monkeypatch):
    for path, sentence in (
        (
            "drawer:Path",
            "tools.environment 'drawer:Path' is no environment; name a subclass of rollout.environment.",
        ),
        ("drawer:Drawers", "tools.environment 'drawer:Drawers' cannot be imported"),
    ):
        with pytest.raises(ValueError, match=re.escape(sentence)):
            collector_of(environment=path)

    class Twice(ToolEnvironment):
        @tool
        def visual_reflection(self, context) -> str:
            """Another tool of the name of one of the run's."""
            return ""

    drawer.Twice = Twice
    with pytest.raises(ValueError, match="two tools are called visual_reflection"):
        collector_of(environment="drawer:Twice")
