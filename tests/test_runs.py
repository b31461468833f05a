"""The folder of a run: what is logged where, what an earlier run leaves, and what other tools are told."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import tiny_config

from imagent_jax.config import Config
from imagent_jax.runs import folder as runs
from imagent_jax.runs.folder import RunFolder, checkpoint_folder, checksums, load_params
from imagent_jax.runs.reader import phases, read_run, step_of
from imagent_jax.runs.trackers import Trackers


def open_run(folder, name="run", **settings) -> RunFolder:
    return RunFolder(tiny_config({"run": {"dir": str(folder), "name": name, **settings}}))


def state(value: float):
    return {"w": jnp.full((3, 2), value), "b": jnp.arange(4) + value}, {"count": jnp.asarray(value)}


def zeros():
    return jax.tree.map(jnp.zeros_like, state(1.0))


# ---- the folder -------------------------------------------------------------------------------------------------------


def test_an_earlier_run_of_the_name_is_kept_under_the_next_number(tmp_path):
    for number in range(3):
        folder = open_run(tmp_path)
        folder.log({"step": number})
        folder.close()
        shutil.rmtree(folder.path / "checkpoints", ignore_errors=True)
    kept = {path.name: json.loads((path / "metrics.jsonl").read_text())["step"] for path in tmp_path.iterdir()}
    assert kept == {"run.1": 0, "run.2": 1, "run": 2}
    open_run(tmp_path, name="other").close()  # and one that logged nothing is written over
    open_run(tmp_path, name="other").close()
    assert {path.name for path in tmp_path.iterdir()} == {"run.1", "run.2", "run", "other"}


def test_every_record_is_written_at_once_and_history_is_of_the_training_steps(tmp_path):
    folder = open_run(tmp_path)
    assert folder.history() == []
    records = [{"step": 0, "base/accuracy": 0.5}, {"step": 1, "reward/total": 0.25}, {"step": 2, "reward/total": 0.5}]
    for n, record in enumerate(records, 1):
        folder.log(record)
        assert [json.loads(line) for line in (folder.path / "metrics.jsonl").read_text().splitlines()] == records[:n]
    assert folder.history() == records[1:]
    folder.log_trajectories(7, [{"a": 1}, {"a": 2}], "step")
    folder.log_trajectories(1234567, [{"a": 3}])
    written = {path.name: path.read_text() for path in (folder.path / "trajectories").iterdir()}
    assert written == {"step-000007.jsonl": '{"a": 1}\n{"a": 2}\n', "train-1234567.jsonl": '{"a": 3}\n'}
    folder.log_faults([])
    assert not (folder.path / "data_faults.txt").exists()
    folder.log_faults(["line 1: bad", "line 2: worse"])
    assert (folder.path / "data_faults.txt").read_text() == "line 1: bad\nline 2: worse\n"
    folder.close()


def test_only_the_writer_writes(tmp_path, monkeypatch):
    open_run(tmp_path).close()
    monkeypatch.setattr(runs.processes, "is_writer", lambda: False)
    folder = open_run(tmp_path, name="run", seed=3)
    folder.log({"step": 1})
    folder.log_faults(["bad"])
    folder.close()
    assert not (folder.path / "metrics.jsonl").exists() and not (folder.path / "data_faults.txt").exists()
    assert Config.from_yaml((folder.path / "config.yaml").read_text()).run.seed == 0


def test_resuming_needs_a_run_and_a_run_needs_resuming(tmp_path):
    with pytest.raises(ValueError, match=r"run.resume is on, but .*/none holds no checkpoints; check run.dir and run.name\."):
        open_run(tmp_path, name="none", resume=True)
    folder = open_run(tmp_path, checkpoint_dir=str(tmp_path / "disk"))
    folder.log({"step": 1})
    folder.save(1, *state(1.0), {})
    folder.close()
    with pytest.raises(ValueError, match=r"disk/run holds checkpoints of an earlier run; continue it with --run.resume true"):
        open_run(tmp_path, checkpoint_dir=str(tmp_path / "disk"))
    folder = open_run(tmp_path / "elsewhere", checkpoint_dir=str(tmp_path / "disk"), resume=True)
    assert folder.latest == 1 and (folder.path / "config.yaml").is_file() and (folder.path / "trajectories").is_dir()
    folder.close()


def test_checkpoints_are_in_the_run_in_a_folder_or_at_an_address(monkeypatch):
    run, home = Config().run, Path.home()
    monkeypatch.chdir("/")
    assert checkpoint_folder(run, Path("runs/tiny")) == "/runs/tiny/checkpoints"
    assert checkpoint_folder(replace(run, checkpoint_dir="~/disk", name="a"), Path("runs/a")) == f"{home}/disk/a"
    assert checkpoint_folder(replace(run, checkpoint_dir="disk", name="a"), Path("runs/a")) == "/disk/a"
    assert checkpoint_folder(replace(run, checkpoint_dir="gs://b/c//", name="a"), Path("runs/a")) == "gs://b/c/a"


# ---- checkpoints ------------------------------------------------------------------------------------------------------


def test_checksums_are_the_sums_of_the_words_of_each_array():
    rng = np.random.default_rng(0)
    tree = {"a": rng.normal(size=(4, 5)).astype(np.float32), "b": np.asarray([1, 2, 3], np.uint8), "c": jnp.ones(3, jnp.bfloat16)}
    words = [tree["a"].view(np.uint32), tree["b"], np.asarray(tree["c"]).view(np.uint16)]
    assert checksums(tree) == [int(w.astype(np.uint64).sum() % 2**32) for w in words]


def test_progress_and_state_come_back_as_they_were_saved(tmp_path):
    folder = open_run(tmp_path, seed=9)
    folder.log({"step": 1})
    logged = (folder.path / "metrics.jsonl").stat().st_size
    folder.save(1, *state(1.0), {"step": 1, "unlogged": None})
    folder.save(1, *state(8.0), {"step": 8})  # a step is saved once, also where it is still being written
    folder.log({"step": 2})
    params, opt_state, progress = folder.restore(*zeros())
    assert (progress["step"], progress["unlogged"], progress["seed"], progress["logged"]) == (1, None, 9, logged)
    assert progress["sums"] == {name: checksums(part) for name, part in zip(("params", "opt_state"), state(1.0), strict=True)}
    for a, b in zip(jax.tree.leaves((params, opt_state)), jax.tree.leaves(state(1.0)), strict=True):
        assert np.array_equal(a, b)
    assert folder.history() == [] and (folder.path / "metrics.jsonl").stat().st_size == logged
    folder.close()


@pytest.mark.parametrize(("newest", "best", "left"), [(1, 0, "6"), (3, 0, "4 5 6"), (1, 2, "2 5 6"), (2, 1, "2 5 6")])
def test_as_many_checkpoints_are_kept_as_asked_for(tmp_path, newest, best, left):
    folder = open_run(tmp_path, keep_checkpoints=newest, keep_best=best)
    for step, accuracy in enumerate([None, 0.9, 0.3, None, 0.4, None], 1):
        folder.save(step, *state(float(step)), {}, accuracy)
    folder.close()
    assert sorted(path.name for path in (folder.path / "checkpoints").iterdir()) == left.split()


def test_parameters_are_loaded_of_the_step_that_is_named(tmp_path):
    folder = open_run(tmp_path)
    with pytest.raises(ValueError, match=r"There are no checkpoints in .*nowhere; name the folder of a run"):
        load_params(str(tmp_path / "nowhere"), zeros()[0])
    with pytest.raises(ValueError, match=r"holds no finished checkpoint; there is none\."):
        load_params(folder.checkpoints, zeros()[0])
    for step in (2, 10):
        folder.save(step, *state(float(step)), {})
    folder.close()
    for asked, found in ((None, 10), (2, 2), (10, 10)):
        params, step = load_params(folder.checkpoints, zeros()[0], asked)
        assert step == found and np.array_equal(params["w"], np.full((3, 2), found))
    with pytest.raises(ValueError, match=r"holds no finished checkpoint 3; there are 2, 10\."):
        load_params(folder.checkpoints, zeros()[0], 3)


# ---- read back --------------------------------------------------------------------------------------------------------


def write(path: Path, *lines) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))


def test_a_run_is_read_back_in_the_order_of_its_steps(tmp_path):
    write(tmp_path / "config.yaml", "run: {name: a}")
    metrics = [{"step": 0, "base/accuracy": 0.1, "base/length": 3}, {"step": 1, "reward/total": 1},
               {"step": 2, "reward/total": 2, "eval/accuracy": 0.2}, {"step": 2, "final/accuracy": 0.3}]  # fmt: skip
    write(tmp_path / "metrics.jsonl", *metrics, '{"step": 3, "rew', {"no": "step"})
    for stem in ("trained-000002", "train-000002", "base-000000", "train-000010", "step-000002", "train-000001"):
        write(tmp_path / "trajectories" / f"{stem}.jsonl", {"images": [], "stem": stem}, {"older": 1})
    write(tmp_path / "trajectories" / "notes.jsonl", {"images": []})
    write(tmp_path / "data_faults.txt", "a", "b")
    run = read_run(tmp_path)
    assert run.config == {"run": {"name": "a"}} and run.metrics == metrics and run.faults == ["a", "b"] and run.path == tmp_path
    assert run.steps == metrics[1:3] and run.torn == 2 + 6
    assert list(run.trajectories) == ["base-000000", "train-000001", "train-000002", *[s for s in run.trajectories if s in (
        "step-000002", "trained-000002")], "train-000010"]  # fmt: skip
    assert all(records == [{"images": [], "stem": stem}] for stem, records in run.trajectories.items())
    assert run.evaluations == {"base": {"accuracy": 0.1, "length": 3}, "step 2": {"accuracy": 0.2}, "trained": {"accuracy": 0.3}}
    (tmp_path / "data_faults.txt").unlink()
    assert read_run(tmp_path).faults == []
    assert step_of("my-set-000012") == ("my-set", 12)


def test_phases_are_what_a_step_is_made_of():
    times = {"time/decode": 1.0, "time/judge": 2.0, "time/step": 3.0, "time/total": 4.0, "time/evaluation": 5.0}
    assert phases(times | {"eval/time/evaluation": 6.0, "loss": 7.0}) == {"decode": 1.0, "judge": 2.0}


def test_a_run_that_is_not_there_is_named_with_those_that_are(tmp_path):
    for name in ("b", "a"):
        write(tmp_path / name / "metrics.jsonl", {"step": 0})
    with pytest.raises(ValueError, match=rf"There is no run {tmp_path}/c; {tmp_path} has a, b\."):
        read_run(tmp_path / "c")
    with pytest.raises(ValueError, match=r"name the folder of a run, such as runs/tiny\."):
        read_run(tmp_path / "c" / "d")
    with pytest.raises(ValueError, match=r"a is not a run, it holds no config.yaml"):
        read_run(tmp_path / "a")


# ---- other tools ------------------------------------------------------------------------------------------------------


def test_what_a_resumed_run_logs_anew_takes_the_place_of_what_it_had_logged(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for first, value in ((1, 0.0), (3, 1.0)):
        trackers = Trackers(Config(), tmp_path)
        for step in range(first, first + 4):
            trackers.log({"step": step, "loss": value, "words": {"no": "number"}})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 0), (2, 0), (3, 1), (4, 1), (5, 1), (6, 1)]
    assert events.Tags()["scalars"] == ["loss"]


def test_weights_and_biases_gets_every_record_and_the_same_run_again(tmp_path, monkeypatch):
    calls = []
    stub = SimpleNamespace(
        init=lambda **about: calls.append(about) or SimpleNamespace(
            log=lambda values, step: calls.append((step, values)), finish=lambda: calls.append("end"))
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "wandb", stub)
    cfg = tiny_config({"run": {"wandb": "agents", "name": "one"}})
    for _ in range(2):
        trackers = Trackers(cfg, tmp_path)
        trackers.log({"step": 3, "accuracy": 0.5, "warnings": {"collapse": "…"}})
        trackers.close()
    first, (step, values), end, second = calls[:4]
    assert first == second and len(first["id"]) == 8 and first["resume"] == "allow" and first["dir"] == tmp_path
    assert (first["project"], first["name"], first["config"]) == ("agents", "one", cfg.to_dict())
    assert (step, values, end) == (3, {"accuracy": 0.5}, "end")
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match="pip install wandb"):
        Trackers(cfg, tmp_path)
