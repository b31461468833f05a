"""Caches and iterators: written once and whole, read at random, resumed exactly, no TensorFlow."""

import collections.abc
import dataclasses
import importlib.resources
import json
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from imagent_jax.config import DataConfig
from imagent_jax.data.pipeline import open_tasks, task_iterator
from imagent_jax.tiny import builder as tiny_world_builder
from imagent_jax.tiny import world as tiny_world
from imagent_jax.types import Task


@pytest.fixture(scope="module")
def cfg(tmp_path_factory):
    return DataConfig("tiny_world", cache_dir=str(tmp_path_factory.mktemp("cache")), train_size=50, test_size=8, seed=11)


def _uids(iterator, batches):
    return [[task.uid for task in next(iterator)] for _ in range(batches)]


def test_the_cache_holds_the_generated_tasks_in_order(cfg):
    train, test = open_tasks(cfg, "train"), open_tasks(cfg, "test")
    assert (len(train), len(test)) == (50, 8)
    for index in (0, 17, 49, -1):
        assert train[index] == tiny_world.task_at(11, "train", index % 50)
    assert list(test) == [tiny_world.task_at(11, "test", index) for index in range(8)]
    assert [task.uid for task in train[3:5]] == ["tiny_world/train/11/3", "tiny_world/train/11/4"]
    assert train.faults == ()
    for index in (50, -51):
        with pytest.raises(IndexError, match=f"There is no task {index} among 50"):
            train[index]
    assert train[-50] == train[0] and [task.uid for task in train[48:]] == [train[48].uid, train[49].uid]


def test_the_cache_is_array_record_written_once(cfg, monkeypatch):
    open_tasks(cfg, "train")
    folder = tiny_world_builder.prepare(cfg.cache_dir, {"train": 50, "test": 8}, 11)
    assert any(".array_record" in file.name for file in folder.iterdir())
    assert [file.name for file in folder.parent.parent.iterdir()] == ["tiny_world"]  # and nothing else
    assert [file.name for file in folder.parents[2].iterdir()] == [tiny_world_builder.version_hash({"train": 50, "test": 8}, 11)]
    monkeypatch.setattr(tiny_world_builder, "_write", None)
    assert len(open_tasks(cfg, "train")) == 50


def test_a_process_that_comes_second_reads_what_the_first_has_written(tmp_path, monkeypatch):
    real, homes = tiny_world_builder._write, []

    def beaten(folder, sizes, seed):
        real(folder, sizes, seed)
        final = folder.parent / tiny_world_builder.version_hash(sizes, seed)
        shutil.copytree(folder, final)
        homes.append(folder)

    monkeypatch.setattr(tiny_world_builder, "_write", beaten)
    monkeypatch.setenv("HOME", str(tmp_path))
    cfg = DataConfig("tiny_world", cache_dir="~/cache", train_size=2, test_size=1, seed=4)
    assert open_tasks(cfg, "train")[1] == tiny_world.task_at(4, "train", 1)
    assert len(homes) == 1 and homes[0].is_relative_to(tmp_path / "cache") and not homes[0].exists()


def test_other_settings_use_another_folder():
    settings = [((4, 2), 0), ((5, 2), 0), ((4, 3), 0), ((2, 4), 0), ((4, 2), 1)]
    hashes = [tiny_world_builder.version_hash({"train": a, "test": b}, seed) for (a, b), seed in settings]
    assert len(set(hashes)) == 5
    assert tiny_world_builder.version_hash({"test": 2, "train": 4}, 0) == hashes[0]


def test_another_version_of_the_world_uses_another_folder(tmp_path, monkeypatch):
    """A change of the code that draws tasks or of any of its assets."""
    copy = shutil.copytree(Path(tiny_world.__file__).parent, tmp_path / "data")
    monkeypatch.setattr(importlib.resources, "files", lambda package: copy)
    hashes = {tiny_world_builder.version_hash({"train": 1}, 0)}
    named = ("world.py", "builder.py", "assets/world/digits.npz")
    changed = [*(copy / name for name in named), *(copy / "assets/world/photos").iterdir()]
    for file in changed:
        file.write_bytes(file.read_bytes() + b"\n")
        hashes.add(tiny_world_builder.version_hash({"train": 1}, 0))
    assert len(hashes) == 1 + len(changed) == 18


def test_a_write_that_is_cut_short_leaves_nothing_to_be_used(tmp_path, monkeypatch):
    cfg = DataConfig("tiny_world", cache_dir=str(tmp_path), train_size=5, test_size=2)
    real, calls = tiny_world.task_at, []

    def cut_short(seed, split, index):
        calls.append(index)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(seed, split, index)

    monkeypatch.setattr(tiny_world, "task_at", cut_short)
    with pytest.raises(KeyboardInterrupt):
        open_tasks(cfg, "train")
    assert list((tmp_path / "tiny_world").iterdir()) == []
    monkeypatch.setattr(tiny_world, "task_at", real)
    assert len(open_tasks(cfg, "train")) == 5


def test_a_folder_left_by_a_killed_process_is_never_read(tmp_path):
    sizes = {"train": 3, "test": 2}
    left = tmp_path / "tiny_world" / f".{tiny_world_builder.version_hash(sizes, 0)}-killed" / "tiny_world"
    left.mkdir(parents=True)
    (left / "garbage").write_bytes(b"half")
    assert len(open_tasks(DataConfig("tiny_world", cache_dir=str(tmp_path), train_size=3, test_size=2), "test")) == 2


def test_an_epoch_holds_every_task_once_and_the_next_is_shuffled_anew(cfg):
    tasks = open_tasks(cfg, "train")
    series = sum(_uids(task_iterator(tasks, 10, seed=1), 10), [])
    first, second = series[:50], series[50:]
    assert sorted(first) == sorted(second) == sorted(task.uid for task in tasks)
    assert first != second and first != [task.uid for task in tasks]
    across = sum(_uids(task_iterator(tasks, 8, seed=1), 25), [])  # batches that reach over the end of an epoch
    assert across[:100] == series
    for epoch in range(4):
        assert sorted(across[50 * epoch : 50 * epoch + 50]) == sorted(first)


class _Counted(collections.abc.Sequence):
    """Tasks named by their number; counts what is read, and how many read at once."""

    def __init__(self):
        self.read, self.most, self.now, self.lock, self.meet = 0, 0, 0, threading.Lock(), None

    def __len__(self):
        return 1000

    def __getitem__(self, index):
        with self.lock:
            self.read, self.now = self.read + 1, self.now + 1
            self.most = max(self.most, self.now)
        if self.meet:
            self.meet.wait(timeout=30)
        time.sleep(0.002)
        with self.lock:
            self.now -= 1
        return Task(str(index), "", (), "")


@pytest.mark.parametrize("threads", [1, 3])
def test_as_many_threads_read_as_are_asked_for(threads):
    tasks = _Counted()
    iterator = task_iterator(tasks, 1, seed=0, prefetch=6, threads=threads)
    tasks.meet = threading.Barrier(threads)  # from here on, a thread alone goes no further
    assert len({next(iterator)[0].uid for _ in range(30)}) == 30
    assert tasks.most == threads


def test_as_many_batches_are_read_ahead_as_are_asked_for():
    for prefetch in (2, 5):
        tasks = _Counted()
        iterator = task_iterator(tasks, 4, seed=0, prefetch=prefetch)
        tasks.read = 0
        next(iterator)
        while tasks.read < 4 * (prefetch + 1):  # the batch, and those ahead
            time.sleep(0.01)
        time.sleep(0.1)
        assert tasks.read == 4 * (prefetch + 1)


def test_the_series_is_a_function_of_the_seed(cfg):
    tasks = open_tasks(cfg, "train")
    assert _uids(task_iterator(tasks, 7, seed=1), 9) == _uids(task_iterator(tasks, 7, seed=1, threads=1, prefetch=1), 9)
    assert _uids(task_iterator(tasks, 7, seed=1), 2) != _uids(task_iterator(tasks, 7, seed=2), 2)


def test_an_iterator_resumes_where_its_state_was_taken(cfg):
    tasks = open_tasks(cfg, "train")
    iterator = task_iterator(tasks, 8, seed=-3)
    for batches in (0, 3, 9):  # at the start, within an epoch, across its end
        _uids(iterator, batches)
        state = json.loads(json.dumps(iterator.get_state()))
        following = [next(iterator) for _ in range(5)]
        resumed = task_iterator(tasks, 8, seed=-3)
        resumed.set_state(state)
        assert [next(resumed) for _ in range(5)] == following


@pytest.mark.slow(3)
def test_tensorflow_and_torch_are_never_imported(tmp_path):
    code = f"""
import sys
from imagent_jax.config import DataConfig
from imagent_jax.data.pipeline import open_tasks, task_iterator
tasks = open_tasks(DataConfig("tiny_world", cache_dir={str(tmp_path)!r}, train_size=3, test_size=1), "train")
print(len(next(task_iterator(tasks, 4, seed=0))), {{"tensorflow", "torch"}} & set(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout == "4 set()\n", done.stderr


@pytest.mark.parametrize(
    ("changes", "split", "message"),
    [
        ({}, "valid", "There is no split 'valid'; use one of train, test."),
        ({"name": "imagenet"}, "train", "There is no data set 'imagenet'; set data.name to one of tiny_world, tiny_code, "),
        ({"path": "mine"}, "train", "data.name is 'tiny_world', which does not read mine; set data.name to files, or unset"),
        ({"train_size": 0}, "train", "split 'train' needs a task at least; set data.train_size above 0"),
        ({"test_size": 0}, "train", "split 'test' needs a task at least; set data.test_size above 0"),
        ({"cache_dir": "/dev/null/x"}, "train", "cannot be written .*; set data.cache_dir."),
    ],
)
def test_bad_settings_are_refused_in_one_sentence(changes, split, message):
    with pytest.raises(ValueError, match=message):
        open_tasks(DataConfig(**{"name": "tiny_world"} | changes), split)


def test_an_unreadable_cache_is_named(tmp_path):
    cfg = DataConfig("tiny_world", cache_dir=str(tmp_path), train_size=2, test_size=1)
    folder = tiny_world_builder.prepare(tmp_path, {"train": 2, "test": 1}, 0)
    (folder / "dataset_info.json").unlink()
    with pytest.raises(ValueError, match="cannot be read; delete it and start again"):
        open_tasks(cfg, "train")


def test_an_iterator_needs_tasks_and_a_batch(cfg):
    with pytest.raises(ValueError, match="at least one task; got 0"):
        task_iterator(open_tasks(cfg, "test"), 0, seed=0)
    with pytest.raises(ValueError, match="no tasks to iterate over"):
        task_iterator([], 2, seed=0)


def test_images_in_a_fixed_order_are_of_training_alone(cfg):
    fixed = dataclasses.replace(cfg, permute_images=False)
    plain, ordered = open_tasks(cfg, "train"), open_tasks(fixed, "train")
    assert [task.uid for task in plain] == [task.uid for task in ordered]
    assert any(a.images != b.images for a, b in zip(plain, ordered, strict=True))
    assert all(task.answer == "Image 1" for task in ordered if task.answer_type == "choice")
    assert list(open_tasks(cfg, "test")) == list(open_tasks(fixed, "test"))
