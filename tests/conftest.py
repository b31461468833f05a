"""Shared fixtures: the shipped tiny base with its tools and engine, and one batch of real rollouts."""

import os
import signal
from collections import Counter
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # here, and in the processes that tests start
os.environ["JAX_COMPILATION_CACHE_DIR"] = os.path.expanduser("~/.cache/imagent_jax/tests")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"

import jax
import numpy as np
import pytest

from imagent_jax.config import TINY, Config, load_config
from imagent_jax.rl.batch import pack_batch
from imagent_jax.rollout.collect import Collector
from imagent_jax.tiny.world import task_at

# A shell that starts pytest in the background has it ignore Ctrl-C, and all processes that the tests start would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items):
    """Run the files with the most seconds of `slow` tests first, so that two processes end at about the same time."""
    seconds = Counter()
    for item in items:
        marker = item.get_closest_marker("slow")
        seconds[item.path] += marker.args[0] if marker else 0
    items.sort(key=lambda item: -seconds[item.path])


@pytest.fixture(scope="module", autouse=True)
def few_executables():
    """Drop compiled programs between files once they hold many memory maps: Linux allows 65,530, a file adds up to 15,000."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and len(maps.read_text().splitlines()) > 30_000:
        jax.clear_caches()


def small_config(**sections) -> Config:
    """The tiny run at a size for tests; `sections` are dictionaries of changed settings."""
    base = {
        "run": {"compile_cache": ""},
        "rollout": {"groups": 4, "group_size": 4, "response_tokens": 192},
        "grpo": {"micro_groups": 2, "minibatches": 1, "length_buckets": 2},
        "eval": {"groups": 8, "tasks": 8, "during": 8},
        "data": {"train_size": 64, "test_size": 32},
    }
    for name, values in sections.items():
        base.setdefault(name, {}).update(values)
    return tiny_config(base)


def tiny_config(sections: dict[str, dict]) -> Config:
    """The tiny run with some settings changed."""
    return load_config(TINY).changed({f"{name}.{key}": v for name, values in sections.items() for key, v in values.items()})


@pytest.fixture(scope="session")
def config() -> Config:
    return small_config()


@pytest.fixture(scope="session")
def parts(config):
    """Model, parameters, processor, tools and engine of the shipped tiny base."""
    from imagent_jax.rollout.policy import Policy

    return Policy(config)


@pytest.fixture(scope="session")
def tasks():
    return [task_at(7, "train", i) for i in range(4)]


@pytest.fixture(scope="session")
def rollout(parts, tasks, config):
    """4 tasks x 4 rollouts of the shipped base, sampled by a collector that has done nothing before, whatever tests ran."""
    collector = Collector(parts.model, parts.processor, parts.tools, config)
    return collector.collect(parts.params, tasks, group_size=4, seed=11)


@pytest.fixture(scope="session")
def batch(rollout, config):
    """The rollout as a training batch, with rewards that spread in every group."""
    rewards = np.random.default_rng(0).normal(size=(4, 4)).astype(np.float32)
    return pack_batch(rollout, rewards, rewards - rewards.mean(1, keepdims=True), config.rollout.prompt_tokens,
                      config.rollout.response_tokens)  # fmt: skip


# ---- a run to look at -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """Config, folder and trajectories by step of a scripted run whose page and report are written."""
    from scripted_run import make_run

    from imagent_jax.runs.view import write_view

    cfg, path, logged = make_run(tmp_path_factory.mktemp("runs"))
    write_view(path)
    return cfg, path, logged


@pytest.fixture(scope="module")
def browser():
    from scripted_run import chromium

    with chromium() as browser:
        yield browser


@pytest.fixture
def page(browser):
    """An empty page; it fails the test where a script or a request in it failed."""
    page = browser.new_page(viewport={"width": 1400, "height": 1000})
    page.set_default_timeout(120_000)  # the machine may be busy
    errors = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("requestfailed", lambda request: errors.append(request.url))
    yield page
    page.close()
    assert errors == []
