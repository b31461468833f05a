"""Settings of a tool's own: where they are read, how they are checked, and the time limit that every tool has."""

import dataclasses
import re
import sys
import time
import types
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Literal

import pytest
from conftest import small_config
from scripted_run import scripted_collector, without_weights

from imagent_jax.chat import Call
from imagent_jax.config import Config, ImagesConfig, read_args
from imagent_jax.config.settings import setting
from imagent_jax.rollout.collect import Collector, PendingCalls
from imagent_jax.rollout.environment import ToolEnvironment
from imagent_jax.rollout.policy import check_tool_settings, tools_of
from imagent_jax.tools import CallSettings, ToolSet, ToolSettings, tool, tools_by_name
from imagent_jax.tools.__main__ import main
from imagent_jax.types import CallStatus


@dataclass(frozen=True)
class TurnSettings(CallSettings):
    """Of the tool below."""

    timeout_s: float | None = 0.4
    degrees: float = setting(90.0, "how far it turns", above=0, most=360)
    way: Literal["left", "right"] = "left"
    names: tuple[str, ...] = ()
    most: int | None = None

    def __post_init__(self):
        if "nobody" in self.names:
            raise ValueError("nobody cannot be named")


@tool(settings=TurnSettings)
def turn(context, seconds: float = 0.0) -> str:
    """Turns.

    Args:
        seconds: to wait
    """
    time.sleep(seconds)
    return f"{context.own.degrees:g} {context.own.way} {context.own.names}"


@tool
def rest(context, seconds: float) -> str:
    """Rests.

    Args:
        seconds: to wait
    """
    time.sleep(seconds)
    return "rested"


def said(tools: ToolSet, name: str, **arguments) -> list:
    return ToolEnvironment(tools, ToolSettings(), ImagesConfig()).step(Call(name, arguments)).parts


@pytest.fixture(autouse=True)
def mine(monkeypatch):
    monkeypatch.setitem(sys.modules, "mine", types.SimpleNamespace(turn=turn, rest=rest))


def config(**tools) -> Config:
    return small_config(tools={"names": ["visual_reflection", "mine:turn"]} | tools)


def test_a_tool_reads_its_own_settings_from_yaml_and_from_the_command_line(tmp_path):
    assert said(tools_of(config()), "turn") == ["90 left ()"]
    own = {"degrees": 45, "names": ["a", "b"]}
    assert said(tools_of(config(settings={"turn": own})), "turn") == ["45 left ('a', 'b')"]
    file = tmp_path / "run.yaml"
    file.write_text(config(settings={"turn": own}).to_yaml())
    cfg = read_args([f"--config={file}", "--tools.settings.turn.way=right"])
    assert said(tools_of(cfg), "turn")[0].split()[1] == "right"
    assert Config.from_yaml(cfg.to_yaml()) == cfg


@pytest.mark.parametrize(
    ("own", "sentence"),
    [
        ({"degree": 3}, "There is no setting tools.settings.turn.degree; there are timeout_s, degrees, way, names, most."),
        ({"degrees": "far"}, "tools.settings.turn.degrees is 'far'; it must be a number."),
        ({"degrees": 361}, "tools.settings.turn.degrees is 361.0; it must be above 0 and at most 360."),
        ({"degrees": float("inf")}, "tools.settings.turn.degrees is inf; it must be a finite number."),
        ({"way": "up"}, "tools.settings.turn.way is 'up'; it must be one of 'left', 'right'."),
        ({"most": 1.5}, "tools.settings.turn.most is 1.5; it must be a whole number, or null."),
        ({"timeout_s": 0}, "tools.settings.turn.timeout_s is 0.0; it must be above 0."),
        ({"timeout_s": "x"}, "tools.settings.turn.timeout_s is 'x'; it must be a number, or null."),
        ({"names": ["nobody"]}, "tools.settings.turn: nobody cannot be named"),
    ],
)
def test_a_wrong_setting_is_one_sentence_before_the_run(own, sentence):
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        tools_of(config(settings={"turn": own}))


def test_settings_of_no_tool_are_refused_and_those_of_worlds_are_read():
    class World(ToolEnvironment):
        @tool(settings=TurnSettings)
        def spin(self, context) -> str:
            """Spins."""
            return f"{context.own.degrees:g}"

    sys.modules["mine"].World = World
    cfg = config(settings={"spin": {"degrees": 5}}, environment="mine:World")
    collector = Collector(*without_weights(), tools_of(cfg), cfg)
    check_tool_settings(cfg, collector)
    assert collector.environment().step(Call("spin", {})).parts == ["5"]
    assert collector.environment(("turn",)).fork(1).step(Call("spin", {})).parts == ["5"]
    cfg = config(settings={"trun": {}})
    sentence = (
        "tools.settings names 'trun', which is no tool of the run; there are visual_reflection, visual_confirmation, broken."
    )
    with pytest.raises(ValueError, match=re.escape(sentence)):
        check_tool_settings(cfg, scripted_collector(cfg))
    with pytest.raises(ValueError, match="its settings must be a frozen dataclass that inherits from tools.CallSettings"):
        tool(settings=dict)(rest.function)


def test_every_tool_has_a_time_limit_of_its_own():
    """In the order: of the tool's dataclass, of `tools.settings`, of the run."""
    cfg = config(names=["mine:turn", "mine:rest"], timeout_s=30.0, settings={"rest": {"timeout_s": 0.1}})

    def outcome(tools: ToolSet, name: str, seconds: float):
        calls = PendingCalls(scripted_collector(cfg).rules, cfg.tools)
        episode = SimpleNamespace(environment=ToolEnvironment(tools, ToolSettings(), ImagesConfig()))
        calls.submit(0, episode, Call(name, {"seconds": seconds}))
        while not calls.results:
            calls._poll(0.1)
        return calls.results[0][0]

    late = outcome(tools_of(cfg), "rest", 1.0)
    assert (late.status, late.error, late.seconds) == (CallStatus.FAULT, "rest ran longer than 0.1 s", 0.1)
    assert outcome(tools_of(cfg), "turn", 1.5).error == "turn ran longer than 0.4 s"
    longer = dataclasses.replace(cfg.tools, settings={"turn": {"timeout_s": 20}})
    assert outcome(tools_of(dataclasses.replace(cfg, tools=longer)), "turn", 0.6).status is CallStatus.EXECUTED
    assert outcome(tools_of(dataclasses.replace(cfg, tools=longer)), "rest", 0.3).status is CallStatus.EXECUTED


def test_the_sandbox_s_time_must_be_below_the_limit_of_python_itself():
    python = {"names": ["python"], "timeout_s": 4.0}
    Config.from_dict({"tools": python | {"settings": {"python": {"timeout_s": 6}}}})
    with pytest.raises(ValueError, match=r"sandbox.wall_s is 5, not below tools.settings.python.timeout_s 5; lower it"):
        Config.from_dict({"tools": python | {"timeout_s": 9.0, "settings": {"python": {"timeout_s": 5}}}})
    limited = ToolSet([*tools_by_name(["python"])], {"python": {"timeout_s": 7}})
    assert limited.limit_s(Call("python", {})) == 7 and limited.limit_s(Call("other", {})) is None


def test_the_settings_of_a_tool_are_shown_with_their_help(capsys):
    assert main(["mine:turn", "visual_reflection"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[:6] == [
        "turn: Turns.",
        "  seconds: number, to wait",
        "  tools.settings.turn.timeout_s: 0.4 (seconds a call may take (null: tools.timeout_s))",
        "  tools.settings.turn.degrees: 90.0 (how far it turns)",
        "  tools.settings.turn.way: left",
        "  tools.settings.turn.names: ()",
    ]
    assert shown[-1].startswith("  tools.settings.visual_reflection.timeout_s: None (")
    assert main(["mine:turnn"]) == 2 and capsys.readouterr().err.startswith("error: tools.names 'mine:turnn'")
