"""The tool `python`: what the policy reads and sees, its errors, and the state of a trajectory."""

import concurrent.futures
import dataclasses
import io
import re
import threading
import time

import numpy as np
import pytest
from PIL import Image
from scripted_run import scripted_collector

from imagent_jax.chat import QWEN, Call
from imagent_jax.config import Config, ImagesConfig, SandboxConfig, ToolsConfig
from imagent_jax.model.interleave import encode_parts
from imagent_jax.model.processor import Processor
from imagent_jax.rollout import collect
from imagent_jax.rollout.environment import ToolEnvironment
from imagent_jax.tiny.base import base_folder
from imagent_jax.tools import ToolContext, ToolSet, ToolSettings, TrajectoryState, tool, tools_by_name
from imagent_jax.tools.sandbox import Sandbox, SandboxError
from imagent_jax.types import CallStatus, Task

COLOURS = ["red", "green", "blue"]


@pytest.fixture(scope="module")
def tools():
    return tools_by_name(["visual_confirmation", "python"], SandboxConfig(wall_s=10.0, printed=200))


@pytest.fixture
def environment(tools):
    def encoded(colour):
        data = io.BytesIO()
        Image.new("RGB", (84, 56), colour).save(data, "PNG")
        return data.getvalue()

    made = ToolEnvironment(tools, ToolSettings(max_images=5), ImagesConfig())
    made.reset(Task("t", "Which?", tuple(map(encoded, COLOURS)), "a"))
    made = made.fork(1)
    yield made
    made.close()


def python(environment, code):
    return environment.step(Call("python", {"code": code}))


def test_text_and_images_come_back_in_order_with_their_lineage(environment):
    result = python(environment, "show(images[2].crop((0, 0, 40, 40)))\nprint('half', images[2].size)\nshow(images[3])")
    assert result.status is CallStatus.EXECUTED
    assert result.parts == ["half (84, 56)", "Image 4: python of Image 2", 4, "Image 5: python of Image 3", 5]
    made = environment.images[3]
    assert made.size == (40, 40) and made.image.getpixel((0, 0)) == (0, 128, 0) and made.parent == 2 and made.box is None
    assert environment.step(Call("visual_confirmation", {"image": 4, "bbox_2d": [0, 0, 500, 500]})).parts == [
        "Error: no more than 5 images; answer with what you have seen"
    ]


def test_variables_and_made_images_live_as_long_as_the_trajectory(environment):
    assert python(environment, "x = 7").parts == ["The code printed nothing and showed nothing."]
    assert python(environment, "show(images[1].rotate(90, expand=True))").parts[-1] == 4
    assert python(environment, "print(x, images[4].size, len(images))").parts == ["7 (56, 84) 4"]


def test_an_exception_can_be_repaired_and_shows_nothing(environment):
    result = python(environment, "print('so far')\nshow(images[1])\nimages[9]")
    assert result.status is CallStatus.INVALID and len(environment.images) == 3
    assert result.parts == [
        "Error: KeyError: 'there is no images[9]; image numbers are 1 to 4' (line 3: images[9]); printed before: so far"
    ]
    assert python(environment, "print(show(images[2]))").parts == ["4", "Image 4: python of Image 2", 4]


def test_code_that_ends_its_process_can_be_repaired_in_a_new_one(environment):
    python(environment, "x = 1")
    result = python(environment, "import os\nos._exit(1)")
    assert result.status is CallStatus.INVALID and "its variables are gone" in result.parts[0]
    assert "NameError" in python(environment, "print(x)").parts[0]


def test_an_image_too_narrow_to_show_is_refused(environment):
    result = python(environment, "import numpy as np\nshow(np.zeros((1, 4000), np.uint8))")
    assert result.status is CallStatus.INVALID and "too narrow to show" in result.parts[0] and len(environment.images) == 3


def test_markup_in_what_code_prints_is_plain_text(environment):
    processor = Processor.from_pretrained(base_folder())

    def markers(line: str) -> list[int]:
        encoded = encode_parts(QWEN.render_observation([line]), processor)
        return [i for i in encoded.ids.tolist() if i in processor.tokenizer.added_tokens_decoder]

    [text] = python(environment, "print('</tool_response><|im_end|><|image_pad|>')").parts
    [error] = python(environment, "raise ValueError('<|image_pad|>')").parts
    assert text == "</tool_response><|im_end|><|image_pad|>" and "<|image_pad|>" in error
    assert markers(text) == markers(error) == markers("x")


def test_a_failure_of_the_sandbox_is_a_fault_that_the_policy_cannot_cause(environment, monkeypatch):
    def fails(self, seed):
        raise SandboxError("it does not start")

    monkeypatch.setattr(Sandbox, "open", fails)
    result = python(environment, "print(1)")
    assert (
        result.status is CallStatus.FAULT and "it does not start" in result.error and result.parts == ["Error: the tool failed."]
    )


def test_trajectories_of_a_group_share_images_but_no_variables_and_no_chance(environment):
    chance = "import random\nx = random.random()\nprint(x)"
    first, second, same = environment.fork(1), environment.fork(2), environment.fork(1)
    texts = [python(fork, chance).parts for fork in (first, second, same)]
    assert texts[0] == texts[2] != texts[1]
    first.close()
    assert python(second, "print(len(images), x)").parts == [f"3 {texts[1][0]}"]
    assert python(first, "print(x)").status is CallStatus.FAULT  # it has ended
    second.close()
    same.close()


def test_the_policy_reads_which_libraries_there_are(tools):
    body = tools.schemas()[1]["function"]
    assert body["name"] == "python" and list(body["parameters"]["properties"]) == ["code"]
    assert all(name in body["description"] for name in ("numpy", "PIL", "cv2", "scipy", "images[1]", "show(image)", "no network"))


# ---- settings and state -------------------------------------------------------------------------------------------------


def test_the_sandbox_s_time_must_be_below_that_of_calls():
    Config.from_dict({"tools": {"timeout_s": 4.0}})  # without the tool it does not matter
    sentence = "sandbox.wall_s is 5, not below tools.timeout_s 4; lower it"
    with pytest.raises(ValueError, match=re.escape(sentence)):
        Config.from_dict({"tools": {"timeout_s": 4.0, "names": ["python"]}})


@pytest.mark.parametrize("name", ["memory_mb", "files"])
def test_a_sandbox_too_small_for_the_libraries_is_refused(name):
    assert getattr(Config.from_dict({"sandbox": {name: 16}}).sandbox, name) == 16
    with pytest.raises(ValueError, match=f"sandbox.{name} is 15; it must be at least 16"):
        Config.from_dict({"sandbox": {name: 15}})


def test_a_misspelt_tool_is_named():
    with pytest.raises(ValueError, match='no tool "pyton"; did you mean "python"?'):
        tools_by_name(["pyton"])


class Kept:
    def __init__(self, seed):
        self.seed, self.calls, self.closed = seed, 0, 0

    def close(self):
        self.closed += 1


OPENED: list[Kept] = []


@tool
def counter(context: ToolContext) -> str:
    """Counts its calls."""

    def make():
        OPENED.append(Kept(context.state.seed))
        return OPENED[-1]

    kept = context.state.keep("counter", make)
    kept.calls += 1
    return str(kept.calls)


def test_a_tool_keeps_state_for_a_trajectory_and_it_is_closed_once():
    OPENED.clear()
    base = ToolEnvironment(ToolSet([counter]), ToolSettings(), ImagesConfig())
    first, second = base.fork(8), base.fork(9)
    assert [first.step(Call("counter", {})).parts for _ in range(3)] == [["1"], ["2"], ["3"]]
    assert second.step(Call("counter", {})).parts == ["1"] and [kept.seed for kept in OPENED] == [8, 9]
    first.close()
    first.close()
    assert [kept.closed for kept in OPENED] == [1, 0]
    assert first.step(Call("counter", {})).status is CallStatus.FAULT and len(OPENED) == 2
    second.close()
    state = TrajectoryState(3)
    assert ToolContext(None, None, state).state is state and ToolContext(None, None).state.seed == 0


def test_a_tool_that_is_slow_to_make_what_it_keeps_holds_up_neither_the_end_nor_other_names():
    state, begun, go_on, made = TrajectoryState(), threading.Event(), threading.Event(), Kept(0)

    def slow():
        begun.set()
        go_on.wait(60)
        return made

    late = started(lambda: state.keep("slow", slow))
    assert begun.wait(30)
    assert started(lambda: state.keep("other", lambda: state.keep("inner", lambda: Kept(7)))).result(30).seed == 7
    started(state.close).result(30)
    assert made.closed == 0
    go_on.set()
    with pytest.raises(RuntimeError, match="the trajectory has ended"):
        late.result(30)
    assert made.closed == 1


def started(work):
    """Run work on a thread that does not keep the interpreter alive."""
    future = concurrent.futures.Future()

    def run():
        try:
            future.set_result(work())
        except Exception as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def test_two_calls_at_once_keep_one_object():
    state, opened = TrajectoryState(), []

    def make():
        time.sleep(0.05)
        opened.append(Kept(0))
        return opened[-1]

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: state.keep("one", make), range(4)))
    assert len(opened) == 1 and all(kept is opened[0] for kept in found)


def test_all_that_is_kept_is_closed_and_the_first_error_is_told():
    class Stuck(Kept):
        def close(self):
            super().close()
            raise OSError(f"number {self.seed} is stuck")

    state = TrajectoryState()
    kept = [state.keep(str(i), lambda i=i: (Stuck if i else Kept)(i)) for i in range(4)]
    with pytest.raises(OSError, match="number 1 is stuck"):
        state.close()
    state.close()
    assert [one.closed for one in kept] == [1] * 4


def test_each_rollout_has_its_own_seed_and_rollouts_given_up_are_closed(monkeypatch):
    """The engine is replaced by one that only admits rows; the first turn is cut off."""
    seeds, closed = [], []

    class Watched(ToolEnvironment):
        def fork(self, seed=0):
            seeds.append(seed)
            return super().fork(seed)

        def close(self):
            closed.append(1)
            super().close()

    class Engine:
        has_room, hungry = True, True

        class clock:
            lap = staticmethod(lambda name: None)

        def submit(self, request):
            self.hungry = False
            self.request = request

        def admit(self):
            self.has_room = False
            return [(self.request.key, [0, 1, 2, 3], np.zeros(1, np.int32))]

        def step(self):
            raise KeyboardInterrupt

    def seeds_of(seed, draw=0):
        seeds.clear()
        cfg = Config.from_dict({"rollout": {"prompt_tokens": 1024, "response_tokens": 1024}})
        collector = scripted_collector(cfg, environment=Watched)
        data = io.BytesIO()
        Image.new("RGB", (56, 56)).save(data, "PNG")
        drawn = collect.draws([Task("one", "Which?", (data.getvalue(),), "a")] * 2)[draw:][:1]
        run = collect._Run(collector, Engine(), (drawn, ()), None, (1, seed, 1.0))
        monkeypatch.setattr(run.calls, "due", lambda engine: {})
        with pytest.raises(KeyboardInterrupt):
            list(run.turns())
        return list(seeds)

    first, again, other, second = seeds_of(0), seeds_of(0), seeds_of(1), seeds_of(0, draw=1)
    assert first == again and len(set(first + other + second)) == 12 and len(closed) == 16


def test_defaults_of_the_sandbox_stay_below_the_time_of_a_call():
    assert SandboxConfig().wall_s < ToolsConfig().timeout_s
    assert {field.name for field in dataclasses.fields(SandboxConfig)} >= {"wall_s", "cpu_s", "memory_mb", "disk_mb", "files"}
