"""Rewards of hand-made trajectories: each kind of function, and what happens when one fails or abstains."""

import asyncio
import re
import socketserver
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import List  # noqa: UP035 - as users write it

import pytest
from scripted_run import finished

from imagent_jax.config import RewardConfig
from imagent_jax.rl.rewards import Part, reward_functions, score_trajectories, takes_list
from imagent_jax.types import CallResult, CallStatus, EndReason, Task, Trajectory

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
    scored = score_trajectories([t], reward_functions(CFG))[0]
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
    module.nothing = lambda t: "nothing"
    module.leaves = sys.exit
    module.constant = 3
    monkeypatch.setitem(sys.modules, "my_rewards", module)


def test_a_reward_of_ones_own_is_named_by_its_path(mine):
    scored = score_trajectories([trajectory("7")], reward_functions(RewardConfig(custom=("my_rewards:short",))))[0]
    assert scored["my_rewards:short"] == 0.5 and scored["total"] == pytest.approx(1.6)


FAILURES = {
    "broken": "ZeroDivisionError", "not_a_number": "'my_rewards:not_a_number' is nan", "infinite": "is inf",
    "nothing": "ValueError: could not convert", "leaves": "SystemExit",
}  # fmt: skip


@pytest.mark.parametrize("name, error", FAILURES.items())
def test_a_reward_that_fails_is_a_fault_and_says_why(mine, name, error):
    t = trajectory("7", calls=[RAN])
    scored = score_trajectories([t], reward_functions(RewardConfig(custom=(f"my_rewards:{name}",))))[0]
    assert error in scored["fault"] and error in t.error and scored["fault"].startswith(f"reward my_rewards:{name}: ")
    t.error = "the tool died"
    score_trajectories([t], reward_functions(RewardConfig(custom=(f"my_rewards:{name}",))))[0]
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


def test_rewards_of_ones_own_have_weights(mine):
    cfg = RewardConfig(answer=0, format=0, tool_gain=0, custom={"my_rewards:short": -2.0})
    assert score_trajectories([trajectory("7")], reward_functions(cfg))[0]["total"] == -1.0


# ---- rewards that abstain -------------------------------------------------------------------------------------------


NAMED = {"iou": 1.0, "point_in_box": 1.0, "set_f1": 1.0, "math_verify": 1.0}
ABSTAINS = [  # answer, reference, the rewards that are not abstained from
    ("[0, 0, 10, 5]", "[0, 0, 10, 10]", {"iou": 0.5, "point_in_box": 1.0, "set_f1": 0.5, "math_verify": 0.0}),
    ("1/2", "0.5", {"set_f1": 0.0, "math_verify": 1.0}),
    (None, "red {bus", {"set_f1": 0.0}),
    ("the red car", "red {bus", {"set_f1": 0.5}),
]


@pytest.mark.parametrize(("said", "reference", "named"), ABSTAINS)
def test_a_named_reward_abstains_where_the_reference_is_not_of_its_kind(said, reference, named):
    t = trajectory(said, answer_type="exact", reference=reference)
    scored = score_trajectories([t], reward_functions(RewardConfig(answer=0, format=0, tool_gain=0, **NAMED)))[0]
    assert {name: value for name, value in scored.items() if name in NAMED} == named
    assert scored["total"] == pytest.approx(sum(named.values()))


def test_a_named_reward_without_a_weight_is_not_computed():
    """It is where its task weighs it."""
    always = {"answer", "format", "tool_gain"}
    for cfg, weights, found in (
        (RewardConfig(), {}, always), (RewardConfig(iou=0.5), {}, always | {"iou"}),
        (RewardConfig(), {"set_f1": 1.0}, always | {"set_f1"}), (RewardConfig(iou=0.5), {"iou": 0.0}, always),
    ):  # fmt: skip
        t = trajectory("[0, 0, 9, 9]", answer_type="exact", reference="[0, 0, 9, 9]")
        t.task = replace(t.task, reward=weights)
        assert set(score_trajectories([t], reward_functions(cfg))[0]) == found | {"total"}


def test_where_every_reward_with_a_weight_abstains_there_is_no_total():
    parts = {"a": Part(0.0, lambda t: 1.0), "b": Part(1.0, lambda t: None if t.answer == "7" else 2.0)}
    first, second = score_trajectories([trajectory("7"), trajectory("8")], parts)
    assert first == {"a": 1.0} and second == {"a": 1.0, "b": 2.0, "total": 2.0}


# ---- rewards of lists, and async ones -------------------------------------------------------------------------------


def test_a_list_is_what_is_declared_as_one():
    def plain(t): ...
    def single(t: Trajectory): ...
    def text(t: "Trajectory"): ...
    def a(ts: list[Trajectory]): ...
    def b(ts: Sequence[Trajectory]): ...
    def c(ts: "list[Trajectory]"): ...
    def d(ts: List[Trajectory]): ...  # noqa: UP006
    def e(ts: "typing.List[Trajectory]"): ...  # noqa: F821
    def f(ts: list): ...

    class Whole:
        def __call__(self, ts: list[Trajectory]): ...

    assert [takes_list(one) for one in (plain, single, text, sys.exit, min, lambda: 0)] == [False] * 6
    assert [takes_list(one) for one in (a, b, c, d, e, f, Whole())] == [True] * 7


def test_a_reward_of_a_list_sees_all_and_returns_a_value_for_each():
    seen = []

    def rank(ts: list[Trajectory]):
        seen.append([t.answer for t in ts])
        return [None if t.answer == "7" else i for i, t in enumerate(ts)]

    made = score_trajectories([trajectory("6"), trajectory("7"), trajectory("8")], {"rank": Part(0.5, rank)})
    assert seen == [["6", "7", "8"]] and made == [{"rank": 0.0, "total": 0.0}, {}, {"rank": 2.0, "total": 1.0}]


def test_a_list_may_hold_the_error_of_one_trajectory():
    def rank(ts: list[Trajectory]):
        return [1.0, OSError("away"), float("nan")]

    ts = [trajectory("6"), trajectory("7"), trajectory("8")]
    good, away, bad = score_trajectories(ts, {"rank": Part(1.0, rank)})
    assert (
        good == {"rank": 1.0, "total": 1.0} and away["fault"] == "reward rank: OSError: away" and ts[1].error == "OSError: away\n"
    )
    assert "must be a finite number" in bad["fault"]


def raising(ts: list[Trajectory]):
    raise OSError("away")


async def raising_later(ts: list[Trajectory]):
    await asyncio.sleep(0)
    raise OSError("away")


def too_few(ts: list[Trajectory]):
    return [0.0]


def no_list(ts: list[Trajectory]):
    return 0.5


@pytest.mark.parametrize(
    ("reward", "words"),
    [(raising, "OSError: away (test_rewards.py"), (raising_later, "OSError: away (test_rewards.py"),
     (too_few, "returned [0.0] for 2 trajectories; return a value for each"), (no_list, "returned 0.5 for 2 trajectories")],
)  # fmt: skip
def test_a_reward_of_a_list_that_fails_is_a_fault_of_every_trajectory(reward, words):
    made = score_trajectories([trajectory("7"), trajectory("8")], {"a": Part(1.0, lambda t: 1.0), "b": Part(1.0, reward)})
    assert all(words in scored["fault"] and scored["total"] == scored["a"] == 0.0 for scored in made)


def test_a_reward_may_return_a_future_and_its_error_is_a_fault():
    with ThreadPoolExecutor(1) as pool:
        part = Part(1.0, lambda t: pool.submit(lambda: 1 / int(t.answer)), 20.0)
        good, bad = score_trajectories([trajectory("2"), trajectory("0")], {"a": part})
    assert good == {"a": 0.5, "total": 0.5} and bad["fault"].startswith("reward a: ZeroDivisionError") and bad["total"] == 0.0


class Clock:
    """Counts the calls that are under way."""

    def __init__(self):
        self.now, self.most, self.threads = 0, 0, set()

    async def wait(self, t: Trajectory) -> float:
        self.now, self.threads = self.now + 1, self.threads | {threading.current_thread().name}
        self.most = max(self.most, self.now)
        await asyncio.sleep(0.05)
        self.now -= 1
        return float(t.answer)


@pytest.mark.parametrize("slots", [1, 3, 8])
def test_async_rewards_run_at_once_up_to_a_bound_and_keep_their_order(slots):
    clock, ts = Clock(), [trajectory(str(i)) for i in range(8)]
    began = time.monotonic()
    made = score_trajectories(ts, {"wait": Part(1.0, clock.wait)}, slots)
    assert [scored["total"] for scored in made] == list(range(8)) and clock.most == slots and clock.threads == {"rewards"}
    assert time.monotonic() - began >= 0.05 * 8 / slots


def test_an_async_reward_runs_beside_the_others():
    async def waits(t: Trajectory) -> float:
        while not passed.is_set():
            await asyncio.sleep(0.001)
        return 1.0

    passed = threading.Event()
    parts = {"waits": Part(1.0, waits, 30.0), "sets": Part(1.0, lambda t: passed.set())}
    assert score_trajectories([trajectory("7")], parts) == [{"waits": 1.0, "total": 1.0}]


def test_connections_of_async_rewards_outlive_a_step():
    loops = []

    async def asks(t: Trajectory) -> float:
        loops.append(asyncio.get_running_loop())
        return 1.0

    for _ in range(2):
        score_trajectories([trajectory("7")], {"asks": Part(1.0, asks)})
    assert loops[0] is loops[1] and loops[0].is_running()


async def sleeps(t: Trajectory) -> float:
    await asyncio.sleep(60 if t.answer == "7" else 0)
    return 1.0


async def leaves(t: Trajectory) -> float:
    if t.answer == "7":
        sys.exit(3)
    return 1.0


async def gives_up(t: Trajectory) -> float:
    if t.answer == "7":
        raise asyncio.CancelledError
    return 1.0


@pytest.mark.parametrize(
    ("reward", "words"),
    [(sleeps, "reward r: TimeoutError: no result within 0.2 s"), (leaves, "reward r: SystemExit: 3 (test_rewards.py"),
     (gives_up, "reward r: asyncio.exceptions.CancelledError (test_rewards.py")],
)  # fmt: skip
def test_an_async_reward_that_fails_or_takes_too_long_is_a_fault_of_that_trajectory(reward, words):
    began = time.monotonic()
    failed, good = score_trajectories([trajectory("7"), trajectory("8")], {"r": Part(1.0, reward, 0.2)})
    assert failed["fault"].startswith(words) and good == {"r": 1.0, "total": 1.0}
    assert time.monotonic() - began < 30


def test_rewards_are_scored_inside_a_running_loop_as_a_notebook_has_one():
    async def cell():
        return score_trajectories([trajectory("8")], {"r": Part(1.0, sleeps)})

    assert asyncio.run(cell()) == [{"r": 1.0, "total": 1.0}]


class Length(socketserver.StreamRequestHandler):
    """Replies with the length of a line."""

    def handle(self):
        self.wfile.write(f"{len(self.rfile.readline().strip())}\n".encode())


def test_the_rewards_of_the_page_do_what_it_says(monkeypatch):
    page = (Path(__file__).parent.parent / "docs" / "rewards.md").read_text()
    [code] = re.findall(r"```python\n(# mine.py\n.*?)```", page, re.DOTALL)
    module = ModuleType("mine")
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Length) as server:
        threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
        assert code.count('"localhost", 9000') == 1
        exec(code.replace('"localhost", 9000', f'"127.0.0.1", {server.server_address[1]}'), module.__dict__)
        monkeypatch.setitem(sys.modules, "mine", module)
        cfg = RewardConfig(answer=0, format=0, tool_gain=0, custom={"mine:brief": 8.0, "mine:rank": 2.0, "mine:checked": 1.0})
        ts = [trajectory("7"), trajectory("seven", calls=[RAN])]
        ts[1].task.meta["limit"] = 100
        first, second = score_trajectories(ts, reward_functions(cfg))
        server.shutdown()
    assert "mine:brief" not in first and first["mine:rank"] == 0.0 and first["mine:checked"] == 1.0 and first["total"] == 1.0
    assert (second["mine:brief"], second["mine:rank"], second["mine:checked"]) == (1.0, 0.5, 5.0) and second["total"] == 14.0
