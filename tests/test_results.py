"""Results of benchmarks: what is kept of samples, killed and resumed evaluations, averages, comparisons, exports and the page."""

import csv
import dataclasses
import io
import json
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import small_config
from PIL import Image
from rich.console import Console
from scripted_run import finished

from imagent_jax.config import DataConfig
from imagent_jax.evals import compare
from imagent_jax.evals.benchmarks import named
from imagent_jax.evals.evaluate import HeldOut
from imagent_jax.evals.exports import write_predictions
from imagent_jax.evals.harness import Opened, Pieces, fingerprint, reply_of, sample
from imagent_jax.evals.page import about, rows_of, write_page
from imagent_jax.evals.result import metrics_of, result_of
from imagent_jax.evals.run import labels
from imagent_jax.types import CallResult, CallStatus, EndReason, Task

RAN, FAULT = CallResult(CallStatus.EXECUTED, "t", {}), CallResult(CallStatus.FAULT, "t", {})


def tsv(path, count, **columns):
    """A VLMEvalKit file of `count` rows whose right answers are B."""
    Image.new("RGB", (30, 30)).save(path.with_name("a.png"))
    with open(path, "w", newline="") as file:
        writer = csv.writer(file, delimiter="\t")
        writer.writerow(["index", "image_path", "question", "A", "B", "answer", "category"])
        for i in range(count):
            writer.writerow([i, "a.png", f"Which? {i}", "red", "blue", "B", "odd" if i % 2 else "even"])
    return path


@pytest.fixture
def opened(tmp_path):
    benchmark, path = named(f"tsv={tsv(tmp_path / 'set.tsv', 40)}")
    return Opened(benchmark, benchmark.open(path, DataConfig(cache_dir=str(tmp_path))), prompted=False)


class Scripted:
    """A collector whose policy says what `says(task, sample)` returns: an answer, None (cut off), or an exception (a fault)."""

    def __init__(self, cfg, says, die_after=None):
        self.cfg, self.says, self.die_after, self.asked = cfg, says, die_after, []

    def collect(self, params, tasks, *, group_size, seed, temperature, slots):
        if len(self.asked) == self.die_after:
            raise KeyboardInterrupt
        self.asked.append([task.uid for task in tasks])
        return SimpleNamespace(trajectories=[[self.one(task, i) for i in range(group_size)] for task in tasks])

    def one(self, task, i):
        said = self.says(task, i)
        if isinstance(said, Exception):
            t = finished(task, ["<call>"], None, EndReason.FAULT, calls=[FAULT], rollout=i)
            t.error = f"Traceback\n{said!r}"
            return t
        if said is None:
            return finished(task, ["so"], None, EndReason.TRUNCATED, rollout=i)
        return finished(task, ["<call>", said], said, calls=[RAN], rollout=i)


CFG = small_config(eval={"groups": 2, "samples": 2})


def says(task, i):
    number = int(task.uid)
    return ("B", "(A)", "The answer is B", None, "both", RuntimeError("the disk is full"), "B", "B")[(number + i) % 8]


def run(opened, tmp_path, die_after=None, cfg=CFG, script=says):
    pieces = Pieces(tmp_path / "samples.jsonl", fingerprint(cfg, opened, 40, tmp_path))
    collector = Scripted(cfg, script, die_after)
    return collector, sample(collector, None, opened, 40, pieces)[0]


def test_a_killed_evaluation_goes_on_and_ends_the_same_to_the_byte(opened, tmp_path):
    whole = run(opened, tmp_path)[1]
    (tmp_path / "samples.jsonl").unlink()
    for pieces in (0, 1, 2, 0, 1):  # killed at the first piece, after one more, after two more, ...
        with pytest.raises(KeyboardInterrupt):
            run(opened, tmp_path, die_after=pieces)
        with open(tmp_path / "samples.jsonl", "a") as file:
            file.write('{"seconds": 1, "rows": [{"uid"')  # it died while writing
    collector, records = run(opened, tmp_path)
    assert collector.asked == [[str(i) for i in range(32, 40)]]  # four of five pieces were there
    assert records == whole
    results = [result_of(opened.benchmark, opened.questions.facts, found) for found in (whole, records)]
    assert json.dumps(results[0]) == json.dumps(results[1])


def test_samples_of_other_settings_are_not_gone_on_with(opened, tmp_path):
    run(opened, tmp_path)
    for name, value in {"eval.seed": 5, "tools.max_turns": 2, "eval.samples": 3, "rollout.temperature": 0.5}.items():
        with pytest.raises(ValueError, match="was sampled with other settings"):
            run(opened, tmp_path, cfg=CFG.changed({name: value}))
    (tmp_path / "model.safetensors").write_bytes(b"other weights")
    with pytest.raises(ValueError, match="was sampled with other settings"):
        run(opened, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    run(opened, tmp_path, cfg=CFG.changed({"run.name": "other", "eval.judge": True, "eval.every": 3}))


def test_every_figure_of_a_result(opened, tmp_path):
    _, records = run(opened, tmp_path)
    result = result_of(opened.benchmark, opened.questions.facts, records, left_out=["x.tsv, line 3: broken"])
    assert (result["rows"], result["questions"], result["samples"]) == (40, 40, 2)
    # of eight replies in a row: three B, one said in a sentence, one wrong, one of no option, one cut off, one fault
    assert result["faults"] == {"RuntimeError('the disk is full')": 10} and result["cut_off"] == 10 and result["unread"] == 10
    assert result["unanswered"] == 0 and result["left_out"] == ["x.tsv, line 3: broken"]
    # means over rows of means over a row's samples without faults
    rows = {0: (1 + 0) / 2, 1: (0 + 1) / 2, 2: 1 / 2, 3: 0, 4: 0, 5: 1, 6: 1, 7: 1}
    made = result["scores"][""]["strict"]
    assert made["micro"]["mean"] == pytest.approx(np.mean([*rows.values()])) and made["headline"] == made["micro"]
    values = [rows[i % 8] for i in range(40)]
    assert made["micro"]["error"] == pytest.approx(np.std(values, ddof=1) / np.sqrt(40), abs=1e-6)
    even = np.mean([rows[i] for i in (0, 2, 4, 6)])
    assert made["groups"]["category"]["even"]["mean"] == pytest.approx(even) and made["groups"]["category"]["even"]["count"] == 20
    assert result["differ"] == []  # "both" and "(A)" are wrong by both rules
    assert result["cost"] == {"calls": pytest.approx(60 / 80), "invalid": 0, "tokens": pytest.approx((60 * 4 + 20 * 2) / 80)}
    assert result["per_row"][5]["scores"][""]["strict"] == [None, 1.0]
    name = "benchmark/tsv"
    assert metrics_of(result) == {f"{name}/published": 0.5625, f"{name}/strict": 0.5625, f"{name}/faults": 10 / 80}


def test_a_circular_question_is_right_where_all_of_its_rows_are(opened):
    circular = dataclasses.replace(opened.benchmark, circular=True, question=lambda task: str(int(task.uid) // 2))
    tasks = opened.questions.facts[:8]
    replies = ["B", "B", "B", "A", "A", "A", "B", "fault"]
    records = [
        {"uid": task.uid, "samples": [{"reply": reply, "end": "ANSWERED", "calls": 0, "invalid": 0, "tokens": 1,
                                       "fault": "x" if reply == "fault" else None}]}
        for task, reply in zip(tasks, replies, strict=True)
    ]  # fmt: skip
    result = result_of(circular, tasks, records)
    assert result["scores"][""]["strict"]["micro"]["mean"] == pytest.approx(1 / 3, abs=1e-6)  # the fourth question has a fault
    plain = result_of(opened.benchmark, tasks, records)["scores"][""]["strict"]["micro"]
    assert plain["mean"] == pytest.approx(3 / 7 + 1 / 7, abs=1e-6)


def test_the_published_average_may_be_over_groups(opened):
    macro = dataclasses.replace(opened.benchmark, headline="category")
    rest = {"end": "ANSWERED", "calls": 0, "invalid": 0, "tokens": 1, "fault": None}
    kinds = {task.uid: task.kind for task in opened.questions.facts[:5]}
    records = [{"uid": uid, "samples": [{"reply": "B" if kind == "odd" else "A"} | rest]} for uid, kind in kinds.items()]
    result = result_of(macro, opened.questions.facts[:5], records)
    made = result["scores"][""]["strict"]
    assert (made["headline"]["mean"], made["micro"]["mean"]) == (0.5, 0.4)
    lines = rows_of(result | {"headline": "category"}, "set")
    assert [line[0] for line in lines] == ["set, macro over category", "  micro"]
    assert [line[2].split(" ")[0] for line in lines] == ["50.0", "40.0"]


def test_what_counts_as_a_reply():
    task = Task("a", "?", (), "B", "choice")
    void = finished(task, ["B.<|im_end|>"], None, EndReason.VOID)
    cut = finished(task, ["B and"], None, EndReason.TRUNCATED)
    assert [reply_of(t, True) for t in (void, cut, finished(task, ["x"], "A"))] == ["B.", None, "A"]
    assert [reply_of(t, False) for t in (void, cut, finished(task, ["x"], "A"))] == [None, None, "A"]


def result_file(path, opened, script, tmp_path):
    path.mkdir()
    records = run(opened, path, script=script)[1]
    result = {"model": path.name, "benchmarks": {"tsv-set": result_of(opened.benchmark, opened.questions.facts, records)}}
    (path / "result.json").write_text(json.dumps(result))
    return path


def test_two_results_are_compared_on_the_same_rows(opened, tmp_path, capsys):
    a = result_file(tmp_path / "a", opened, lambda task, i: "A" if int(task.uid) % 2 else "B", tmp_path)
    b = result_file(tmp_path / "b", opened, lambda task, i: "B", tmp_path)
    fault = RuntimeError("x")
    c = result_file(tmp_path / "c", opened, lambda task, i: fault if int(task.uid) < 10 else "B", tmp_path)
    assert compare.main([str(a), str(b), "--out", str(tmp_path / "out.json")]) == 0
    [published, strict] = json.loads((tmp_path / "out.json").read_text())["lines"]
    assert (strict["rows"], strict["a"], strict["b"], strict["difference"], strict["shown"]) == (40, 0.5, 1.0, 0.5, True)
    assert published | {"rule": "strict"} == strict and 0 < strict["low"] < 0.5 < strict["high"] < 1
    assert " yes " in capsys.readouterr().out
    assert compare.main([str(b), str(c), "--out", str(tmp_path / "out.json")]) == 0
    assert [line["rows"] for line in json.loads((tmp_path / "out.json").read_text())["lines"]] == [30, 30]
    assert "not shown" in capsys.readouterr().out


def test_results_of_other_questions_are_not_compared(opened, tmp_path, capsys):
    a = result_file(tmp_path / "a", opened, says, tmp_path)
    found = json.loads((a / "result.json").read_text())
    found["benchmarks"]["tsv-set"]["per_row"].pop()
    (tmp_path / "b.json").write_text(json.dumps(found))
    (tmp_path / "c.json").write_text(json.dumps({"model": "c", "benchmarks": {"vstar": {}}}))
    for other, words in (("b.json", "(1 rows are in one only)"), ("c.json", "share no benchmark"), ("d.json", "is no result")):
        assert compare.main([str(a), str(tmp_path / other)]) == 2
        assert words in capsys.readouterr().err


def test_predictions_are_read_back_in_the_forms_of_other_harnesses(opened, tmp_path):
    _, records = run(opened, tmp_path)
    write_predictions(tmp_path / "out", "set", opened.questions.facts, records)
    with open(tmp_path / "out" / "set.vlmevalkit.tsv", newline="") as file:
        rows = [*csv.DictReader(file, delimiter="\t")]
    assert [*rows[0]] == ["index", "question", "A", "B", "answer", "category", "prediction"] and len(rows) == 40
    assert [row["prediction"] for row in rows[:4]] == ["B", "(A)", "The answer is B", ""]
    lines = [json.loads(line) for line in (tmp_path / "out" / "set.lmms_eval.jsonl").read_text().splitlines()]
    assert lines[1]["target"] == "B" and lines[1]["resps"] == [["(A)", "The answer is B"]] and lines[1]["doc"]["id"] == "1"


def test_the_page_tells_what_the_result_says(opened, tmp_path):
    _, records = run(opened, tmp_path, script=lambda task, i: "<i>blue" if task.uid == "0" else says(task, i))
    result = result_of(opened.benchmark, opened.questions.facts, records)
    said = " ".join(about(result, 8.0))
    assert "10 of 80" not in said and "10 cut off: wrong" in said and "samples failed on an environment error" in said
    assert "0.10 s" in said and "A question is right" not in said
    page = write_page(tmp_path, "my <model>", {"tsv-set": result}, {"tsv-set": 8.0}).read_text()
    assert "my &lt;model&gt;" in page and "&lt;i&gt;blue" in page and "<i>blue" not in page
    assert "category: even" in page and "http" not in page.replace("http://www.w3.org", "")


def test_a_run_is_evaluated_on_benchmarks_beside_its_target(opened):
    log = SimpleNamespace(write=lambda *args, **how: None)
    console = Console(file=io.StringIO(), width=200)
    cfg = small_config(eval={"groups": 4})
    collector = Scripted(cfg, lambda task, i: "B" if task.answer == "B" else "7")
    collector.names = ()
    held_out = HeldOut(collector, [Task("h", "?", (), "7", "number")] * 3, cfg, log, console, {"retention": opened})
    metrics = held_out("weights", 20, 5, "step 5")
    assert metrics["accuracy"] == 1.0 and collector.asked == [["h"] * 3, [str(i) for i in range(16)], ["16", "17", "18", "19"]]
    name = "benchmark/retention"
    assert (metrics[f"{name}/published"], metrics[f"{name}/strict"], metrics[f"{name}/faults"]) == (1.0, 1.0, 0.0)
    assert "retention, 20 rows: published 100.0 %, strict 100.0 %, faults 0.0 %" in console.file.getvalue()


def test_names_of_results():
    assert labels(["vstar", "own=a/b.jsonl", "own=c.jsonl"]) == {
        "vstar": "vstar",
        "own-b": "own=a/b.jsonl",
        "own-c": "own=c.jsonl",
    }
    with pytest.raises(ValueError, match="named twice"):
        labels(["vstar", "vstar=x"])
