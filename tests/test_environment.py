"""Worlds of a user's own: the drawer of the documentation, played by a script, and environments that fail."""

import dataclasses
import re
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
from conftest import small_config
from PIL import Image
from scripted_run import ANSWER, play, scripted_collector

from imagent_jax import ToolEnvironment, tool
from imagent_jax.chat import QWEN, Call
from imagent_jax.rl.judge import judge
from imagent_jax.rl.rewards import reward_functions, score_trajectories
from imagent_jax.rollout import collect
from imagent_jax.rollout.pending import PendingCalls
from imagent_jax.rollout.show_prompt import written
from imagent_jax.types import CallStatus, EndReason, Markup, Task

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
    """Fails where its `at` says; where it is `slow`, after a minute."""

    at, slow = "", False

    def _fail(self, place):
        if place == self.at:
            if self.slow:
                time.sleep(60)
            raise OSError(f"the {place} is stuck")

    def reset(self, task):
        super().reset(task)
        self._fail("reset")

    def fork(self, seed=0):
        self._fail("fork")
        return super().fork(seed)

    def step(self, call):
        self._fail("step")
        return super().step(call)

    def view(self, entry, observed):
        self._fail("view" if observed else "given")
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


class Choosy(Clumsy):
    """Fails where its `at` says, for one of the tasks."""

    def reset(self, task):
        self.task = task
        super().reset(task)

    def _fail(self, place):
        if self.task.meta.get("stuck"):
            super()._fail(place)


@pytest.mark.parametrize("at", ["reset", "given", "fork"])
def test_a_world_that_fails_before_the_first_turn_leaves_the_other_tasks_alone(task, monkeypatch, at):
    """The engine is replaced by one in which every rollout answers at once."""
    monkeypatch.setattr(Clumsy, "at", at)
    collector = scripted_collector(small_config(**ROOM), environment=Choosy)
    said = np.asarray(collector.processor.encode(Markup(ANSWER.format("lime"))), np.int32)
    task = dataclasses.replace(task, images=(Path(task.meta["drawer"][0]).read_bytes(),))
    tasks = [task, dataclasses.replace(task, uid="stuck", meta={"stuck": True})]
    run = collect._Run(collector, Answering(said), (collect.draws(tasks), ()), None, (2, 0, 1.0))
    assert len(list(run.turns())) == 4
    good, failed = (run.done[index].trajectories for index in (0, 1))
    assert [t.end for t in good] == [EndReason.ANSWERED] * 2 and [t.answer for t in good] == ["lime"] * 2
    for t in failed:
        assert (t.end, t.answer, len(t.turns)) == (EndReason.FAULT, None, 1)
        assert t.error.strip().splitlines()[-1] == f"OSError: the {at} is stuck"
    spoilt = dataclasses.replace(tasks[1], images=(b"none",))
    with pytest.raises(ValueError, match="Task stuck: Image 1 cannot be used"):
        collector.open_task(spoilt)


class Broken(Clumsy):
    """Fails from its constructor on, and steps without a result."""

    def __init__(self, *args):
        self._fail("constructor")
        super().__init__(*args)

    @property
    def tools(self):
        self._fail("tools")
        return super().tools

    @property
    def images(self):
        self._fail("last images" if self._closed else "images")
        return super().images

    def step(self, call):
        return None if self.at == "step" else super().step(call)

    def view(self, entry, observed):
        self._fail("view")
        return super().view(entry, observed)


@pytest.fixture
def broken(monkeypatch):
    monkeypatch.setitem(sys.modules, "broken_world", types.SimpleNamespace(World=Broken))

    def at(place, slow):
        monkeypatch.setattr(Broken, "at", place)
        monkeypatch.setattr(Broken, "slow", slow)
        return "TimeoutError: longer than 0.5 s; raise tools.timeout_s" if slow else f"OSError: the {place} is stuck"

    return at


def with_image(task):
    return dataclasses.replace(task, images=(Path(task.meta["drawer"][0]).read_bytes(),))


@pytest.mark.parametrize("slow", [False, True])
@pytest.mark.parametrize("at", ["constructor", "tools", "reset", "view", "images", "fork", "close", "last images", "reward"])
def test_a_world_that_fails_or_hangs_anywhere_is_a_fault_of_its_own_trajectories(task, broken, at, slow):
    """The engine is replaced by one in which every rollout answers at once."""
    words = broken(at, slow)
    collector = collector_of(timeout_s=0.5 if slow else 20.0)
    said = np.asarray(collector.processor.encode(Markup(ANSWER.format("lime"))), np.int32)
    tasks = [with_image(task), dataclasses.replace(with_image(task), uid="stuck", environment="broken_world:World")]
    run = collect._Run(collector, Answering(said), (collect.draws(tasks), ()), None, (2, 0, 1.0))
    began = time.monotonic()
    assert len(list(run.turns())) == 4
    good, failed = (run.done[index].trajectories for index in (0, 1))
    assert [(t.end, t.answer, len(t.images)) for t in good] == [(EndReason.ANSWERED, "lime", 1)] * 2
    for t in failed:
        assert (t.end, len(t.turns), len(t.images)) == (EndReason.FAULT, 1, 1)
        assert t.error.startswith("Traceback") and words in t.error
    assert time.monotonic() - began < 30  # a hung one is not waited for


@pytest.mark.parametrize(("at", "slow"), [("tools", False), ("images", False), ("view", False), ("step", False), ("view", True)])
def test_a_world_that_fails_or_hangs_in_a_call_is_a_fault_of_its_trajectory(task, broken, at, slow):
    broken("", False)
    collector = collector_of(timeout_s=0.5 if slow else 20.0)
    world = Broken(collector.tools, collector.settings, collector.cfg.images)
    world.reset(with_image(task))
    words = broken(at, slow)
    pending = PendingCalls(collector.rules, collector.cfg.tools)
    pending.submit(0, types.SimpleNamespace(environment=world), Call("visual_reflection", {"images": [1]}))
    while 0 not in pending.results:
        pending._poll(0.1)
    result, images = pending.results[0]
    assert result.status == CallStatus.FAULT and not images
    assert result.error.startswith("Traceback") and (words in result.error or at == "step")


class Answering:
    """An engine of two slots of two rows, in which every turn is `said`."""

    class clock:
        lap = staticmethod(lambda name: None)

    def __init__(self, said):
        self.said, self.waiting, self.rows, self.quarter = said, [], [], 1
        self.live = np.zeros(4, bool)

    hungry = property(lambda self: len(self.waiting) + len(self.rows) // 2 < 2)
    has_room = property(lambda self: not self.rows)

    def submit(self, request):
        self.waiting.append(request)

    def admit(self):
        found = [(request.key, range(2 * i, 2 * i + 2), np.zeros(1, np.int32)) for i, request in enumerate(self.waiting)]
        self.rows, self.waiting = [*range(2 * len(found))], []
        return found

    def fitting(self, rows):
        return list(rows)

    def step(self):
        rows, self.rows = self.rows, []
        return dict.fromkeys(rows, self.said)

    def release(self, slots):
        buffer = np.zeros(600, np.int32)
        buffer[: len(self.said)] = self.said
        return {slot: ([buffer] * 2, [buffer * -0.5] * 2) for slot in slots}


def test_the_command_that_shows_a_prompt_says_what_its_world_raised(task, monkeypatch):
    monkeypatch.setattr(Clumsy, "at", "reset")
    with pytest.raises(ValueError, match=r"^Task drawer-1: its environment failed \(OSError: the reset is stuck\)\.$"):
        written(scripted_collector(small_config(**ROOM), environment=Clumsy), task)


class Rooms(ToolEnvironment):
    def reset(self, task):
        super().reset(task)
        self.rooms = [{"seen": 0}, {"seen": 0}]
        self.here = self.rooms[1]


def test_what_two_attributes_share_their_copies_share(task):
    base = scripted_collector(small_config(**ROOM), environment=Rooms).open_task(task).environment
    one, other = base.fork(1), base.fork(2)
    one.here["seen"] = 1
    assert [world.rooms[1]["seen"] for world in (one, other, base)] == [1, 0, 0] and one.here is one.rooms[1]


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

    class Absent(ToolEnvironment):
        def __init__(self, *args):
            raise OSError("no such room")

    drawer.Absent = Absent
    sentence = "The environment 'drawer:Absent' cannot be used (OSError: no such room); mend it."
    with pytest.raises(ValueError, match=re.escape(sentence)):
        collector_of(environment="drawer:Absent")

    class Twice(ToolEnvironment):
        @tool
        def visual_reflection(self, context) -> str:
            """Another tool of the name of one of the run's."""
            return ""

    drawer.Twice = Twice
    with pytest.raises(ValueError, match="two tools are called visual_reflection"):
        collector_of(environment="drawer:Twice")
