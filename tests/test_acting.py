"""Runs with tools that act, and a load of hostile calls: the short forms of benchmarks/acting.py and benchmarks/load.py."""

import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))
import acting
import load

from imagent_jax.chat import Call
from imagent_jax.types import CallResult, CallStatus


@pytest.mark.slow(60)
def test_a_run_whose_tools_act_is_the_same_with_other_workers_and_delays_and_after_a_kill(tmp_path):
    """Eight calls at once without delay, against three with random delays, killed once and resumed."""
    found = acting.measure(tmp_path, 3, 1, "--run.compile_cache=", again=False)
    assert found["differences"] == {"struck": []} and found["kills"][0]["code"] == -9
    assert found["steps"] == 3 and found["trajectories"] == 12 and "FAULT" not in found["ends"]
    assert found["calls"]["python EXECUTED"] > 3 and found["calls"]["search EXECUTED"] > 1 and found["images_made"] > 1


@pytest.mark.slow(30)
def test_honest_calls_beside_hostile_and_slow_ones_are_right_and_a_killed_search_server_gives_faults_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    found = load.run(tmp_path, 10.0, 16, wall_s=1.0)
    ends = found["ends"]
    assert (
        ends["python EXECUTED"] > 5 and ends["search EXECUTED"] > 1 and ends["crop EXECUTED"] > 0 and ends["hostile INVALID"] > 2
    )
    assert found["faults"]["gave no answer that can be used"] == ends["search FAULT"] > 0
    assert not {"python INVALID", "search INVALID", "crop INVALID"} & ends.keys() and len(found["memory_mb"]) == 10


def test_what_a_load_does_wrong_is_seen():
    trajectory = load.Trajectory(0, SimpleNamespace(fork=lambda seed: None), None, None)
    call = Call("python", {"code": "..."})

    def wrong(kind, expected, *parts, status=CallStatus.EXECUTED, strict=True):
        return trajectory.check(kind, call, expected, CallResult(status, "python", {}, [*parts], "why"), strict)

    harmless = SimpleNamespace(untried="", strict=False)
    assert wrong("hostile", harmless, "HARM").startswith("harm: ") and not wrong("hostile", harmless, "Error")
    names = SimpleNamespace(untried="", strict=True)
    assert wrong("hostile", names, "HARM") and not wrong("hostile", names, "HARM", strict=False)
    assert not wrong("python", "7", "7") and "not 7" in wrong("python", "7", "8")
    assert wrong("search", ["a"], "a", "b") and wrong("crop", None, "Image 4") and not wrong("crop", None, "Image 4", 4)
    assert wrong("python", "7", "7", status=CallStatus.INVALID) and not wrong("python", "7", status=CallStatus.FAULT)
    said = [
        load.reason(CallResult(CallStatus.FAULT, error=text))
        for text in ("SandboxError: the machine was too busy: x", "a\nOSError")
    ]
    assert [*said, load.reason(None)] == ["the machine was too busy", "OSError", "past the time limit"]
