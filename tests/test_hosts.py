"""Several processes are one job: the same metrics as one process and one device, and none outlives another's death."""

import contextlib
import json
import re
import signal
import socket
import subprocess
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import simulated
from simulated import TOGETHER

from imagent_jax.config import DistributedConfig, load_config
from imagent_jax.data.pipeline import task_iterator
from imagent_jax.distributed import processes
from imagent_jax.distributed.processes import RESTART
from imagent_jax.rl.judge import grade
from imagent_jax.rl.rewards import reward_functions
from imagent_jax.rollout.batch import Refill
from imagent_jax.rollout.policy import Policy

JOB = [
    "--run.steps=2", "--rollout.groups=4", "--rollout.group_size=4", "--rollout.response_tokens=64", "--grpo.micro_groups=4",
    "--grpo.minibatches=1", "--grpo.length_buckets=1", "--images.pack_blocks=4", "--images.pages=2",
    "--eval.tasks=5", "--eval.groups=4", "--eval.every=0", "--data.train_size=64", "--data.test_size=32",
    "--tools.timeout_s=600", "--tools.patience_s=600", "--run.checkpoint_every=1",
]  # fmt: skip
LEAST = [  # a job of the fewest and smallest programs: the second process finds none of its own in the compile cache
    "--rollout.groups=2", "--rollout.group_size=2", "--rollout.response_tokens=32", "--grpo.micro_groups=2",
    "--images.pack_blocks=1", "--eval.tasks=2", "--eval.groups=2", "--rollout.refill=3",
]  # fmt: skip
MIXTURE = "{a: {name: tiny_world, tools: [visual_confirmation]}, b: {name: tiny_world, weight: 2, reward: {format: 0.5}}}"
TOWER = [  # everything learns; packs that do not divide over devices; tasks of two sources
    "--model.freeze_vision=false", "--images.pack_blocks=3", f"--data.mixture={MIXTURE}", "--data.curriculum=pass_rate",
]  # fmt: skip


def start(folder: Path, name: str, devices: int, *flags: str) -> subprocess.Popen:
    """The main job in a process of its own with `devices` simulated devices."""
    return simulated.start(devices, "-m", "imagent_jax.train", *JOB, f"--run.dir={folder}", f"--run.name={name}",
                           "--run.compile_cache=", f"--data.cache_dir={folder}/data", *flags)  # fmt: skip


def start_two(folder: Path, name: str, *flags: str, devices: int = 2, own=((), ())) -> list[subprocess.Popen]:
    """The job in two processes of so many devices on loopback; flags of `own` are for one of them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    both = [
        f"--distributed.coordinator=127.0.0.1:{port}", "--distributed.num_processes=2", "--distributed.heartbeat_s=10",
        "--mesh.fsdp=-1", *flags,
    ]  # fmt: skip
    return [start(folder, name, devices, *both, f"--distributed.process_id={i}", *own[i]) for i in range(2)]


def finish(processes: list[subprocess.Popen]) -> list[str]:
    """What they printed."""
    ends = [process.communicate(timeout=TOGETHER) for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), [end[-2000:] for _, end in ends]
    return [out for out, _ in ends]


def records(run: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    clock = "time/|compile/|memory/|per_second|rollout/live|vision/"  # each process decodes rows and encodes images of its own
    return [{k: v for k, v in line.items() if not re.search(clock, k)} for line in lines]


several = pytest.mark.slow(20)
"""Starts processes, about so many seconds each."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The job on one process of four devices, and on two of two. `test_mesh_training` compares devices with one device."""
    folder = tmp_path_factory.mktemp("hosts")
    out = finish([*start_two(folder, "two", *TOWER), start(folder, "four", 4, "--mesh.fsdp=4", *TOWER)])
    assert "trained: " in out[0] and "trained: " not in out[1]
    return folder


@several
def test_two_processes_give_the_metrics_of_one(folder):
    a, b = records(folder / "two"), records(folder / "four")
    assert [record["step"] for record in a] == [record["step"] for record in b] == [0, 1, 2, 2]
    assert all("reward/total" in record and record["loss"] != 0 for record in a[1:3])
    assert all(record["curriculum/measured"] and "source/b/reward" in record for record in a[1:3])
    for x, y in zip(a, b, strict=True):
        assert x.keys() == y.keys() and x.pop("warnings", None) == y.pop("warnings", None)
        for key in x:
            assert x[key] == pytest.approx(y[key], abs=1e-5, rel=1e-5), (x["step"], key)


@several
def test_trajectories_are_the_same_wherever_they_run(folder):
    for name in ("train-000001", "train-000002"):
        two, one = (
            [json.loads(line) for line in (folder / run / f"trajectories/{name}.jsonl").read_text().splitlines()]
            for run in ("two", "four")
        )
        assert len(two) == 8 and len(one) == 16  # the first process writes those whose images it has
        for a, b in zip(two, one, strict=False):
            assert a["tokens"]["ids"] == b["tokens"]["ids"] and a["images"] == b["images"]


@several
def test_two_processes_resume_what_one_began_and_one_what_two_did(folder):
    """Each continues the other's checkpoint for a step."""
    on = "--run.resume=true", "--run.steps=3", *TOWER
    finish([*start_two(folder, "four", *on), start(folder, "two", 1, *on)])
    a, b = records(folder / "two"), records(folder / "four")
    assert [record["step"] for record in a] == [record["step"] for record in b] == [0, 1, 2, 3, 3]
    assert a[3]["reward/total"] == pytest.approx(b[3]["reward/total"], abs=1e-4)


def underway(folder: Path, steps: int = 1) -> list[subprocess.Popen]:
    """Two processes that have measured the base and made so many steps of very many."""
    processes = start_two(folder, "cut", "--run.steps=500", *LEAST, devices=1)
    path, deadline = folder / "cut/metrics.jsonl", time.time() + TOGETHER
    while not (path.exists() and len(path.read_text().splitlines()) > steps) and time.time() < deadline:
        time.sleep(0.2)
    assert path.exists(), processes[0].communicate()[1][-2000:]
    return processes


def assert_refilled_by_shares(run: Path) -> None:
    """The first step is what each process alone makes of its share: one task and one spare, and one task and two spares."""
    cfg = load_config(run / "config.yaml")
    policy = Policy(cfg.changed({"mesh.fsdp": 1}))
    fresh, _ = task_iterator(policy.open_tasks("train"), 2, seed=0).draw(5)
    grading, alone = partial(grade, cfg, reward_functions(cfg.reward)), []
    for tasks, spares in ((fresh[:1], fresh[2:3]), (fresh[1:2], fresh[3:])):
        how = {"group_size": 2, "seed": 0, "temperature": cfg.rollout.temperature, "refill": Refill(spares, grading)}
        alone.append(policy.collector.collect(policy.params, tasks, **how))
    first, logged = records(run)[1], (run / "trajectories/train-000001.jsonl").read_text().splitlines()
    own = alone[0].trajectories[0]
    assert [(r["task"], r["length"]) for r in map(json.loads, logged)] == [(t.task.uid, len(t.ids)) for t in own]
    assert first["groups/refilled"] == sum(len(part.replaced) for part in alone) > 0
    totals = [score["total"] for part in alone for score in part.grades[0]]
    assert first["reward/total"] == pytest.approx(np.mean(totals))
    everyone = [t for part in alone for group in [*part.trajectories, *part.replaced] for t in group]
    assert first["length"] == pytest.approx(np.mean([len(t.ids) for t in everyone]))


@several
def test_sigterm_to_one_process_saves_and_stops_all(tmp_path):
    processes = underway(tmp_path)
    processes[1].send_signal(signal.SIGTERM)
    errors = [process.communicate(timeout=TOGETHER)[1] for process in processes]
    assert [process.returncode for process in processes] == [RESTART, RESTART], errors
    last = records(tmp_path / "cut")[-1]["step"]
    assert_refilled_by_shares(tmp_path / "cut")
    assert (tmp_path / f"cut/checkpoints/{last}").is_dir() and "ended before its time" not in "".join(errors)


@several
@pytest.mark.parametrize(
    ("victim", "steps", "named"), [(1, 0, r"unhealthy[^\n]*:\n1\n"), (0, 1, "leader task was preempted/died")]
)
def test_the_death_of_a_process_ends_the_others_with_its_name(tmp_path, victim, steps, named):
    processes = underway(tmp_path, steps)
    processes[victim].send_signal(signal.SIGKILL)
    _, error = processes[1 - victim].communicate(timeout=60)
    assert processes[1 - victim].returncode == -signal.SIGABRT and re.search(named, error), error[-3000:]
    processes[victim].communicate()


@pytest.mark.parametrize(
    ("settings", "env", "asked"),
    [
        ({}, {}, None),
        ({}, {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, None),
        ({}, {"SLURM_NTASKS": "2", "SLURM_PROCID": "0"}, (None, None, None)),
        ({}, {"OMPI_COMM_WORLD_SIZE": "2"}, (None, None, None)),
        ({"coordinator": "a:1", "num_processes": 2, "process_id": 1}, {}, ("a:1", 2, 1)),
    ],
)
def test_processes_are_joined_where_settings_or_the_cluster_say_so(monkeypatch, settings, env, asked):
    found = []
    for name in ("SLURM_NTASKS", "SLURM_PROCID", "OMPI_COMM_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(jax.distributed, "initialize", lambda **named: found.append(named))
    assert processes.start(DistributedConfig(**settings)) is None  # jax still has one process
    named = [tuple(call[name] for name in ("coordinator_address", "num_processes", "process_id")) for call in found]
    assert named == ([] if asked is None else [asked])


def test_processes_that_do_not_find_each_other_are_one_sentence(monkeypatch):
    def initialize(**_):
        raise RuntimeError("DEADLINE_EXCEEDED:\n nobody there")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    with pytest.raises(ValueError, match="did not find each other .*nobody there.*give every process the same distributed.coord"):
        processes.start(DistributedConfig(coordinator="a:1", num_processes=2, process_id=1))


@pytest.mark.parametrize("count", [1, 3, 4])
@pytest.mark.parametrize("items", [0, 1, 4, 10])
def test_work_is_shared_out_in_one_piece_each_and_evenly(monkeypatch, count, items):
    monkeypatch.setattr(jax, "process_count", lambda: count)
    shares = []
    for process in range(count):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        shares.append(processes.share(list(range(items))))
        assert processes.is_writer() == (process == 0)
    assert sum(shares, []) == list(range(items))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize(
    ("owners", "tensor", "refused"),
    [
        ([0, 0, 0, 0, 1, 1, 1, 1], 2, None),
        ([1, 1, 1, 1, 0, 0, 0, 0], 4, None),
        ([0, 0, 0, 0, 1, 1, 1, 1], 8, "mesh.tensor=8 reaches over processes of 4 devices"),
        ([0, 1, 0, 1, 0, 1, 0, 1], 1, "reaches over processes"),
        ([0, 0, 0, 0, 1, 1], 1, "The mesh has 6 of the 8 devices of 2 processes"),
    ],
)
def test_a_mesh_gives_each_process_its_own_block(monkeypatch, owners, tensor, refused):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "device_count", lambda: 8)
    devices = np.array([SimpleNamespace(process_index=owner) for owner in owners])
    mesh = SimpleNamespace(size=len(owners), devices=devices.reshape(1, -1, tensor), shape={"tensor": tensor})
    with pytest.raises(ValueError, match=refused) if refused else contextlib.nullcontext():
        processes.check_mesh(mesh)
    if not refused:
        assert [[device.process_index for device in block] for block in processes._blocks(mesh)] == [owners[:4], owners[4:]]


@several
def test_a_mesh_that_leaves_a_process_out_is_refused(tmp_path):
    processes = start_two(tmp_path, "refused", "--mesh.fsdp=1")
    errors = [process.communicate(timeout=TOGETHER)[1] for process in processes]
    assert [process.returncode for process in processes] == [2, 2], errors
    assert all("The mesh has 1 of the 4 devices of 2 processes; set mesh.data or mesh.fsdp to -1" in e for e in errors)


@several
@pytest.mark.parametrize("fails", [0, 1])
def test_a_process_that_fails_with_a_sentence_ends_the_others(tmp_path, fails):
    own = [(), ()]
    own[fails] = ("--model.path=nowhere",)
    processes = start_two(tmp_path, "alone", *LEAST, devices=1, own=own)
    errors = [process.communicate(timeout=TOGETHER)[1] for process in processes]
    assert processes[fails].returncode == 2 and "nowhere" in errors[fails] and "Traceback" not in errors[fails], errors
    assert processes[1 - fails].returncode == -signal.SIGABRT, errors
