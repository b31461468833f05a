"""The main job: what it writes, that it learns, that it resumes bit for bit, and that bad input is one sentence."""

import contextlib
import gzip
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import yaml

from imagent_jax import train as job
from imagent_jax.config import Config, read_args
from imagent_jax.model import checkpoint
from imagent_jax.rl.rollout import RolloutEngine
from imagent_jax.run_log import phases
from imagent_jax.trackers import Trackers

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))
import endurance

SMALL = [
    "--run.compile_cache=", "--rollout.groups=4", "--rollout.group_size=4", "--grpo.micro_groups=2", "--grpo.minibatches=1",
    "--grpo.widths=2", "--eval.tasks=8", "--eval.during=8", "--eval.groups=8", "--data.train_size=64", "--data.test_size=32",
]  # fmt: skip


def run(folder, *flags):
    return job.main([*SMALL, f"--run.dir={folder}", f"--data.cache_dir={folder}/data", *flags])


def metrics(folder, name):
    return [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run of four steps, checkpoints every two."""
    folder = tmp_path_factory.mktemp("runs")
    assert run(folder, "--run.name=whole", "--run.steps=4", "--run.checkpoint_every=2", "--eval.every=2") == 0
    return folder


def test_a_run_leaves_the_promised_folder(whole):
    path = whole / "whole"
    assert Config.from_yaml((path / "config.yaml").read_text()).run.steps == 4
    records = metrics(whole, "whole")
    steps = [r for r in records if "reward/total" in r]
    assert [r["step"] for r in steps] == [1, 2, 3, 4] and "eval/accuracy" in steps[1]
    keys = {"reward/answer", "reward/tool_gain", "tools/executed_rate", "mask/dropped_tokens", "time/train", "time/decode",
            "compile/count", "entropy", "clip/high", "groups/flat", "grad_norm"}  # fmt: skip
    assert keys <= steps[0].keys() and "base/accuracy" in records[0] and "final/accuracy" in records[-1]
    trajectory = json.loads((path / "trajectories" / "train-000001.jsonl").read_text().splitlines()[0])
    assert trajectory["turns"][0]["text"] and trajectory["end"] in ("ANSWERED", "TRUNCATED", "OVER_TURNS", "VOID", "REPEATED")
    tokens, image = trajectory["tokens"], path / "trajectories" / "images" / trajectory["images"][0]["file"]
    assert len(tokens["ids"]) == len(tokens["kept"]) == len(tokens["logprob"]) and image.is_file()
    assert "of held-out tasks right, with" in (path / "report.html").read_text()
    model, _ = checkpoint.load(path / "model")
    assert model.cfg.text.num_layers == 4


def test_nothing_compiles_after_the_first_steps(whole):
    steps = [r for r in metrics(whole, "whole") if "reward/total" in r]
    assert steps[0]["compile/count"] > 0 and steps[2]["compile/count"] == 0 and steps[3]["compile/count"] == 0


def test_fifteen_steps_over_random_sizes_counts_and_turns_compile_nothing(tmp_path, monkeypatch):
    """The short form of benchmarks/endurance.py: 75 tasks of 1 to 8 images, rollouts of 0 to 6 calls."""
    monkeypatch.setattr(RolloutEngine, "end_turn", RolloutEngine.end_turn)  # which the script replaces
    steps, images, calls = endurance.run(tmp_path, 15, "--rollout.group_size=2", f"--data.cache_dir={tmp_path}/data")
    assert len(steps) == 15 and set(images) == set(range(1, 9)) and set(calls) == set(range(7))
    assert len({r["tools/calls"] for r in steps}) > 3 and len({r["length"] for r in steps}) > 10
    assert sum(r["compile/count"] for r in steps[1:]) == 0, [r["compile/count"] for r in steps]


def test_the_times_of_a_step_add_up(whole):
    for record in metrics(whole, "whole")[1:-1]:
        spent = phases(record)
        assert {"decode", "train", "judge"} < spent.keys() and min(spent.values()) >= 0
        assert sum(spent.values()) == pytest.approx(record["time/step"], rel=1e-9)


def test_tensorboard_reads_what_was_logged(whole):
    """With TensorBoard's own reader; the numbers of every record, each at its step."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(whole / "whole" / "tensorboard"))
    events.Reload()
    for name in ("reward/total", "eval/accuracy", "base/accuracy", "time/step"):
        expected = [(r["step"], np.float32(r[name])) for r in metrics(whole, "whole") if name in r]
        assert expected and [(e.step, np.float32(e.value)) for e in events.Scalars(name)] == expected


def test_what_a_resumed_run_logs_anew_takes_the_place_of_what_it_had_logged(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for first, value in ((1, 0.0), (3, 1.0)):
        trackers = Trackers(Config(), tmp_path)
        for step in range(first, first + 4):
            trackers.log({"step": step, "loss": value})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 0), (2, 0), (3, 1), (4, 1), (5, 1), (6, 1)]


def test_weights_and_biases_gets_every_record_and_the_same_run_again(tmp_path, monkeypatch):
    calls = []
    stub = SimpleNamespace(
        init=lambda **about: calls.append(about) or SimpleNamespace(
            log=lambda values, step: calls.append((step, values)), finish=lambda: calls.append("end"))
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "wandb", stub)
    cfg = Config.from_dict({"run": {"wandb": "agents", "name": "one"}})
    for _ in range(2):
        trackers = Trackers(cfg, tmp_path)
        trackers.log({"step": 3, "accuracy": 0.5, "warnings": {"collapse": "…"}})
        trackers.close()
    first, (step, values), end, second = calls[:4]
    assert first["project"] == "agents" and first["id"] == second["id"] and first["config"]["run"]["name"] == "one"
    assert (step, values, end) == (3, {"accuracy": 0.5}, "end")
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match="pip install wandb"):
        Trackers(cfg, tmp_path)


def test_a_traced_step_leaves_a_trace(tmp_path):
    assert run(tmp_path, "--run.name=traced", "--run.steps=2", "--run.profile=2", "--eval.every=0") == 0
    trace = next((tmp_path / "traced" / "profile").rglob("perfetto_trace.json.gz"))
    names = {event.get("name", "") for event in json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]}
    assert any("decode" in name for name in names) and any("accumulate" in name for name in names)


@pytest.mark.parametrize("overlap", [False, True])
def test_a_stopped_run_resumes_to_the_same_bits(request, tmp_path, monkeypatch, overlap):
    """With overlap, every other step is sampled by older weights, but never by others than those of the run that was not
    stopped."""
    class StopAfterTwo:
        asked = False

    interrupt = StopAfterTwo()
    save = job.RunFolder.save

    def stop(self, step, *rest):
        save(self, step, *rest)
        interrupt.asked = step == 2

    monkeypatch.setattr(job, "Interrupt", lambda: contextlib.nullcontext(interrupt))
    monkeypatch.setattr(job.RunFolder, "save", stop)
    flags = ("--run.name=cut", "--run.steps=4", "--run.checkpoint_every=2", "--eval.every=2")
    flags += (f"--rollout.overlap={str(overlap).lower()}",)
    assert run(tmp_path, *flags) == 0
    assert [r["step"] for r in metrics(tmp_path, "cut")] == [0, 1, 2]
    monkeypatch.undo()
    assert run(tmp_path, *flags, "--run.resume=true") == 0
    if overlap:
        whole = tmp_path
        assert run(whole, *flags, "--run.name=whole") == 0
        assert [r["rollout/staleness"] for r in metrics(whole, "whole") if "reward/total" in r] == [0, 1, 0, 1]
    else:
        whole = request.getfixturevalue("whole")
    a, b = (checkpoint.load(folder / "model")[1] for folder in (whole / "whole", tmp_path / "cut"))
    assert all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))
    same = ("reward/total", "accuracy", "loss", "grad_norm", "entropy", "final/accuracy")
    for x, y in zip(metrics(whole, "whole"), metrics(tmp_path, "cut"), strict=True):
        assert {k: x[k] for k in same if k in x} == {k: y[k] for k in same if k in y}


def test_the_saved_config_reproduces_the_settings(whole):
    path = whole / "whole" / "config.yaml"
    assert read_args(["--config", str(path)]).to_dict() == yaml.safe_load(path.read_text())


def test_ctrl_c_saves_and_ends_with_a_sentence(tmp_path):
    import signal
    import time

    command = [sys.executable, "-m", "imagent_jax.train", *SMALL, f"--run.dir={tmp_path}", f"--data.cache_dir={tmp_path}/data",
               "--run.name=cut", "--run.steps=500", "--eval.every=0"]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    path = tmp_path / "cut" / "metrics.jsonl"
    for _ in range(600):
        if path.exists() and len(path.read_text().splitlines()) >= 3:
            break
        time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "continue with --run.resume true" in " ".join(out.split())
    last = metrics(tmp_path, "cut")[-1]["step"]
    assert str(last) in [p.name for p in (tmp_path / "cut" / "checkpoints").iterdir()]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--model.path=/nowhere/at/all"], "/nowhere/at/all"),
        (["--rollout.prompt_tokens=40"], "rollout.prompt_tokens=40"),
        (["--images.vision_block=16", "--images.max_pixels=4704"], "vision_block"),
        (["--reward.custom=[nowhere:reward]"], "nowhere:reward"),
        (["--run.resume=true", "--run.name=none"], "holds no checkpoints"),
        (["--mesh.fsdp=1009"], "mesh.fsdp=1009"),
    ],
)
def test_bad_input_is_one_sentence(tmp_path, capsys, flags, words):
    with pytest.raises(SystemExit) if "vision_block" in words else contextlib.nullcontext():
        code = run(tmp_path, "--run.steps=1", *flags)
        assert code == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and words in error and len(error.splitlines()) == 1
