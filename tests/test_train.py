"""The main job: what it asks of its parts under settings of every kind, what it writes, and that it resumes bit for bit."""

import gzip
import json
import os
import re
import signal
import sys
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from watched_run import PAID, SMALL, Watched

from imagent_jax import train as job
from imagent_jax.config import Config, read_args
from imagent_jax.data.pipeline import open_tasks, task_iterator
from imagent_jax.evals import evaluate as evaluation
from imagent_jax.model import checkpoint
from imagent_jax.rollout.episode import Episode
from imagent_jax.runs import export
from imagent_jax.runs.reader import phases
from imagent_jax.tiny.base import base_folder
from imagent_jax.types import EndReason, TokenKind

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))
import endurance

pytestmark = pytest.mark.slow(2)  # seconds of each, most of them in the runs that tests share


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Where this file's runs keep the tiny world."""
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def whole(runs, data):
    """An uninterrupted run of four steps."""
    run = Watched(runs, data, "whole", "--run.profile=3")
    assert run.code == 0
    return run


@pytest.fixture(scope="module")
def untrained(runs, data):
    """A run of no step, with sampled evaluations and another seed."""
    run = Watched(runs, data, "untrained", "--run.steps=0", "--run.seed=6", "--eval.greedy=false")
    assert run.code == 0
    return run


# ---- what it asks of its parts ----------------------------------------------------------------------------------------


def test_held_out_tasks_are_the_first_of_the_test_split(whole):
    """Before and after training `eval.tasks`, during it `eval.during`, every `eval.every` steps but not at the last."""
    held_out = [open_tasks(whole.cfg.data, "test")[i].uid for i in range(32)]
    asked = [("base-000000", 6), ("step 2-000002", 3), ("trained-000004", 6)]
    assert [sum((roll["tasks"] for roll in whole.evaluations), [])] == [sum((held_out[:n] for _, n in asked), [])]
    for stem, count in asked:
        assert [record["task"] for record in whole.logged(stem)] == held_out[:count]
    assert all(roll["slots"] == 2 and roll["temperature"] == 0.0 for roll in whole.evaluations)
    assert ["eval/accuracy" in record for record in whole.steps] == [False, True, False, False]
    for record, prefix, stem in ((whole.records[0], "base", asked[0][0]), (whole.steps[1], "eval", asked[1][0]),
                                 (whole.records[-1], "final", asked[2][0])):  # fmt: skip
        assert record[f"{prefix}/accuracy"] == pytest.approx(np.mean([r["right"] for r in whole.logged(stem)]))
        assert record[f"{prefix}/length"] == pytest.approx(np.mean([r["length"] for r in whole.logged(stem)]))
        spent = [roll["seconds"] for roll in whole.evaluations][asked.index((stem, len(whole.logged(stem))))]
        assert record["time/evaluation" if prefix == "base" else f"{prefix}/time/evaluation"] >= spent


def test_every_metric_of_a_run_is_described(whole):
    page = (Path(__file__).parent.parent / "docs" / "runs.md").read_text().split("## Metrics")[1]
    named = [name for row in page.splitlines() if row.startswith("| `") for name in re.findall(r"`([\w/<>.]+)`", row)]
    forms = [re.sub(r"<\w+>", "[^/]+", name).replace("...", ".+") for name in named]
    forms += [f"{name}/[^/]+" for name in forms if name.startswith("mask/dropped_")]
    logged = {re.sub("^(base|eval|final)/", "", name) for record in whole.records for name in record} - {"step"}
    assert [name for name in sorted(logged) if not any(re.fullmatch(form, name) for form in forms)] == []


def test_training_tasks_are_of_the_training_split_in_the_order_of_the_seeds(whole):
    tasks = open_tasks(whole.cfg.data, "train")

    def order(seed):
        series = task_iterator(tasks, 3, seed)
        return [[task.uid for task in next(series)] for _ in range(4)]

    assert [roll["tasks"] for roll in whole.training] == order(3 + 5) != order(3)
    for step, roll in enumerate(whole.training, 1):
        assert [record["task"] for record in whole.logged(f"train-{step:06d}")[::4]] == roll["tasks"]


def test_every_step_samples_by_a_seed_of_its_own_and_evaluations_by_theirs(whole, untrained):
    assert [roll["seed"] for roll in whole.training] == [5 * 1_000_003 + step for step in range(4)]
    assert {roll["seed"] for roll in [*whole.evaluations, *untrained.evaluations]} == {77}
    assert {(roll["group_size"], roll["temperature"]) for roll in whole.training} == {(4, 0.9)}
    assert {roll["temperature"] for roll in untrained.evaluations} == {0.9}  # which sample


def tokens(records):
    return [record["tokens"]["ids"] for record in records]


def test_greedy_evaluations_agree_and_differ_from_sampled_ones(parts, whole, untrained):
    """The base, evaluated greedily by two seeds, and sampled by one seed in runs of two."""
    assert tokens(untrained.logged("base-000000")) == tokens(untrained.logged("trained-000000"))
    assert tokens(untrained.logged("base-000000")) != tokens(whole.logged("base-000000"))
    assert untrained.records[0]["base/accuracy"] == untrained.records[-1]["final/accuracy"] and len(untrained.records) == 2
    assert untrained.checkpoints == {"0"} and untrained.steps == []


def test_the_schedule_is_as_long_as_the_run_has_updates(whole):
    (made,) = whole.optimizers
    assert made["updates"] == 4 * 2 * 3 and made["cfg"] == whole.cfg.optim
    counts = [x for x in jax.tree.leaves(last_state(whole.path)) if x.shape == ()]
    assert counts and {int(count) for count in counts} == {4 * 2 * 3}


def last_state(path: Path):
    import orbax.checkpoint.experimental.v1 as ocp

    with ocp.training.Checkpointer(path / "checkpoints") as manager:
        return manager.load(manager.latest.step)["opt_state"]


def test_checkpoints_are_made_when_they_are_due_and_the_best_of_held_out_accuracy_is_kept(whole):
    """The second has a held-out accuracy; training accuracy, which all have, would have chosen another."""
    assert [save["step"] for save in whole.saves] == [0, 1, 2, 3, 4, 4]
    accuracies = [save["accuracy"] for save in whole.saves]
    assert accuracies == [None, None, whole.steps[1]["eval/accuracy"], None, None, None]
    assert whole.steps[1]["eval/accuracy"] != whole.steps[1]["accuracy"] and whole.checkpoints == {"2", "4"}
    assert all(save["progress"]["unlogged"] is None and save["progress"]["step"] == save["step"] for save in whole.saves)
    places = [json.dumps(save["progress"]["iterator"]) for save in whole.saves]
    assert len(set(places)) == 5 and {*whole.saves[2]["progress"]["evaluations"]} == {"base"}


# ---- what it writes ---------------------------------------------------------------------------------------------------


def test_a_run_leaves_the_promised_folder(whole):
    path = whole.path
    assert Config.from_yaml((path / "config.yaml").read_text()) == whole.cfg
    assert read_args(["--config", str(path / "config.yaml")]) == whole.cfg
    assert [record["step"] for record in whole.records] == [0, 1, 2, 3, 4, 4]
    stems = {"base-000000", "step 2-000002", "trained-000004", *(f"train-{step:06d}" for step in range(1, 5))}
    assert {file.stem for file in (path / "trajectories").glob("*.jsonl")} == stems
    trajectory = whole.logged("train-000001")[0]
    assert trajectory["turns"][0]["text"] and (path / "trajectories" / "images" / trajectory["images"][0]["file"]).is_file()
    page = (path / "report.html").read_text()
    assert "of held-out tasks right, with" in page and f"3 step(s) from 2 to 4: {PAID}" in page
    assert not (path / "adapter").exists() and not (path / "data_faults.txt").exists()


def test_the_model_is_the_last_checkpoint_and_was_trained(whole, tmp_path):
    assert export.main([str(whole.path), str(tmp_path / "out")]) == 0
    written, exported, base = (checkpoint.load(path)[1] for path in (whole.path / "model", tmp_path / "out", base_folder()))
    assert same(written, exported) and same(written["vision"], base["vision"])
    assert not any(np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (written["text"], base["text"])), strict=True))


def same(a, b) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def figures(records: list[dict]) -> dict[str, float]:
    """Metrics of a step from the trajectories that it logged."""
    n, right = len(records), np.asarray([r["right"] for r in records])
    calls = [(r, turn["call"]) for r in records for turn in r["turns"] if turn["call"]]
    made = {status: sum(call["status"] == status for _, call in calls) for status in ("EXECUTED", "INVALID")}
    used = np.asarray([any(t["call"] and t["call"]["status"] == "EXECUTED" for t in r["turns"]) for r in records])
    kinds = [np.repeat([int(k) for k in r["tokens"]["kind"]], [r["tokens"]["repeat"].get(str(i), 1) for i in
             range(len(r["tokens"]["kind"]))]) for r in records]  # fmt: skip
    sampled = [int((kind != TokenKind.OBSERVATION).sum()) for kind in kinds]
    kept = [r["tokens"]["kept"].count("1") for r in records]
    total = sum(sampled)
    found = {f"reward/{name}": np.mean([r["rewards"][name] for r in records]) for name in records[0]["rewards"]}
    found |= {f"end/{end.name.lower()}": np.mean([r["end"] == end.name for r in records]) for end in EndReason}
    found |= {
        f"accuracy/{kind}": np.mean([r["right"] for r in records if r["kind"] == kind]) for kind in {r["kind"] for r in records}
    }
    found |= {
        "accuracy": right.mean(), "length": np.mean([r["length"] for r in records]), "length/sampled": total / n,
        "tools/calls": (made["EXECUTED"] + made["INVALID"]) / n, "tools/invalid": made["INVALID"] / n,
        "tools/executed_rate": made["EXECUTED"] / max(1, made["EXECUTED"] + made["INVALID"]), "tools/used_rate": used.mean(),
        "tools/accuracy_with": right[used].mean() if used.any() else 0.0,
        "tools/accuracy_without": right[~used].mean() if not used.all() else 0.0, "tools/earned": (right & used).mean(),
        "mask/dropped_tokens": 1 - sum(kept) / total, "mask/dropped_trajectories": np.mean([r["dropped"] for r in records]),
        "mask/observation_tokens": 1 - total / sum(map(len, kinds)),
    }  # fmt: skip
    for end in ("TRUNCATED", "VOID", "REPEATED", "OVER_TURNS"):
        lost = sum(tokens for r, tokens in zip(records, sampled, strict=True) if r["end"] == end)
        found[f"mask/dropped_tokens/{end.lower()}"] = lost / total
        found[f"mask/dropped_trajectories/{end.lower()}"] = np.mean([r["end"] == end for r in records])
    for name in ("visual_reflection", "visual_confirmation"):
        for status, word in (("EXECUTED", "executed"), ("INVALID", "invalid"), ("FAULT", "faulted")):
            found[f"tools/calls/{name}/{word}"] = sum(c["name"] == name and c["status"] == status for _, c in calls) / n
    return found


def test_the_metrics_of_a_step_are_those_of_its_trajectories(whole):
    for step, record in enumerate(whole.steps, 1):
        found = figures(whole.logged(f"train-{step:06d}"))
        assert {key: record[key] for key in found} == pytest.approx(found, abs=1e-6)
        assert record["rollout/tokens_per_second"] * sum(phases(record)[k] for k in whole.training[step - 1]["result"].times) == (
            pytest.approx(12 * found["length/sampled"]))  # fmt: skip
        update = whole.updates[step - 1]
        assert (record["vision/encoded"], record["vision/shown"]) == (update["encoded"], update["shown"])
        assert record["vision/waste"] == pytest.approx(1 - update["filled"]) and 0 < update["filled"] < 1
        learned = update["result"][2]
        assert {key: record[key] for key in learned} == learned and {
            "loss",
            "grad_norm",
            "entropy",
            "kl/reference",
        } <= learned.keys()
        assert record["memory/resident_gb"] > 0.1 and record["rollout/staleness"] == 0
    assert len({record["reward/total"] for record in whole.steps}) > 1 and max(r["grad_norm"] for r in whole.steps) > 0
    assert max(r["kl/reference"] for r in whole.steps) > 0


def test_rewards_are_weighted_and_advantages_are_of_the_group(whole):
    spread = 0
    for step in range(1, 5):
        records, batch = whole.logged(f"train-{step:06d}"), whole.updates[step - 1]["batch"]
        assert [r["rollout"] for r in records] == [0, 1, 2, 3] * 3
        for i, group in enumerate(records[begin : begin + 4] for begin in (0, 4, 8)):
            paid = [r["rewards"] for r in group]
            total = [2 * p["answer"] + 0.3 * p["format"] + 0.5 * p["tool_gain"] for p in paid]
            counts = np.asarray([r["end"] not in ("TRUNCATED", "FAULT") for r in group])
            assert [p["total"] for p in paid] == pytest.approx(total) and [p["answer"] for p in paid] == [
                r["right"] for r in group
            ]
            mean = np.mean(np.asarray(total)[counts]) if counts.any() else 0.0
            flat = not counts.any() or np.ptp(np.asarray(total)[counts]) == 0
            wanted = np.zeros(4) if flat else np.asarray(total) - mean
            assert [r["advantage"] for r in group] == pytest.approx(wanted, abs=1e-6)
            assert batch.advantages[i] == pytest.approx(wanted, abs=1e-6) and batch.rewards[i] == pytest.approx(total)
            spread += not flat
    assert spread >= 2


def test_the_times_of_a_step_are_those_of_its_parts(whole):
    """Each is at least what the part itself took, and no two share a second."""
    before = 0.0
    for i, record in enumerate(whole.steps):
        took = {name: calls[i]["seconds"] for name, calls in (("rollout", whole.training), ("judge", whole.judged),
                                                              ("train", whole.updates))}  # fmt: skip
        step = record["time/step"]
        assert step - took["rollout"] - took["train"] >= record["time/judge"] >= took["judge"]
        assert step - took["rollout"] - took["judge"] >= record["time/train"] >= took["train"]
        spent = phases(record)
        assert {k: spent[k] for k in whole.training[i]["result"].times} == whole.training[i]["result"].times
        assert {"decode", "prepare", "vision"} <= spent.keys() and min(spent.values()) >= 0
        assert sum(spent.values()) == pytest.approx(step, rel=1e-9)
        assert record["time/total"] >= before + step
        before = record["time/total"]
    assert whole.records[-1]["time/total"] >= before + whole.records[-1]["final/time/evaluation"]


def test_nothing_compiles_after_the_first_steps(whole):
    assert whole.steps[0]["compile/count"] > 0 and [record["compile/count"] for record in whole.steps[2:]] == [0, 0]


def test_what_is_printed_is_what_was_measured(whole):
    assert "4 steps of 3 tasks x 4 rollouts of tiny on tiny_world, 1 cpu device(s)" in whole.out
    for record in whole.steps:
        line = re.search(rf"^step    {record['step']}/4 .*$", whole.out, re.MULTILINE)[0]
        found = [float(x) for x in re.findall(r"-?\d+\.\d+", line)]
        keys = ("reward/total", "accuracy", "tools/calls", "mask/dropped_tokens", "time/step", None, "time/train")
        wanted = [
            None if key is None else record[key] * (100 if key in ("accuracy", "mask/dropped_tokens") else 1) for key in keys
        ]
        wanted[5] = record["time/step"] - record["time/train"] - record["time/judge"]
        assert found == pytest.approx(wanted, abs=0.06)
    for name, prefix, count in (("base", "base", 6), ("step 2", "eval", 3), ("trained", "final", 6)):
        record = next(r for r in whole.records if f"{prefix}/accuracy" in r)
        words = f"{name}: {100 * record[f'{prefix}/accuracy']:.1f} % of {count} held-out tasks right, "
        assert f"{words}{record[f'{prefix}/tools/calls']:.2f} calls a task" in whole.out
    assert whole.out.count(f"warning (bonus_unearned): {PAID}") == 1
    assert ["bonus_unearned" in record.get("warnings", {}) for record in whole.steps] == [False, True, True, True]
    table = next(line for line in whole.out.splitlines() if line.strip("│┃ ").startswith("accuracy "))
    figures = [whole.records[0]["base/accuracy"], whole.records[-1]["final/accuracy"]]
    assert re.findall(r"[\d.]+ %", table) == [f"{100 * x:.1f} %" for x in figures]


def test_tensorboard_reads_what_was_logged(whole):
    """With TensorBoard's own reader; the numbers of every record, each at its step."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(whole.path / "tensorboard"))
    events.Reload()
    names = {key for record in whole.records for key in record} - {"step", "warnings"}
    assert set(events.Tags()["scalars"]) == names
    for name in ("reward/total", "eval/accuracy", "base/accuracy", "time/step", "final/accuracy"):
        expected = [(r["step"], np.float32(r[name])) for r in whole.records if name in r]
        assert expected and [(e.step, np.float32(e.value)) for e in events.Scalars(name)] == expected


def test_the_step_that_was_asked_for_is_traced(whole):
    assert [trace["updates"] for trace in whole.traced] == [2]  # as the third began
    trace = next((whole.path / "profile").rglob("perfetto_trace.json.gz"))
    names = {event.get("name", "") for event in json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]}
    assert any("decode" in name for name in names) and any("accumulate" in name for name in names)


# ---- stopped and resumed ----------------------------------------------------------------------------------------------


def assert_equal(whole, cut):
    """The same weights, figures and trajectories, each step once."""
    assert same(*(checkpoint.load(run.path / "model")[1] for run in (whole, cut)))
    for x, y in zip(whole.records, cut.records, strict=True):
        a, b = ({k: v for k, v in record.items() if not re.search("time/|memory/|compile/|second", k)} for record in (x, y))
        assert a == b
    for file in (whole.path / "trajectories").glob("*.jsonl"):
        assert file.read_text() == (cut.path / "trajectories" / file.name).read_text(), file.name


def test_ctrl_c_stops_after_the_step_and_the_run_resumes_to_the_same_bits(whole, tmp_path, data):
    begun = Watched(tmp_path, data, "cut", when=lambda record: record["step"] == 2, strike=signal.SIGINT)
    assert begun.code == 0 and "Stopped after step 2; continue with --run.resume true." in begun.out
    assert [record["step"] for record in begun.records] == [0, 1, 2] and begun.checkpoints == {"2"}
    assert "the run has not ended" in (begun.path / "report.html").read_text() and not (begun.path / "model").exists()
    resumed = Watched(tmp_path, data, "cut", "--run.resume=true")
    assert resumed.code == 0 and "Resumed after step 2." in resumed.out and PAID not in resumed.out
    assert [roll["seed"] for roll in resumed.training] == [5 * 1_000_003 + step for step in (2, 3)]
    assert [roll["tasks"] for roll in resumed.training] == [roll["tasks"] for roll in whole.training[2:]]
    assert sum(len(roll["tasks"]) for roll in resumed.evaluations) == 6  # the base is not evaluated again
    assert_equal(whole, resumed)


def test_with_overlap_a_run_stopped_in_an_evaluation_resumes_to_the_same_bits(tmp_path, data, monkeypatch):
    """Every other step is sampled by weights one update old, but never by others than those of the run that was not stopped.
    The step whose evaluation is given up is not logged before it is evaluated."""
    flags = "--rollout.overlap=true", "--run.checkpoint_every=2", "--run.keep_best=0"
    whole = Watched(tmp_path, data, "whole", *flags)
    assert whole.code == 0 and [record["rollout/staleness"] for record in whole.steps] == [0, 1, 0, 1]
    assert [save["step"] for save in whole.saves] == [0, 2, 4, 4] and whole.checkpoints == {"4"}
    assert ["time/decode" in record for record in whole.steps] == [True, False, True, False]
    assert all(record["rollout/tokens_per_second"] > 0 and record["time/wait"] >= 0 for record in whole.steps)
    evaluate = evaluation.evaluate

    def struck(engine, params, tasks, **how):
        if len(tasks) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(engine, params, tasks, **how)

    monkeypatch.setattr(evaluation, "evaluate", struck)
    begun = Watched(tmp_path, data, "cut", *flags)
    monkeypatch.undo()
    assert begun.code == job.RESTART and [record["step"] for record in begun.records] == [0, 1] and begun.checkpoints == {"2"}
    resumed = Watched(tmp_path, data, "cut", *flags, "--run.resume=true")
    assert resumed.code == 0
    assert_equal(whole, resumed)


def test_sigterm_in_the_first_evaluation_asks_for_a_restart(tmp_path, data, monkeypatch, capsys):
    evaluate = evaluation.evaluate
    kill = partial(os.kill, os.getpid(), signal.SIGTERM)
    monkeypatch.setattr(evaluation, "evaluate", lambda *args, **how: (kill(), evaluate(*args, **how))[1])
    run = Watched(tmp_path, data, "early")
    assert run.code == job.RESTART == 75 and not (run.path / "metrics.jsonl").exists()
    assert capsys.readouterr().err == "Stopped by SIGTERM; start again with --run.resume true.\n"


def test_a_signal_is_noted_a_second_one_stops_at_once_and_then_all_is_as_before():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    for number, other in ((signal.SIGINT, signal.SIGTERM), (signal.SIGTERM, signal.SIGINT)):
        with job.Interrupt() as interrupt:
            assert interrupt.asked == 0
            signal.raise_signal(number)
            assert interrupt.asked == number and interrupt.stop.is_set() == (number == signal.SIGTERM)
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(other)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("a bug")])
def test_what_is_no_fault_of_the_input_is_not_taken_for_one(monkeypatch, error):
    def fails(*_):
        raise error

    monkeypatch.setattr(job, "train", fails)
    with pytest.raises(type(error)):
        job.main([])


# ---- whatever comes ---------------------------------------------------------------------------------------------------


def test_random_sizes_counts_and_turns_compile_nothing_and_bad_rows_are_left_out(tmp_path, monkeypatch, capsys):
    """The short form of benchmarks/endurance.py: 30 tasks of 1 to 8 images, rollouts of 0 to 6 calls, from JSON Lines."""
    monkeypatch.setattr(Episode, "end_turn", Episode.end_turn)  # which the script replaces
    write = endurance.write_tasks

    def with_bad_rows(folder, count):
        images = write(folder, count)
        for split in ("train", "test"):
            with open(folder / f"{split}.jsonl", "a") as file:
                file.write(f'\n{{"uid": "bad-{split}", "question": "?", "images": ["nowhere.png"], "answer": "1"}}')
        return images

    monkeypatch.setattr(endurance, "write_tasks", with_bad_rows)
    steps, images, calls = endurance.run(
        tmp_path, 6, "--rollout.group_size=2", "--images.max_pixels=6272", "--tools.confirm_max_pixels=9408",
        "--grpo.length_buckets=1",
        "--images.vision_block=96", "--images.pack_blocks=1", "--images.pages=2", "--tools.high_pixels=9408",
        "--rollout.prompt_tokens=256", "--rollout.response_tokens=384", "--data.skip_bad=true", "--run.checkpoint_every=0",
    )  # fmt: skip
    assert len(steps) == 6 and set(images) == set(range(1, 9)) and set(calls) == set(range(7))
    assert len({r["tools/calls"] for r in steps}) > 3 and len({r["length"] for r in steps}) > 4
    assert sum(r["compile/count"] for r in steps[1:]) == 0, [r["compile/count"] for r in steps]
    faults = (tmp_path / "run" / "data_faults.txt").read_text().splitlines()
    assert len(faults) == 2 and "train.jsonl" in faults[0] and "test.jsonl" in faults[1]
    said = "".join(capsys.readouterr().out.split())  # the screen breaks lines anywhere
    for split, rows in (("train", 31), ("test", 5)):
        assert f"{split}.jsonl:1of{rows}rowsareleftout(1imagemissing).Thefirst:" in said
    assert f"Allarelistedin{tmp_path}/run/data_faults.txt." in said
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["6"]
    assert not list((tmp_path / "run" / "trajectories").glob("*.jsonl"))


@pytest.mark.parametrize("during", [0, 1])
def test_where_nothing_is_evaluated_no_test_split_is_needed(tmp_path, capsys, during):
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    row = {"question": "How many?", "images": ["a.png"], "answer": 0.00005, "answer_type": "number", "uid": None}
    (tmp_path / "train.jsonl").write_text(f"{json.dumps(row)}\n" * 3)
    code = job.main([
        "--data.name=files", f"--data.path={tmp_path}", f"--data.cache_dir={tmp_path}", "--run.steps=0", "--eval.tasks=0",
        f"--eval.every={during}", "--run.compile_cache=", f"--run.dir={tmp_path}", "--run.name=run",
    ])  # fmt: skip
    said = capsys.readouterr()
    if during:
        assert code == 2 and "has no test split; write test.jsonl" in said.err
        return
    assert code == 0 and "held-out" not in said.out and "left out" not in said.out
    assert (tmp_path / "run" / "report.html").is_file() and (tmp_path / "run" / "model" / "config.json").is_file()
    [record] = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert record.keys() == {"step", "time/total"}


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--model.path=/nowhere/at/all"], "/nowhere/at/all"),
        (["--rollout.prompt_tokens=40"], "rollout.prompt_tokens=40"),
        (["--images.vision_block=16", "--images.max_pixels=4704"], "vision_block"),
        (["--reward.custom=[nowhere:reward]"], "nowhere:reward"),
        (["--tools.names=[nowhere:tool]"], "nowhere:tool"),
        (["--run.resume=true", "--run.name=none"], "holds no checkpoints"),
        (["--mesh.fsdp=1009"], "mesh.fsdp=1009"),
        (["--eval.benchmarks=[nothing]"], "There is no benchmark 'nothing'"),
        (["--eval.benchmarks=[own=/nowhere.jsonl]"], "/nowhere.jsonl does not exist"),
    ],
)
def test_bad_input_is_one_sentence(tmp_path, data, capsys, flags, words):
    assert job.main([*SMALL, f"--run.dir={tmp_path}", f"--data.cache_dir={data}", "--run.steps=1", *flags]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and words in error and len(error.splitlines()) == 1
    assert not list(tmp_path.rglob("metrics.jsonl"))


# ---- its parts alone --------------------------------------------------------------------------------------------------


def misspelt(t):
    return t.anwser == "7"


def misspelt_at_times(t):
    return t.anwser == "7" if t.rollout else 0.5


def test_a_reward_that_always_fails_ends_the_first_step_in_one_sentence(tmp_path, data, capsys):
    run = Watched(tmp_path, data, "typo", f"--reward.custom=[{__name__}:misspelt]", "--eval.tasks=1", "--eval.groups=1")
    said = capsys.readouterr().err
    assert run.code == 2 and said.count("\n") == 1
    assert said.startswith("error: All 12 rollouts of this step failed on an environment error and nothing can train; ")
    assert f"reward {__name__}:misspelt: AttributeError: 'Trajectory' object has no attribute 'anwser'" in said
    assert "(test_train.py, line " in said and run.updates == [] and run.checkpoints == {"0"}


def test_a_reward_that_fails_at_times_is_told_of_once_and_at_once(tmp_path, data):
    flags = "--eval.tasks=1", "--eval.groups=1", "--eval.every=0", "--run.steps=2"
    run = Watched(tmp_path, data, "often", f"--reward.custom=[{__name__}:misspelt_at_times]", *flags)
    lines = [line for line in run.out.splitlines() if "misspelt_at_times" in line]
    error = "AttributeError: 'Trajectory' object has no attribute 'anwser'"
    assert run.code == 0 and len(lines) == 1 and lines[0].startswith(f"warning (reward {__name__}:misspelt_at_times) {error}")
    assert lines[0].endswith("; its rollouts do not train.") and run.out.index(lines[0]) < run.out.index("step    1/2")
    assert [record["rewards/failed"] for record in run.steps] == [0.75, 0.75]
    assert all("rewards_failed" in record["warnings"] for record in run.steps)
