"""The pool of tool calls: order, time limits, threads, and what a call shows."""

import subprocess
import sys
import threading

import numpy as np
import pytest
from test_tools import OWN, SETTINGS, VISUAL, confirm, registry_of

from imagent_jax.tools import CallPool, CallStatus, format_call


def test_many_calls_come_back_in_order_and_as_if_run_alone():
    rng = np.random.default_rng(0)
    requests = []
    for _ in range(40):
        x, y = rng.integers(0, 500, 2).tolist()
        requests.append((confirm(image=int(rng.integers(1, 5)), bbox_2d=[x, y, x + 300, y + 300]), registry_of()))
    alone = [VISUAL.execute(text, registry.fork(), SETTINGS) for text, registry in requests]
    together = VISUAL.execute_many(requests, SETTINGS, workers=4, timeout_s=10.0)
    assert together == alone
    assert {result.status for result in alone} == {CallStatus.EXECUTED, CallStatus.INVALID}
    for result, (_, registry) in zip(together, requests, strict=True):
        assert len(registry) == 3 + (result.status is CallStatus.EXECUTED)
    assert VISUAL.execute_many([], SETTINGS) == []


def test_a_stuck_call_is_a_fault_and_holds_up_no_other():
    registries = [registry_of(1) for _ in range(8)]
    hows = ["sleep", "fine", "sleep", "fine", "fine", "invalid", "fault", "fine"]
    requests = [(format_call("misbehave", {"how": how}), r) for how, r in zip(hows, registries, strict=True)]
    results = OWN.execute_many(requests, SETTINGS, workers=2, timeout_s=0.2)
    assert [result.status.name[0] for result in results] == list("FEFEEIFE")
    assert results[0].error == "misbehave ran longer than 0.2 s" and results[0].parts == ["Error: the tool failed."]
    assert [len(registry) for registry in registries] == [1, 2, 1, 2, 2, 1, 1, 2]


def test_a_call_waits_for_a_worker_without_losing_its_time():
    requests = [(format_call("misbehave", {"how": "nap"}), registry_of(1)) for _ in range(8)]
    results = OWN.execute_many(requests, SETTINGS, workers=1, timeout_s=0.3)  # 0.4 s of naps in a row
    assert [result.parts for result in results] == [["rested"]] * 8


def test_the_pool_hands_out_results_while_others_run():
    pool = CallPool(OWN, SETTINGS, workers=2, timeout_s=5.0)
    slow, quick = registry_of(1), registry_of(1)
    pool.submit("slow", format_call("misbehave", {"how": "nap"}), slow)
    with pytest.raises(ValueError, match="one call at a time on a registry"):
        pool.submit("again", format_call("misbehave", {"how": "nap"}), slow)
    pool.submit("quick", "no call", quick)
    assert [key for key, _ in pool.poll()] == ["quick"] and pool.pending == 1
    assert pool.poll() == []
    assert [(key, result.parts) for key, result in pool.drain()] == [("slow", ["rested"])]
    assert pool.pending == 0


def test_what_a_call_shows_is_seen_on_its_thread_and_a_failure_of_that_is_the_callers():
    threads = []

    def see(registry, number):
        threads.append(threading.current_thread())
        if len(registry) == 1:
            raise ValueError("cannot be seen")
        return registry[number].image

    look = format_call("visual_reflection", {"images": [1]})
    pool, two, one = CallPool(VISUAL, SETTINGS, workers=1, see=see), registry_of(2), registry_of(1)
    pool.submit("two", look, two)
    [(_, result)] = list(pool.drain())
    assert result.images and result.seen == [two[number].image for number in result.images]
    assert threading.main_thread() not in threads
    pool.submit("one", look, one)
    pool.submit("two", look, two)  # waits for it
    with pytest.raises(ValueError, match="cannot be seen"):
        list(pool.drain())
    assert [key for key, _ in pool.drain()] == ["two"]


def test_a_stuck_tool_does_not_keep_the_interpreter_alive():
    script = """
import time
from imagent_jax.tools import ImageRegistry, ToolSet, ToolSettings, format_call, tool
@tool
def stuck(context):
    '''Never end.'''
    time.sleep(600)
result, = ToolSet([stuck]).execute_many([(format_call("stuck", {}), ImageRegistry())], ToolSettings(), 1, 0.1)
print(result.status.name)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "FAULT\n"
    assert all(thread.daemon for thread in threading.enumerate() if thread.name.startswith("tool-"))
