"""Rewards of hand-made trajectories, and what happens when a reward function fails."""

import sys
from types import ModuleType

import pytest
from scripted_run import finished

from imagent_jax.config import RewardConfig
from imagent_jax.rl.rewards import reward_functions, score_trajectory
from imagent_jax.types import CallResult, CallStatus, EndReason, Task

STOP, CALL = "<|im_end|>", "<tool_call>{}</tool_call>"
CFG = RewardConfig(answer=1.0, format=0.1, tool_gain=0.2)


def trajectory(answer, *, text=None, calls=(), end=EndReason.ANSWERED, answer_type="number", reference="7"):
    texts = [CALL] * len(calls) + [f"It is <answer>{answer}</answer>{STOP}" if text is None else text]
    return finished(Task("t/1", "?", (), reference, answer_type), texts, answer, end, [CallResult(c) for c in calls])


RAN, INVALID, FAULT = CallStatus.EXECUTED, CallStatus.INVALID, CallStatus.FAULT
TABLE = [  # trajectory, answer, format, tool_gain
    (trajectory("7"), 1, 1, 0),
    (trajectory("8"), 0, 1, 0),
    (trajectory("7", calls=[RAN]), 1, 1, 1),
    (trajectory("8", calls=[RAN]), 0, 1, 0),
    (trajectory("7", calls=[INVALID]), 1, 0, 0),
    (trajectory("7", calls=[FAULT]), 1, 1, 0),
    (trajectory("7", calls=[INVALID, RAN]), 1, 0, 1),
    (trajectory(None, text="no idea" + STOP, end=EndReason.VOID, calls=[RAN]), 0, 0, 0),
    (trajectory(None, text="<answer>7", end=EndReason.TRUNCATED), 0, 0, 0),
    (trajectory("7", text="<answer>7</answer>"), 1, 1, 0),
    (trajectory("7", text="So <answer>\n7</answer> <|endoftext|>\n"), 1, 1, 0),
    (trajectory("7", text=f"<answer>7</answer>{STOP}{STOP}"), 1, 0, 0),
    (trajectory("7", end=EndReason.REPEATED), 1, 0, 0),
    (trajectory("7", text=f"<answer>8</answer><answer>7</answer>{STOP}"), 1, 0, 0),
    (trajectory("7", text=f"<answer>7</answer> or 8{STOP}"), 1, 0, 0),
    (trajectory("7", text=f"</answer><answer>7{STOP}"), 1, 0, 0),
    (trajectory("", text=f"<answer> </answer>{STOP}"), 0, 0, 0),
    (trajectory("red car", calls=[RAN], answer_type="f1", reference="red bus"), 0.5, 1, 0),
    (trajectory("red bus", calls=[RAN], answer_type="f1", reference="red bus"), 1, 1, 1),
]


@pytest.mark.parametrize("t, answer, form, gain", TABLE)
def test_rewards_and_their_weighted_sum(t, answer, form, gain):
    scored = score_trajectory(t, reward_functions(CFG))
    total = scored.pop("total")
    assert scored == {"answer": answer, "format": form, "tool_gain": gain}
    assert total == pytest.approx(answer + 0.1 * form + 0.2 * gain)


@pytest.fixture
def mine(monkeypatch):
    """A module of a user's own rewards."""
    module = ModuleType("my_rewards")
    module.short = lambda t: 0.5 if len(t.turns) == 1 else 0.0
    module.broken = lambda t: 1 / 0
    module.not_a_number = lambda t: float("nan")
    module.infinite = lambda t: float("inf")
    module.nothing = lambda t: None
    module.leaves = sys.exit
    module.constant = 3
    monkeypatch.setitem(sys.modules, "my_rewards", module)


def test_a_reward_of_ones_own_is_named_by_its_path(mine):
    scored = score_trajectory(trajectory("7"), reward_functions(RewardConfig(custom=("my_rewards:short",))))
    assert scored["my_rewards:short"] == 0.5 and scored["total"] == pytest.approx(1.6)


FAILURES = {
    "broken": "ZeroDivisionError", "not_a_number": "'my_rewards:not_a_number' is nan", "infinite": "is inf",
    "nothing": "TypeError", "leaves": "SystemExit",
}  # fmt: skip


@pytest.mark.parametrize("name, error", FAILURES.items())
def test_a_reward_that_fails_is_a_fault_and_says_why(mine, name, error):
    t = trajectory("7", calls=[RAN])
    scored = score_trajectory(t, reward_functions(RewardConfig(custom=(f"my_rewards:{name}",))))
    assert error in scored["fault"] and error in t.error and scored["fault"].startswith(f"reward my_rewards:{name}: ")
    t.error = "the tool died"
    score_trajectory(t, reward_functions(RewardConfig(custom=(f"my_rewards:{name}",))))
    assert t.error == "the tool died"


@pytest.mark.parametrize(
    "path, sentence",
    [
        ("no_such_module:f", "'no_such_module:f' cannot be imported"),
        ("my_rewards:absent", "write 'package.module:name'"),
        ("my_rewards", "write 'package.module:name'"),
        ("my_rewards:constant", "is not a function"),
    ],
)
def test_a_bad_path_is_refused_at_once(mine, path, sentence):
    with pytest.raises(ValueError, match=sentence):
        reward_functions(RewardConfig(custom=(path,)))
