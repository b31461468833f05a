"""The pool of tool calls: order, time limits, threads, and what a call shows."""

import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from test_tools import OWN, SETTINGS, VISUAL, confirm, registry_of

from imagent_jax.tools import CallPool, ToolSet, ToolSettings, format_call, tool
from imagent_jax.types import CallStatus


def run_all(tools, requests, settings, workers=4, timeout_s=10.0):
    """Results of (text, registry) calls in the order of the requests, by a pool of their own."""
    pool = CallPool(tools, settings, workers, timeout_s)
    for index, (text, registry) in enumerate(requests):
        pool.submit(index, text, registry)
    results = dict(pool.drain())
    return [results[index] for index in range(len(requests))]


def test_many_calls_come_back_in_order_and_as_if_run_alone():
    rng = np.random.default_rng(0)
    requests = []
    for _ in range(40):
        x, y = rng.integers(0, 30, 2).tolist()
        requests.append((confirm(image=int(rng.integers(1, 5)), bbox_2d=[x, y, x + 30, y + 30]), registry_of()))
    settings = ToolSettings(coordinates="absolute", min_box=0.9)  # boxes beyond 56 pixels are refused
    alone = [VISUAL.execute(text, registry.fork(), settings) for text, registry in requests]
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
    requests = [(format_call("misbehave", {"how": how}), r) for how, r in zip(hows, registries, strict=True)]
    results = run_all(OWN, requests, SETTINGS, workers=2, timeout_s=0.2)
    assert [result.status.name[0] for result in results] == list("FEFEEIFE")
    assert results[0].error == "misbehave ran longer than 0.2 s" and results[0].parts == ["Error: the tool failed."]
    assert [len(registry) for registry in registries] == [1, 2, 1, 2, 2, 1, 1, 2]


def test_a_call_waits_for_a_worker_without_losing_its_time():
    requests = [(format_call("misbehave", {"how": "nap"}), registry_of(1)) for _ in range(8)]
    results = run_all(OWN, requests, SETTINGS, workers=1, timeout_s=0.3)  # 0.4 s of naps in a row
    assert [result.parts for result in results] == [["rested"]] * 8


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

    requests = [(format_call("together", {}), registry_of(1)) for _ in range(2 * workers)]
    results = run_all(ToolSet([together]), requests, SETTINGS, workers=workers, timeout_s=60.0)
    assert [result.parts for result in results] == [["met"]] * len(requests)
    assert max(most) == workers


def test_a_call_that_ends_too_late_changes_nothing():
    """Its image never joins the registry, its result is never handed out, and its registry is free for other calls."""
    go_on, over = threading.Event(), threading.Event()

    @tool
    def dawdle(context):
        """Show an image late."""
        go_on.wait(30)
        number = context.show(context.registry[1].image)
        over.set()
        return [number]

    pool, registry = CallPool(ToolSet([dawdle, *VISUAL]), SETTINGS, workers=1, timeout_s=0.05), registry_of(1)
    pool.submit("late", format_call("dawdle", {}), registry)
    [(key, result)] = list(pool.drain())
    assert (key, result.status, result.arguments) == ("late", CallStatus.FAULT, {})
    assert result.error == "dawdle ran longer than 0.05 s"
    go_on.set()
    assert over.wait(30)
    pool.submit("next", confirm(image=1, bbox_2d=[0, 0, 500, 500]), registry)
    [(key, result)] = list(pool.drain())
    assert (key, result.images, len(registry)) == ("next", [2], 2)
    assert registry[2].describe() == "Image 2: crop of Image 1" and list(pool.drain()) == []


def test_a_call_that_is_overdue_is_handed_out_while_another_runs_on_and_seeing_takes_no_time_of_the_tools():
    seen = threading.Event()

    def see(registry, number):
        assert seen.wait(60)
        return registry[number].shown

    pool = CallPool(ToolSet([*OWN, *VISUAL]), SETTINGS, workers=2, timeout_s=1.0, see=see)
    pool.submit("seen", format_call("visual_reflection", {"images": [1]}), registry_of(1))
    pool.submit("stuck", format_call("misbehave", {"how": "sleep"}), registry_of(1))
    later = threading.Timer(20, seen.set)
    later.start()  # where the pool waits for both
    assert [(key, result.status) for key, result in pool.poll(60.0)] == [("stuck", CallStatus.FAULT)]
    assert pool.pending == 1 and not seen.is_set()
    later.cancel()
    seen.set()
    [(key, result)] = list(pool.drain())
    assert (key, result.status, result.seen) == ("seen", CallStatus.EXECUTED, [(56, 56)])


def test_the_pool_hands_out_results_while_others_run():
    pool = CallPool(OWN, SETTINGS, workers=2, timeout_s=5.0)
    slow, quick = registry_of(1), registry_of(1)
    pool.submit("slow", format_call("misbehave", {"how": "nap"}), slow)
    with pytest.raises(ValueError, match="one call at a time on a registry"):
        pool.submit("again", format_call("misbehave", {"how": "nap"}), slow)
    pool.submit("quick", "no call", quick)
    assert pool.pending == 2
    assert [key for key, _ in pool.poll()] == ["quick"] and pool.pending == 1
    assert pool.poll() == []
    assert [(key, result.parts) for key, result in pool.drain()] == [("slow", ["rested"])]
    assert pool.pending == 0
    one = CallPool(OWN, SETTINGS, workers=1)
    for key, registry in enumerate((slow, registry_of(1), quick)):
        one.submit(key, format_call("misbehave", {"how": "nap"}), registry)
    assert one.pending == 3
    with pytest.raises(ValueError, match="one call at a time on a registry"):
        one.submit(3, "no call", quick)  # its call waits for a worker
    assert [key for key, _ in one.drain()] == [0, 1, 2]


@pytest.mark.parametrize(("workers", "timeout_s"), [(0, 1.0), (1, 0.0)])
def test_a_pool_needs_a_worker_and_time(workers, timeout_s):
    with pytest.raises(ValueError, match=f"at least 1 and timeout_s above 0, got {workers} and {timeout_s}"):
        CallPool(OWN, SETTINGS, workers, timeout_s)


def test_what_a_call_shows_is_seen_on_its_thread_and_a_failure_of_that_is_the_callers():
    threads = []

    def see(registry, number):
        threads.append(threading.current_thread())
        if len(registry) == 2:  # the one image and its crop, which its own registry has not got yet
            raise ValueError("cannot be seen")
        return registry[number].image

    look = confirm(image=1, bbox_2d=[0, 0, 500, 500])
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
from imagent_jax.tools import CallPool, ImageRegistry, ToolSet, ToolSettings, format_call, tool
@tool
def stuck(context):
    '''Never end.'''
    time.sleep(600)
pool = CallPool(ToolSet([stuck]), ToolSettings(), 1, 0.1)
pool.submit(0, format_call("stuck", {}), ImageRegistry())
(_, result), = pool.drain()
print(result.status.name)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "FAULT\n"
    assert all(thread.daemon for thread in threading.enumerate() if thread.name.startswith("tool-"))
