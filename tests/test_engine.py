"""The decoding engine alone: slots, temperatures, cancelled rows, and its clock."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest

from imagent_jax.model.features import FeatureStore
from imagent_jax.rollout import engine
from imagent_jax.rollout.collect import Collector


def rows_computed(lengths: list[int], sizes: list[int], chunk: int) -> int:
    """How many rows decoding computes, step by step: on the smallest size that holds the live rows, until a smaller one would."""
    at, found = 0, 0
    while live := [n for n in lengths if n > at]:
        size = min(size for size in sizes if size >= len(live))
        fewer = max((s for s in sizes if s < min(size, len(live))), default=0)
        for _ in range(chunk):
            at, found = at + 1, found + size
            if sum(n > at for n in lengths) <= fewer:
                break
    return found


def test_a_cancelled_row_stops_where_it_is_and_the_others_go_on(parts, config, tasks):
    """Every prompt at its own temperature: 0 is greedy, and a row samples the same beside other temperatures."""
    collector = Collector(parts.model, parts.processor, parts.tools, config)
    prompts = [collector.open_task(task).prompt for task in tasks[:2]]

    def decoded(*requests, cancel=()):
        weights = collector.weights(parts.params).params
        store = FeatureStore(parts.model, weights, config.images.pack_blocks, config.images.pages, frozen=True)
        shape = engine.EngineShape(2, 2, 112, 64, 32, 7)
        with jax.set_mesh(parts.mesh):
            run = engine.Engine(parts.model, weights, store, shape, collector.stops)
            for request in requests:
                run.submit(request)
            placed, turns = run.admit(), {}
            while len(placed) < len(requests):
                placed += run.admit()
            turns |= run.step()
            run.cancel(cancel)
            length = run.length.copy()
            while run.live.any():
                turns |= run.step()
            assert all(run.length[row] == length[row] for row in cancel) and not set(cancel) & (turns.keys() - set())
            if not cancel:
                assert run.decoded == rows_computed([len(ids) for ids in turns.values()], run.sizes, 7)
            return {(key, row - rows[0]): turns.get(row) for key, rows, _ in placed for row in rows}

    greedy, warm = engine.Request("a", prompts[0], 1, 5, 0.0), engine.Request("b", prompts[1], 1, 6, 1.5)
    both = decoded(greedy, warm)
    assert np.array_equal(both["a", 0], both["a", 1]) and len(both) == 4
    alone = decoded(warm)
    assert all(np.array_equal(both["b", i], alone["b", i]) for i in (0, 1))
    some = decoded(greedy, warm, cancel=[1])
    assert some["a", 1] is None and all(np.array_equal(some[key], both[key]) for key in (("a", 0), ("b", 0), ("b", 1)))


def test_seconds_are_added_up_by_phase(monkeypatch):
    now = iter([10.0, 11.0, 13.0, 17.0, 25.0])
    monkeypatch.setattr(engine.time, "perf_counter", lambda: next(now))
    clock = engine.Clock()
    for name in ("decode", "host", "decode", "host"):
        clock.lap(name)
    assert clock.times == {"decode": 1.0 + 4.0, "host": 2.0 + 8.0}


QUARTERS = [(1, 1, (1, 1)), (1, 8, (1, 2)), (4, 4, (1, 4)), (8, 4, (2, 8)), (12, 8, (3, 24)), (10, 2, (2, 5)), (9, 1, (3, 3))]


@pytest.mark.parametrize("slots, group_size, expected", QUARTERS)
def test_a_quarter_of_slots_and_rows(slots, group_size, expected):
    """Slots admitted at once divide the slots; rows observed at once are a quarter, rounded up."""
    assert engine.quarters(slots, group_size) == expected


def test_prompts_are_wanted_until_a_pack_of_images_or_the_slots_are_full(parts):
    """Two are admitted at once; a pack holds the images of three, so a fourth prompt is prepared later."""
    shape, store = engine.EngineShape(8, 2, 112, 64, 32, 4), SimpleNamespace(pack=100)
    prompt, wanted = SimpleNamespace(ids=np.zeros(5, int), images=[SimpleNamespace(patches=np.zeros((30, 1)))]), []
    with jax.set_mesh(parts.mesh):
        run = engine.Engine(parts.model, None, store, shape, np.zeros((1, 1088), np.int16), warm=True)
    for key in range(5):
        wanted.append(run.hungry)
        run.submit(engine.Request(key, prompt, 0, 0))
    assert wanted == [True, True, True, False, False] and run.has_room
    run.waiting.clear()
    run.free, run.busy = [0], {1: None}
    assert not run.has_room and not run.hungry
