"""Evaluation: every figure of hand-made trajectories, and that settings reach the engine."""

import dataclasses
import io
import json
from types import SimpleNamespace

import jax
import pytest
from conftest import small_config
from PIL import Image
from rich.console import Console
from scripted_run import finished

from imagent_jax.evals import evaluate as job
from imagent_jax.evals.controls import CONTROLS, BlankEnvironment, ShuffledEnvironment
from imagent_jax.evals.rules import by_type
from imagent_jax.evals.run import evaluate_benchmarks, open_benchmarks
from imagent_jax.rollout.collect import Collector
from imagent_jax.rollout.environment import ToolEnvironment
from imagent_jax.tiny.world import task_at
from imagent_jax.types import CallResult, CallStatus, EndReason, Task

COUNT, COLOUR = Task("a", "?", (), "7", "number", "count"), Task("b", "?", (), "red bus", "f1", "colour")
CALL, STOP = "<tool_call>{}</tool_call>", "<|im_end|>"
RAN = CallResult(CallStatus.EXECUTED, "visual_confirmation", {})
AGAIN = CallResult(CallStatus.EXECUTED, "visual_reflection", {})
REFUSED = CallResult(CallStatus.INVALID, "visual_reflection", {})
UNREAD = CallResult(CallStatus.INVALID)
FAULT = CallResult(CallStatus.FAULT, "visual_confirmation", {})


@pytest.fixture
def done():
    """Eight trajectories: of 1 to 4 turns of two tokens, with an observation of three after every call."""
    return [
        finished(COUNT, [CALL, CALL, "7"], "7", calls=[RAN, AGAIN]),
        finished(COUNT, ["7"], "7"),
        finished(COUNT, [CALL, "8"], "8", calls=[REFUSED]),
        finished(COUNT, [CALL, CALL, CALL, "9"], "9", calls=[REFUSED, RAN, UNREAD]),
        finished(COUNT, [CALL], None, EndReason.FAULT, calls=[FAULT]),
        finished(COLOUR, [CALL, "red bus"], "red bus", calls=[RAN]),
        finished(COLOUR, ["red car"], "red car"),  # half an F1 is not right
        finished(COLOUR, ["red"], None, EndReason.TRUNCATED),
    ]


def test_every_figure_of_a_summary(done):
    assert [t.right for t in done] == [True, True, False, False, False, True, False, False]
    ends = {"answered": 6 / 8, "truncated": 1 / 8, "over_turns": 0.0, "void": 0.0, "repeated": 0.0, "fault": 1 / 8}
    assert job.summarise(done) == pytest.approx({
        "accuracy": 3 / 8, "accuracy/count": 2 / 5, "accuracy/colour": 1 / 3,
        "tools/used_rate": 3 / 8, "tools/calls": 7 / 8, "tools/executed_rate": 4 / 7, "tools/invalid": 3 / 8,
        "tools/accuracy_with": 2 / 3, "tools/accuracy_without": 1 / 5,
        "length": (12 + 2 + 7 + 17 + 5 + 7 + 2 + 2) / 8,
        **{f"end/{name}": share for name, share in ends.items()},
    })  # fmt: skip


def test_a_summary_of_one_that_calls_and_of_one_that_does_not(done):
    with_calls, without = job.summarise(done[:1]), job.summarise(done[1:2])
    assert (with_calls["tools/accuracy_with"], with_calls["tools/accuracy_without"]) == (1.0, 0.0)
    assert (without["tools/accuracy_with"], without["tools/accuracy_without"], without["tools/executed_rate"]) == (0.0, 1.0, 0.0)


class Recorder(Collector):
    """An engine whose rollouts are made by hand; it keeps what it was asked for."""

    def __init__(self, cfg, done):
        self.cfg, self.names, self.asked, self.left = cfg, ("visual_reflection",), [], list(done)

    def collect(self, params, tasks, **settings):
        self.asked.append((params, list(tasks), settings))
        return SimpleNamespace(trajectories=[[self.left.pop(0), None] for _ in tasks])


def test_what_is_evaluated_reaches_the_engine_in_pieces_of_four_rounds(done):
    engine, told = Recorder(small_config(), done), []
    tasks = [task_at(1, "test", i) for i in range(8)]
    metrics, out = job.evaluate(
        engine, "weights", tasks, groups=1, seed=77, greedy=True, temperature=0.3, progress=lambda *at: told.append(at)
    )
    wanted = {"group_size": 1, "seed": 77, "temperature": 0.0, "slots": 1}
    assert engine.asked == [("weights", tasks[:4], wanted), ("weights", tasks[4:], wanted)]
    assert told == [(4, 8), (8, 8)] and all(a is b for a, b in zip(out, done, strict=True))
    use = {"tools/calls/visual_reflection/executed": 1 / 8, "tools/calls/visual_reflection/invalid": 2 / 8,
           "tools/calls/visual_reflection/faulted": 0.0, "tools/calls/unknown/invalid": 1 / 8, "tools/earned": 2 / 8,
           "length/sampled": 2 * (3 + 1 + 2 + 4 + 1 + 2 + 1 + 1) / 8, "tools/time/visual_reflection": 0.0}  # fmt: skip
    assert metrics == pytest.approx(job.summarise(done) | use)  # groups of one: no gain within them
    engine = Recorder(small_config(), done)
    job.evaluate(engine, None, tasks[:3], groups=2, seed=0, greedy=False, temperature=1.0)
    assert [(settings["slots"], settings["temperature"], len(tasks)) for _, tasks, settings in engine.asked] == [(2, 1.0, 3)]


def test_the_command_evaluates_with_the_settings_of_its_configuration(tmp_path, capsys, monkeypatch):
    cfg = small_config(data={"cache_dir": str(tmp_path)}, rollout={"temperature": 0.4},
                       eval={"tasks": 5, "groups": 3, "seed": 9, "greedy": True})  # fmt: skip
    (tmp_path / "c.yaml").write_text(cfg.to_yaml())
    asked = []

    def evaluate(engine, params, tasks, *, progress, **settings):
        asked.append((engine, len(tasks), settings, jax.sharding.get_mesh().empty))
        progress(2, 5)
        answers = [t.answer if not asked[1:] else "none" for t in tasks]
        return job.summarise(done := [finished(t, ["x"], a) for t, a in zip(tasks, answers, strict=True)]), done

    monkeypatch.setattr(job, "evaluate", evaluate)
    seen, audit = [], job.audit
    monkeypatch.setattr(job, "audit", lambda *args: (seen.append(args), audit(*args))[1])
    assert job.main(["--config", str(tmp_path / "c.yaml"), "--control", "blank", "--control", "shuffle"]) == 0
    wanted = {"groups": 3, "seed": 9, "greedy": True, "temperature": 0.4}
    assert [(count, settings, empty) for _, count, settings, empty in asked] == [(5, wanted, False)] * 3
    (true, *_), *others = asked
    made = [type(collector.environment()) for collector in (true, *(other for other, *_ in others))]
    assert made == [ToolEnvironment, BlankEnvironment, ShuffledEnvironment]
    [(controls, done, seed, _)] = seen
    assert (controls, len(done), seed) == (["blank", "shuffle"], 5, 9)
    assert [t.answer == t.task.answer for t in done] == [True] * 5  # those of the true evaluation
    out = " ".join(capsys.readouterr().out.split())
    assert "2/5" in out and f"Control blank: {CONTROLS['blank']}." in out and "on 5 held-out tasks of tiny_world" in out
    assert "100.0 % │ 0.0 % │ 0.0 %" in out and "warning" not in out


def test_rows_left_out_of_an_evaluation_are_counted_on_the_screen(tmp_path, capsys, monkeypatch):
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    row = {"question": "How many?", "images": ["a.png"], "answer": "[b]7[/]", "answer_type": "exact"}
    rows = [row, row | {"answer": None}, row | {"images": ["nowhere.png"]}, row | {"question": "Which? " * 200}, row]
    (tmp_path / "test.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    where = {"name": "files", "path": str(tmp_path), "cache_dir": str(tmp_path)}
    (tmp_path / "c.yaml").write_text(small_config(data=where | {"skip_bad": True}).to_yaml())
    asked = []

    def evaluate(engine, params, tasks, **_):
        asked.append([task.uid for task in tasks])
        return job.summarise(done := [finished(t, ["x"], t.answer) for t in tasks]), done

    monkeypatch.setattr(job, "evaluate", evaluate)
    assert job.main(["--config", str(tmp_path / "c.yaml"), "--eval.tasks=1"]) == 0 and asked == [["test:1"]]
    out = " ".join(capsys.readouterr().out.split())
    assert "test.jsonl: 3 of 5 rows are left out (1 no answer, 1 image missing, 1 unusable prompt). The first: " in out
    for flags, words in ((["--data.skip_bad=false"], "line 2: the row has no answer"), (["--eval.tasks=0"], "eval.tasks is 0")):
        assert job.main(["--config", str(tmp_path / "c.yaml"), *flags]) == 2
        assert words in capsys.readouterr().err


def test_an_agent_that_is_as_good_without_what_it_saw_is_warned_of(tmp_path, capsys, monkeypatch):
    cfg = small_config(data={"cache_dir": str(tmp_path)}, eval={"tasks": 4})
    (tmp_path / "c.yaml").write_text(cfg.to_yaml())

    def evaluate(engine, params, tasks, **_):
        return job.summarise(done := [finished(t, ["x"], t.answer) for t in tasks]), done

    monkeypatch.setattr(job, "evaluate", evaluate)
    assert job.main(["--config", str(tmp_path / "c.yaml"), "--control", "blank"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "warning (blank): Accuracy does not drop under a control: 100 % with all images grey, 100 % without" in out
    monkeypatch.setattr(job, "evaluate", lambda *args, **_: (_ for _ in ()).throw(ValueError("Task t: it does not fit.")))
    assert job.main(["--config", str(tmp_path / "c.yaml")]) == 2
    assert capsys.readouterr().err == "error: Task t: it does not fit.\n"


def test_controls_and_settings_are_told_apart():
    chosen, cfg = job.parse(["--control", "shuffle", "--eval.tasks=3", "--control", "blank"])
    assert chosen.control == ["shuffle", "blank"] and cfg.eval.tasks == 3
    assert job.parse([])[0].control == [] and job.parse(["--control", "all"])[0].control == [*CONTROLS]


def test_a_table_has_a_column_for_each_evaluation():
    base = {"accuracy": 0.25, "tools/calls": 1.5, "tools/calls/t/invalid": 0.0, "end/void": 0.0, "end/fault": 0.0, "old": 1.0}
    new = {"accuracy": 0.5, "length": 70.123, "length/sampled": 50.0, "tools/calls": 2.0, "tools/invalid": 0.25,
           "tools/calls/t/invalid": 0.0, "tools/time/t": 0.5, "end/void": 0.125, "end/fault": 0.0,
           "time/evaluation": 3.0}  # fmt: skip
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(job.comparison({"base": base, "trained": new}, "a title"))
    lines = [[cell.strip() for cell in line.strip("│┃ ").replace("┃", "│").split("│")]
             for line in console.export_text().splitlines() if "│" in line or "┃" in line or "title" in line]  # fmt: skip
    assert lines == [
        ["a title"], ["held-out", "base", "trained"],
        ["accuracy", "25.0 %", "50.0 %"], ["length", "–", "70.12"], ["length/sampled", "–", "50.00"],
        ["tools/calls", "1.50", "2.00"], ["tools/invalid", "–", "0.25"], ["tools/time/t", "–", "0.50"],
        ["end/void", "0.0 %", "12.5 %"],
    ]  # fmt: skip


@pytest.mark.slow(15)
def test_greedy_takes_the_likeliest_token_whatever_the_seed_and_the_temperature(parts):
    """And sampling depends on both."""
    cfg = dataclasses.replace(parts.cfg, rollout=dataclasses.replace(parts.cfg.rollout, response_tokens=40))
    engine, tasks = Collector(parts.model, parts.processor, parts.tools, cfg), [task_at(1, "test", i) for i in range(6)]

    def said(**settings):
        done = job.evaluate(engine, parts.params, tasks, groups=2, **settings)[1]
        assert [t.task.uid for t in done] == [task.uid for task in tasks]
        return [t.ids.tolist() for t in done]

    ids = said(seed=0, greedy=True, temperature=1.0)
    assert said(seed=5, greedy=True, temperature=0.2) == ids
    assert said(seed=5, greedy=False, temperature=1e-4) == ids
    hot = [said(seed=seed, greedy=False, temperature=3.0) for seed in (5, 6, 5)]
    assert hot[0] == hot[2] != hot[1] and ids not in hot


# ---- benchmarks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--benchmark=vstar,nothing"], "There is no benchmark 'nothing'; use one of muirbench, "),
        (["--benchmark=vstar,vstar=x"], "The benchmark vstar is named twice"),
        (["--benchmark=own=x", "--control=all", "--eval.prompt=benchmark"], "set eval.prompt to agent"),
        (["--benchmark=own=x", "--limit=0"], "--limit is below 1"),
    ],
)
def test_a_benchmark_that_cannot_be_is_told_before_a_model_is_loaded(flags, words, capsys, monkeypatch):
    monkeypatch.setattr(job, "Policy", lambda cfg: pytest.fail("a model is loaded"))
    assert job.main(flags) == 2 and words in capsys.readouterr().err


@pytest.mark.slow(12)
def test_the_base_is_evaluated_on_a_benchmark_end_to_end_and_a_second_call_samples_nothing(parts, tmp_path, monkeypatch):
    rows = []
    for i in range(10):
        task = task_at(1, "test", i)
        for k, data in enumerate(task.images):
            (tmp_path / f"{i}-{k}.jpg").write_bytes(data)
        images = [f"{i}-{k}.jpg" for k in range(len(task.images))]
        rows.append({"question": task.question, "images": images, "answer": task.answer, "answer_type": task.answer_type})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    console, out = Console(file=io.StringIO(), width=200), tmp_path / "out"
    cfg = parts.cfg.changed({"data.cache_dir": str(tmp_path)})
    opened = open_benchmarks([f"own={tmp_path}/rows.jsonl"], cfg, parts.collector, console, lambda words: None)

    def run():
        with jax.set_mesh(parts.mesh):
            evaluate_benchmarks(parts, opened, out, 9, console)
        return (out / "result.json").read_bytes()

    first = run()
    result = json.loads(first)["benchmarks"]["own-rows"]
    replies = [json.loads(line) for line in (out / "predictions" / "own-rows.lmms_eval.jsonl").read_text().splitlines()]
    right = [by_type(task, said["resps"][0][0]) for task, said in zip(opened["own-rows"].questions.facts, replies, strict=False)]
    assert len(right) == 9 and result["scores"][""]["strict"]["micro"]["mean"] == pytest.approx(sum(right) / 9, abs=1e-6)
    assert [row["scores"][""]["strict"] for row in result["per_row"]] == [[score] for score in right]
    logged = [json.loads(line) for line in (out / "trajectories" / "own-rows-000000.jsonl").read_text().splitlines()]
    assert [record["answer"] or "" for record in logged] == [said["resps"][0][0] for said in replies]
    page = (out / "report.html").read_text()
    assert (
        page.count("<section class=case>") == min(4, int(sum(right))) + min(4, 9 - int(sum(right))) and "data:image/jpeg" in page
    )
    monkeypatch.setattr(job, "Policy", lambda cfg: parts)
    flags = ["--benchmark", f"own={tmp_path}/rows.jsonl", "--limit=4", f"--data.cache_dir={tmp_path}", "--control=blank"]
    assert job.main([*flags, "--control=no_tools", f"--out={tmp_path}/controls"]) == 0
    found = json.loads((tmp_path / "controls" / "controls.json").read_text())["own-rows"]
    assert [(line["control"], line["tasks"]) for line in found["lines"]] == [("blank", 4), ("no_tools", 4)]
    assert found["lines"][0]["right"] == found["lines"][1]["right"] and [*found["sentences"]] == ["blank", "no_tools"]
    monkeypatch.setattr(parts.collector, "collect", lambda *args, **how: pytest.fail("it samples again"))
    assert run() == first and "own-rows, micro" in console.file.getvalue()
