"""Runs survive: killed and resumed to the same bits, whatever is half-written, full or damaged is one clear sentence."""

import errno
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import tiny_config

from imagent_jax import train
from imagent_jax.config import Config
from imagent_jax.runs import folder as runs
from imagent_jax.runs import lock
from imagent_jax.runs.folder import RunFolder, checkpoint_folder

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))
import survival

# ---- the main job ---------------------------------------------------------------------------------------------------


@pytest.mark.slow(44)
def test_a_run_killed_twice_and_stopped_once_ends_with_the_bits_of_one_that_was_not(tmp_path):
    flags = ["--run.steps=12", "--run.compile_cache=", f"--data.cache_dir={tmp_path}/data"]
    log = tmp_path / "whole.log"
    whole = threading.Thread(target=lambda: survival.finish(survival.start(tmp_path, "whole", log, *flags), log))
    whole.start()
    strikes = survival.survive(tmp_path, "struck", [signal.SIGKILL, signal.SIGTERM, signal.SIGKILL], 5, 4.0, 0.3, *flags)
    whole.join()
    assert [strike["code"] for strike in strikes] == [-signal.SIGKILL, train.RESTART, -signal.SIGKILL]
    assert sum(strike["steps_done"] > 0 for strike in strikes) >= 2
    assert survival.differences(tmp_path / "whole", tmp_path / "struck") == []
    steps = [record["step"] for record in survival.records(tmp_path / "struck")]
    assert steps == [*range(13), 12]  # base, steps, the final evaluation


def test_the_comparison_sees_one_bit(tmp_path):
    for name, value in (("a", 1.0), ("b", np.nextafter(1.0, 2.0))):
        folder = open_run(tmp_path, name)
        folder.log({"step": 3, "loss": 0.5})
        folder.save(3, {"w": jnp.full(4, value, jnp.float32)}, {"m": jnp.zeros(2)}, {})
        folder.close()
        (folder.path / "model").mkdir()
        (folder.path / "model/model.safetensors").write_bytes(b"same")
    assert survival.differences(tmp_path / "a", tmp_path / "a") == []
    assert survival.differences(tmp_path / "a", tmp_path / "b") == []  # the bit is not in float32
    folder = open_run(tmp_path, "c")
    folder.log({"step": 3, "loss": float(np.nextafter(0.5, 1.0))})
    folder.save(3, {"w": jnp.full(4, np.nextafter(np.float32(1), np.float32(2)))}, {"m": jnp.zeros(2)}, {})
    folder.close()
    shutil.copytree(tmp_path / "a/model", tmp_path / "c/model")
    assert len(survival.differences(tmp_path / "a", tmp_path / "c")) == 2


# ---- checkpoints ----------------------------------------------------------------------------------------------------


def open_run(tmp_path, name="run", **settings) -> RunFolder:
    return RunFolder(tiny_config({"run": {"dir": str(tmp_path), "name": name, **settings}}))


def state(value: int):
    """Parameters and optimizer state of a step."""
    key = jax.random.key(value)
    return {"w": jax.random.normal(key, (300, 100)), "b": jnp.full(7, value, jnp.bfloat16)}, {"count": jnp.asarray(value)}


def like():
    return jax.tree.map(jnp.zeros_like, state(0))


def same(a, b) -> bool:
    return all(np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True))


@pytest.fixture
def two(tmp_path):
    """The folder of a run with checkpoints 1 and 2."""
    folder = open_run(tmp_path)
    for step in (1, 2):
        folder.log({"step": step})
        folder.save(step, *state(step), {"step": step})
    folder.close()
    return tmp_path


def arrays_file(path: Path) -> Path:
    """The file that holds the arrays of a checkpoint."""
    return max((file for file in path.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)


def test_what_is_saved_may_change_at_once(tmp_path):
    folder, (params, opt_state) = open_run(tmp_path), state(1)
    update = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    for step in range(1, 6):
        folder.save(step, params, opt_state, {"step": step})
        kept = jax.tree.map(np.array, params)
        params = update(params)
        folder.settle()
        assert same(folder.restore(*like())[0], kept) and not same(params, kept)
    folder.close()


def test_the_newest_and_the_best_are_kept(tmp_path):
    folder = open_run(tmp_path, keep_checkpoints=2, keep_best=1)
    for step, accuracy in enumerate([0.2, 0.9, 0.3, None, 0.4, None], 1):
        folder.save(step, *state(step), {}, accuracy)
    folder.close()
    assert {path.name for path in (tmp_path / "run/checkpoints").iterdir()} == {"2", "5", "6"}


def test_metrics_go_back_to_where_the_checkpoint_was_made(two):
    metrics = two / "run/metrics.jsonl"
    whole = metrics.read_text()
    metrics.write_text(whole + '{"step": 3}\n{"step": 4, "los')
    folder = open_run(two, resume=True)
    assert folder.restore(*like())[2]["step"] == 2 and metrics.read_text() == whole
    folder.close()


def test_a_half_written_checkpoint_is_none(two):
    """As a killed process leaves it: under its working name, or nothing but that."""
    path = two / "run/checkpoints"
    shutil.copytree(path / "2", path / "3.orbax-checkpoint-tmp")
    arrays_file(path / "3.orbax-checkpoint-tmp").unlink()
    folder = open_run(two, resume=True)
    assert same(folder.restore(*like())[:2], state(2))
    folder.close()
    assert sorted(p.name for p in path.iterdir()) == ["1", "2"]


def test_a_run_killed_before_its_first_checkpoint_starts_again(tmp_path):
    folder = open_run(tmp_path)
    folder.log({"step": 0})
    folder.close()
    folder = open_run(tmp_path, resume=True)
    assert folder.restore(*like()) is None and not (tmp_path / "run/metrics.jsonl").exists()
    assert (tmp_path / "run/metrics.jsonl.before").exists()
    folder.close()


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: flip(arrays_file(path)),
        lambda path: arrays_file(path).write_bytes(arrays_file(path).read_bytes()[:1000]),
        lambda path: arrays_file(path).unlink(),
        lambda path: next(path.rglob("_METADATA")).unlink(),
        lambda path: (path / "_CHECKPOINT_METADATA").unlink(),
        lambda path: (path / "_CHECKPOINT_METADATA").write_text(
            (path / "_CHECKPOINT_METADATA").read_text().replace('"step": 2', '"step": 3')),
    ],
    ids=["flipped", "cut", "gone", "no metadata", "no progress", "other progress"],
)  # fmt: skip
def test_a_damaged_checkpoint_is_one_sentence_and_the_one_before_is_whole(two, damage):
    path = two / "run/checkpoints"
    damage(path / "2")
    folder = open_run(two, resume=True)
    with pytest.raises(ValueError, match=r"Checkpoint 2 in .* is damaged \(.*\); delete .*/2 to use checkpoint 1\.") as error:
        folder.restore(*like())
    assert "\n" not in str(error.value)
    folder.close()
    shutil.rmtree(path / "2")
    folder = open_run(two, resume=True)
    assert same(folder.restore(*like())[:2], state(1))
    folder.close()


def test_a_full_disk_is_one_sentence_and_leaves_the_checkpoint_before(two):
    """Files may not grow over 20 kB, which the arrays do."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limit[1]))
    unwritten = pytest.raises(ValueError, match="Checkpoint 3 could not be written to .*; checkpoint 2 is whole")
    try:
        with unwritten as error, open_run(two, resume=True) as folder:
            folder.save(3, *state(3), {"step": 3})
            folder.settle()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert "\n" not in str(error.value) and "File too large" in str(error.value)
    folder = open_run(two, resume=True)
    assert same(folder.restore(*like())[:2], state(2))
    folder.save(3, *state(3), {"step": 3})
    assert same(folder.restore(*like())[:2], state(3))
    folder.close()


def test_an_error_waits_for_the_checkpoint_being_written(tmp_path):
    params = {"w": jnp.zeros((3000, 3000))}  # large enough to be still on its way
    with pytest.raises(ValueError, match="^a fault$"), open_run(tmp_path) as folder:
        folder.save(1, params, {}, {"step": 1})
        raise ValueError("a fault")
    assert (tmp_path / "run/checkpoints/1").is_dir()
    with open_run(tmp_path, resume=True) as folder:
        assert folder.restore(params, {})[2]["step"] == 1


def test_an_error_says_too_that_the_checkpoint_was_not_written(two):
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limit[1]))
    try:
        with pytest.raises(ValueError, match="^a fault") as error, open_run(two, resume=True) as folder:
            folder.save(3, *state(3), {"step": 3})
            raise ValueError("a fault")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    (note,) = error.value.__notes__
    assert note.startswith("Checkpoint 3 could not be written") and "checkpoint 2 is whole" in note


FAILING = """
import sys
import jax.numpy as jnp
from imagent_jax import train
def failing(run):
    run.folder.save(1, {"w": jnp.zeros((4000, 4000))}, {}, {"step": 1})
    raise OSError("No space left on device: metrics.jsonl")
train._train = failing
sys.exit(train.main(sys.argv[1:]))
"""


@pytest.mark.slow(12)
def test_a_run_that_fails_keeps_its_checkpoint_and_says_one_sentence(tmp_path):
    command = [sys.executable, "-c", FAILING, f"--run.dir={tmp_path}", "--run.name=run", "--run.compile_cache="]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 2 and ended.stderr == "error: No space left on device: metrics.jsonl\n"
    assert (tmp_path / "run/checkpoints/1").is_dir()


# ---- one writer -----------------------------------------------------------------------------------------------------

HOLDER = """
import sys, time
from imagent_jax.runs.folder import RunFolder
from imagent_jax.config import Config
folder = RunFolder(Config.from_dict({"run": {"dir": sys.argv[1], "name": "run"}}))
folder.log({"step": 0})
print("holds", flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("resume", [False, True])
def test_the_same_command_twice_leaves_the_live_run_alone(tmp_path, resume):
    """A second start is refused, by name of the first; once that is dead, however it died, it is not."""
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "holds\n"
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    name = rf"/run is being written by process {holder.pid} on {socket.gethostname()}; wait for it, stop it, or choose another"
    with pytest.raises(ValueError, match=name):
        open_run(tmp_path, resume=resume)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    holder.kill()
    holder.wait()
    open_run(tmp_path, resume=resume).close()
    assert (tmp_path / "run.1").exists() != resume


def test_a_file_system_without_locks_forbids_no_run(tmp_path, monkeypatch):
    """As some network file systems answer; a lock that is held answers otherwise."""

    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock.fcntl, "flock", flock)
    with open_run(tmp_path) as folder:
        folder.log({"step": 0})
    assert (tmp_path / "run/metrics.jsonl").is_file()


def test_a_folder_is_free_again_after_its_run_failed_or_was_refused(tmp_path):
    elsewhere = {"checkpoint_dir": str(tmp_path / "disk")}
    with open_run(tmp_path, **elsewhere) as folder:
        folder.save(1, *state(1), {})
    with pytest.raises(ValueError, match="holds checkpoints of an earlier run") as refused:  # the error keeps what was opened
        open_run(tmp_path, **elsewhere)
    with pytest.raises(ValueError, match="a fault") as failed, open_run(tmp_path, resume=True, **elsewhere):
        raise ValueError("a fault")
    open_run(tmp_path, resume=True, **elsewhere).close()
    assert refused.value and failed.value


@pytest.mark.parametrize(
    ("settings", "change", "sentence"),
    [
        ({}, lambda p: p | {"w": jnp.zeros((300, 99))}, r"does not fit .* it has \[\(300, 100\)\] where \[\(300, 99\)\] are"),
        ({}, lambda p: p | {"more": jnp.zeros(1)}, r"does not fit .* of params it has \[\] where \[\(1,\)\] are wanted"),
        ({"seed": 7}, lambda p: p, "run.seed is 7, but the run to resume has 0"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(two, settings, change, sentence):
    folder = open_run(two, resume=True, **settings)
    params, opt_state = like()
    with pytest.raises(ValueError, match=sentence):
        folder.restore(change(params), opt_state)
    folder.close()


def test_addresses_of_buckets_reach_tensorstore_as_they_are(tmp_path, monkeypatch):
    found = []

    def checkpointer(directory, **_):
        found.append(directory)
        raise OSError("no network here")

    monkeypatch.setattr(runs.ocp.training, "Checkpointer", checkpointer)
    with pytest.raises(ValueError, match=r"The checkpoints in gs://bucket/a b/run cannot be read \(no network here\); delete"):
        open_run(tmp_path, checkpoint_dir="gs://bucket/a b/")
    assert found == ["gs://bucket/a b/run"]


def test_checkpoints_elsewhere_are_found_again_and_not_overwritten(tmp_path):
    elsewhere = {"checkpoint_dir": str(tmp_path / "disk")}
    folder = open_run(tmp_path, **elsewhere)
    folder.save(1, *state(1), {})
    folder.close()
    shutil.rmtree(tmp_path / "run")  # the machine's own disk is gone
    with pytest.raises(ValueError, match="holds checkpoints of an earlier run"):
        open_run(tmp_path, **elsewhere)
    folder = open_run(tmp_path, resume=True, **elsewhere)
    assert same(folder.restore(*like())[:2], state(1))
    folder.close()
    assert checkpoint_folder(Config().run, Path("/r/tiny")) == "/r/tiny/checkpoints"
