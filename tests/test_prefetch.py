"""What is begun while a step trains is what the next step takes."""

import threading

import jax
import pytest
from conftest import small_config
from flax import nnx

from imagent_jax.data.pipeline import task_iterator
from imagent_jax.rollout.batch import RolloutBatch
from imagent_jax.rollout.collect import Collector, Stopped
from imagent_jax.rollout.policy import training_mesh
from imagent_jax.rollout.prefetch import Prefetcher
from imagent_jax.tiny.world import task_at


class Batch(RolloutBatch):
    """As much of a batch of rollouts as is looked at."""

    def __init__(self, **known):
        self.__dict__.update(known)


class Recorder(Collector):
    """A collector that says what it was asked."""

    def __init__(self):
        self.opened, self.stopped, self.stop = None, False, threading.Event()

    def weights(self, params):
        return "copy", params

    def open_in_background(self, tasks, spares):
        self.opened = tasks
        return "opened"

    def collect(self, weights, tasks, **how):
        if self.stopped:
            raise Stopped
        return Batch(weights=weights, tasks=tasks, how=how, mesh=jax.sharding.get_mesh(), unused=[])


@pytest.fixture
def ahead():
    cfg = small_config(run={"seed": 2}, rollout={"groups": 3, "group_size": 7, "temperature": 0.5})
    tasks = [task_at(0, "train", i) for i in range(10)]
    return Prefetcher(Recorder(), task_iterator(tasks, 3, seed=1), cfg.rollout, 2, None), task_iterator(tasks, 3, seed=1)


def uids(tasks):
    return [task.uid for task in tasks]


def test_what_is_begun_ahead_is_what_is_taken(ahead):
    """Its place, where a checkpoint goes on, stays before the first step that was not taken."""
    ahead, series = ahead
    w0, w1, w2 = (nnx.State({}) for _ in range(3))
    batches, places = [], [series.get_state()]
    for _ in range(4):
        batches.append(uids(next(series)))
        places.append(series.get_state())
    first, stale = ahead.take(0, w0)
    assert (uids(first.tasks), stale) == (batches[0], 0) and first.weights[1] is w0 and ahead.place == places[1]
    assert first.how == {"group_size": 7, "seed": 2 * 1_000_003, "temperature": 0.5, "opened": "opened", "refill": None}
    ahead.begin(1)
    assert uids(ahead.collector.opened) == batches[1] and ahead.place == places[1]
    second, stale = ahead.take(1, w1)
    assert second.tasks == ahead.collector.opened and second.weights[1] is w1 and stale == 0 and ahead.place == places[2]
    assert second.how["seed"] == 2 * 1_000_003 + 1
    mesh = training_mesh(small_config())
    with jax.set_mesh(mesh):
        ahead.begin(2, w1)
        third, stale = ahead.take(2, w2)
    assert (uids(third.tasks), stale) == (batches[2], 1) and third.weights[1] is w1 and third.mesh == mesh
    assert third.how == {"group_size": 7, "seed": 2 * 1_000_003 + 2, "temperature": 0.5, "opened": None, "refill": None}
    ahead.begin(3, w2)
    assert not ahead.collector.stop.is_set() and ahead.place == places[3]
    ahead.close()
    assert ahead.collector.stop.is_set() and ahead.next.rollouts.done()


def test_a_step_that_was_stopped_is_not_taken(ahead):
    ahead, series = ahead
    before, first = series.get_state(), uids(next(series))
    ahead.collector.stopped = True
    with pytest.raises(Stopped):
        ahead.take(0, nnx.State({}))
    assert ahead.place == before
    ahead.collector.stopped = False
    assert uids(ahead.take(0, nnx.State({}))[0].tasks) == first
    ahead.close()
