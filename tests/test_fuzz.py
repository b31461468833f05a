"""Random turns and random programs: the short form of benchmarks/fuzz.py, and that its checks see what is wrong."""

import os
import sys
import tempfile
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))
import common
import fuzz
from generated import REAL

from imagent_jax.chat import QWEN
from imagent_jax.config import SandboxConfig
from imagent_jax.tools.sandbox import Sandbox


@pytest.mark.slow(6)
def test_random_turns_end_as_calls_answers_or_texts():
    found = fuzz.texts(0, 20_000)
    assert sum(found["ends"].values()) == found["done"] == 20_000
    assert all(found["ends"][end] > 800 for end in ("EXECUTED", "INVALID", "answer", "text"))


@pytest.mark.slow(15)
def test_random_programs_end_as_results_or_errors_and_leave_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    sandbox = Sandbox(SandboxConfig(wall_s=1.0, memory_mb=64))
    before = common.left(sandbox)
    found = fuzz.programs(0, 100, sandbox)
    after = common.left(sandbox)
    sandbox.close()
    ends = found["ends"]
    assert ends["EXECUTED"] > 50 and ends["INVALID"] > 200 and ends.get("FAULT", 0) < 25
    assert sum(ends[end] for end in ("EXECUTED", "INVALID", "FAULT") if end in ends) == found["run"] == 500
    assert all(after[kind] == before[kind] for kind in ("workers", "descriptors", "folders")), (before, after)


def test_a_turn_that_is_read_wrongly_is_seen(monkeypatch):
    tools = fuzz.offered()
    validators = {tool.name: fuzz.validator(tool) for tool in tools}
    good = QWEN.render_call("image_zoom_in_tool", {"bbox_2d": [0, 0, 9, 9], "label": "x", "img_idx": 0})
    bad = good.replace("[0, 0, 9, 9]", "[0, 0, 9]")
    assert [fuzz.check_turn(text, tools, validators) for text in (good, bad)] == ["EXECUTED", "INVALID"]
    monkeypatch.setattr(fuzz.Tool, "check", lambda self, arguments: None)
    fuzz.check_turn(good, tools, validators)
    with pytest.raises(AssertionError, match="bbox_2d"):
        fuzz.check_turn(bad, tools, validators)


def test_a_command_goes_on_where_the_last_one_stopped():
    first = fuzz.joined({}, {"done": 5, "ends": {"a": 3, "b": 2}, "slowest_s": 2.0}, 10.2)
    both = fuzz.joined(first, {"done": 9, "ends": {"a": 4}, "slowest_s": 1.0}, 5.0)
    assert both == {"done": 9, "ends": {"a": 7, "b": 2}, "slowest_s": 2.0, "seconds": 15}
    assert len(REAL) > 14 and os.path.basename(fuzz.__file__) == "fuzz.py"
