"""The pool of tool calls: order, time limits, threads, and what a call shows."""

import asyncio
import subprocess
import sys
import threading
import time
from functools import partial

import numpy as np
import pytest
from scripted_run import execute
from test_tools import OWN, SETTINGS, VISUAL, confirm, registry_of

from imagent_jax.chat import QWEN
from imagent_jax.tools import CallPool, ToolSet, ToolSettings, tool
from imagent_jax.types import CallStatus


def run_all(tools, requests, settings, workers=4, timeout_s=10.0):
    """Results of (text, registry) calls in the order of the requests, by a pool of their own; None: it ran too long."""
    pool = CallPool(workers, timeout_s)
    for index, (text, registry) in enumerate(requests):
        pool.submit(index, partial(execute, tools, text, registry, settings))
    results = dict(pool.drain())
    return [results[index] for index in range(len(requests))]


def test_many_calls_come_back_in_order_and_as_if_run_alone():
    rng = np.random.default_rng(0)
    requests = []
    for _ in range(40):
        x, y = rng.integers(0, 30, 2).tolist()
        requests.append((confirm(image=int(rng.integers(1, 5)), bbox_2d=[x, y, x + 30, y + 30]), registry_of()))
    settings = ToolSettings(coordinates="absolute", min_box=0.9)  # boxes beyond 56 pixels are refused
    alone = [execute(VISUAL, text, registry.fork(), settings) for text, registry in requests]
    together = run_all(VISUAL, requests, settings, workers=4, timeout_s=10.0)
    assert together == alone
    assert {result.status for result in alone} == {CallStatus.EXECUTED, CallStatus.INVALID}
    for result, (_, registry) in zip(together, requests, strict=True):
        assert len(registry) == 3 + (result.status is CallStatus.EXECUTED)
        assert all(entry.image.size == (252, 252) for entry in list(registry)[3:])  # nine tenths of a side
    assert run_all(VISUAL, [], SETTINGS) == []


def test_a_stuck_call_is_a_fault_and_holds_up_no_other():
    registries = [registry_of(1) for _ in range(8)]
    hows = ["sleep", "fine", "sleep", "fine", "fine", "invalid", "fault", "fine"]
    requests = [(QWEN.render_call("misbehave", {"how": how}), r) for how, r in zip(hows, registries, strict=True)]
    results = run_all(OWN, requests, SETTINGS, workers=2, timeout_s=0.2)
    assert [result and result.status.name[0] for result in results] == [None, "E", None, "E", "E", "I", "F", "E"]
    assert [len(registry) for registry in registries] == [1, 2, 1, 2, 2, 1, 1, 2]


def test_a_call_waits_for_a_worker_without_losing_its_time():
    requests = [(QWEN.render_call("misbehave", {"how": "nap"}), registry_of(1)) for _ in range(32)]
    results = run_all(OWN, requests, SETTINGS, workers=1, timeout_s=1.5)  # 1.6 s of naps in a row
    assert [result.parts for result in results] == [["rested"]] * 32


@pytest.mark.parametrize("workers", [1, 3])
def test_as_many_calls_run_at_once_as_there_are_workers(workers):
    lock, meet, running, most = threading.Lock(), threading.Barrier(workers), [], []

    @tool
    def together(context):
        """Wait until all workers are here."""
        with lock:
            running.append(1)
            most.append(len(running))
        meet.wait(timeout=30)
        time.sleep(0.02)  # one more would come in now
        with lock:
            running.pop()
        return "met"

    requests = [(QWEN.render_call("together", {}), registry_of(1)) for _ in range(2 * workers)]
    results = run_all(ToolSet([together]), requests, SETTINGS, workers=workers, timeout_s=60.0)
    assert [result.parts for result in results] == [["met"]] * len(requests)
    assert max(most) == workers


def test_work_that_ends_too_late_is_never_handed_out():
    go_on, over = threading.Event(), threading.Event()

    def dawdle():
        go_on.wait(30)
        over.set()
        return "late"

    pool = CallPool(workers=1, timeout_s=0.05)
    pool.submit("late", dawdle)
    assert list(pool.drain()) == [("late", None)]
    go_on.set()
    assert over.wait(30)
    pool.submit("next", lambda: "in time")
    assert list(pool.drain()) == [("next", "in time")] and list(pool.drain()) == []


def test_work_that_took_too_long_while_nobody_polled_is_late_all_the_same():
    pool = CallPool(workers=2, timeout_s=0.05)
    pool.submit("late", lambda: time.sleep(0.3), lambda result: pytest.fail("it is late"))
    time.sleep(1.0)
    assert list(pool.drain()) == [("late", None)]


def test_overdue_work_is_handed_out_while_other_work_runs_on_and_what_follows_has_no_limit():
    seen = threading.Event()
    pool = CallPool(workers=2, timeout_s=1.0)
    pool.submit("seen", lambda: 3, lambda number: seen.wait(60) and number + 1)
    pool.submit("stuck", lambda: time.sleep(30))
    later = threading.Timer(20, seen.set)
    later.start()  # where the pool waits for both
    assert pool.poll(60.0) == [("stuck", None)]
    assert pool.pending == 1 and not seen.is_set()
    later.cancel()
    seen.set()
    assert list(pool.drain()) == [("seen", 4)]


def test_the_pool_hands_out_results_while_other_work_runs():
    pool = CallPool(workers=2, timeout_s=5.0)
    pool.submit("slow", lambda: time.sleep(0.2))
    pool.submit("quick", lambda: "quick")
    assert pool.pending == 2 and pool.poll(1.0) == [("quick", "quick")] and pool.pending == 1
    assert pool.poll() == []
    assert list(pool.drain()) == [("slow", None)] and pool.pending == 0
    one = CallPool(workers=1)
    for key in range(3):
        one.submit(key, partial(int, key))
    assert one.pending == 3 and [key for key, _ in one.drain()] == [0, 1, 2]


@pytest.mark.parametrize(("workers", "timeout_s"), [(0, 1.0), (1, 0.0)])
def test_a_pool_needs_a_worker_and_time(workers, timeout_s):
    with pytest.raises(ValueError, match=f"at least 1 and timeout_s above 0, got {workers} and {timeout_s}"):
        CallPool(workers, timeout_s)


def test_both_parts_of_the_work_run_on_a_thread_and_a_failure_is_the_callers():
    threads = []

    def noted(value):
        threads.append(threading.current_thread())
        if value == "bad":
            raise ValueError("cannot be seen")
        return value

    pool = CallPool(workers=1)
    pool.submit("good", partial(noted, "good"), noted)
    assert list(pool.drain()) == [("good", "good")] and threads[0] is threads[1] is not threading.main_thread()
    pool.submit("bad", lambda: "bad", noted)
    pool.submit("next", lambda: "next")  # waits for it
    with pytest.raises(ValueError, match="cannot be seen"):
        list(pool.drain())
    assert list(pool.drain()) == [("next", "next")]


@pytest.mark.parametrize("error", [SystemExit, asyncio.CancelledError])
def test_work_that_raises_what_is_no_exception_fails_at_once(error):
    pool = CallPool(workers=1, timeout_s=60.0)
    for work, then in ((raises(error), lambda result: result), (lambda: 1, lambda result: raises(error)())):
        pool.submit("bad", work, then)
        with pytest.raises(error):
            list(pool.drain())


def raises(error):
    def work():
        raise error

    return work


def test_a_stuck_tool_does_not_keep_the_interpreter_alive():
    script = """
import time
from imagent_jax.tools import CallPool
pool = CallPool(1, 0.1)
pool.submit(0, lambda: time.sleep(600))
print(list(pool.drain()))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "[(0, None)]\n"
    assert all(thread.daemon for thread in threading.enumerate() if thread.name.startswith("tool-"))
