"""The report of a run: its figures, and a run that is not whole."""

import base64
import io
import re
import shutil
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from imagent_jax.runs import examples as cases
from imagent_jax.runs import report
from imagent_jax.runs.examples import Pictures, instructive, source, within
from imagent_jax.runs.reader import RunLog, read_run
from imagent_jax.runs.report import chart, print_step, write_report


def test_the_report_shows_curves_tables_cases_and_faults(made, page):
    _, path, _ = made
    run, text = read_run(path), (path / "report.html").read_text()
    assert not re.search(r'(?:src|href)="(?!data:|#)', text) and "@import" not in text and "<!--" not in text
    page.goto((path / "report.html").as_uri())
    headline = page.inner_text(".headline")
    assert headline.startswith("33.3 % → 83.3 %")
    titles = page.locator(".chart figcaption > b").all_text_contents()
    assert {"reward", "accuracy", "share dropped by the mask", "KL", "gradient norm", "seconds a step"} <= set(titles)
    kinds = page.locator(".case .kind").all_text_contents()
    assert kinds.count("Wrong before, right now") == 4 and kinds.count("Right before, wrong now") == 1
    assert 8 <= len(kinds) <= 12
    assert {"An environment error", "An invalid call", "Ended: repeated"} <= set(kinds)
    body = page.inner_text("main")
    assert "the disk is full" in body and "1 row(s) of data were left out" in body and "line 7: images: a.png" in body
    times = page.locator("h2:has-text('Where the time went') + table td:nth-child(3)").all_text_contents()
    spent = [float(text.split()[0]) for text in times]
    assert spent[-1] == pytest.approx(sum(spent[:-1]), abs=0.5)
    assert spent[-1] == pytest.approx(run.metrics[-1]["time/total"], abs=0.1)
    widths = page.locator(".picture use").evaluate_all("(uses) => uses.map((use) => use.getBoundingClientRect().width)")
    assert widths and min(widths) > 10


def test_the_pointer_reads_all_charts_at_a_step(made, page):
    _, path, _ = made
    page.goto((path / "report.html").as_uri())
    chart = page.locator(".chart svg").first
    box = chart.bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.5, box["y"] + box["height"] / 2)
    second = read_run(path).steps[1]
    told = page.locator(".chart").filter(has_text="gradient norm").locator("span b").text_content()
    assert float(told) == pytest.approx(second["grad_norm"], rel=1e-2)


@pytest.mark.parametrize("ys", [[0.0], [0.0, 0.0], [-3.0, -3.0], [1e-9, 2e-9], [-0.2, 5e6], [0.30000000000000004] * 20, [7.0]])
def test_a_chart_holds_any_figures(ys):
    text = chart("figures", {"a": list(enumerate(ys, 1)), "b": [(1, 0.5 * ys[0])]})
    height = float(re.search(r'viewBox="0 0 [0-9]+ ([0-9]+)"', text)[1])
    points = re.findall(r"([0-9.-]+),([0-9.-]+)", " ".join(re.findall(r'points="([^"]*)"', text)))
    assert len(points) >= len(ys) and all(0 <= float(y) <= height for _, y in points)
    assert 2 <= text.count("class=grid") <= 6


def test_a_run_that_was_stopped_or_has_only_its_base_has_a_report(made, tmp_path):
    _, path, _ = made
    for kept in (1, 2):
        shutil.copytree(path, tmp_path / str(kept), ignore=shutil.ignore_patterns("view", "checkpoints", "report.html"))
        log = tmp_path / str(kept) / "metrics.jsonl"
        log.write_text("".join(f"{line}\n" for line in log.read_text().splitlines()[:kept]) + '{"step": 2, "rew')
        text = write_report(tmp_path / str(kept)).read_text()
        assert "the run has not ended" in text and "1 log line(s) were not whole" in text
        assert ("No training step has been logged yet" in text) == (kept == 1)


# ---- figures ----------------------------------------------------------------------------------------------------------


def run_of(metrics=(), trajectories=None, faults=(), torn=0, path=Path(".")) -> RunLog:
    return RunLog(path, {}, list(metrics), trajectories or {}, list(faults), torn)


def step(number: int, **values) -> dict:
    return {"step": number, "reward/total": 1.0} | {key.replace("__", "/"): value for key, value in values.items()}


def test_a_chart_places_figures_between_round_numbers():
    text = chart("a & b", {"one": [(1, 0.0), (3, 4.0)], "two <": [(2, 1.0)]}, width=146, height=128)
    assert re.findall(r'<polyline class="s(\d)" points="([^"]*)"', text) == [("0", "38.0,108.0 138.0,8.0"), ("1", "88.0,83.0")]
    assert re.findall(r'<circle class="s(\d)" cx=([\d.]+) cy=([\d.]+)', text) == [
        ("0", "38.0", "108.0"), ("0", "138.0", "8.0"), ("1", "88.0", "83.0")]  # fmt: skip
    assert re.findall(r"text-anchor=end>([^<]*)</text>", text) == ["0", "2", "4", "3"]  # the last is of the steps
    assert '<span class="s0">one <b>4</b></span><span class="s1">two &lt; <b>1</b></span>' in text and "<b>a &amp; b</b>" in text
    assert (
        'data-chart="{&quot;x&quot;: [1, 3], &quot;left&quot;: 38, &quot;right&quot;: 138, &quot;lines&quot;: [[[1, 0.0]' in text
    )


def test_many_points_are_drawn_faint_and_as_a_running_mean():
    """At 12 points; the mean weighs each earlier point by 0.8."""
    points = [(i, float(i % 2)) for i in range(12)]
    assert "raw" not in chart("t", {"a": points[:11]}) and chart("t", {"a": points[:11]}).count("<circle") == 11
    text = chart("t", {"a": points}, width=146, height=128)
    assert text.count("<circle") == 0 and '<polyline class="raw s0"' in text
    weights = [0.8 ** (11 - i) for i in range(12)]
    last = sum(w * y for w, (_, y) in zip(weights, points, strict=True)) / sum(weights)
    y = float(re.search(r'<polyline class="s0" points="[^"]*,([\d.]+)"', text)[1])
    assert y == pytest.approx(108 - 100 * last, abs=0.06)
    assert report._smooth([(0, 2.0), (1, 4.0)]) == [(0, 2.0), (1, pytest.approx((0.8 * 2 + 4) / 1.8))]


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [(0.0, 1.0, [0, 0.5, 1]), (0.0, 0.31, [0, 0.1, 0.2, 0.3, 0.4]), (0.0, 0.0, [0, 0.5, 1]), (-1.0, 2.0, [-1, 0, 1, 2]),
     (0.0, 1500.0, [0, 500, 1000, 1500]), (-0.2, 0.0, [-0.2, -0.1, 0])],
)  # fmt: skip
def test_ticks_are_round(low, high, ticks):
    assert report._ticks(low, high) == ticks


def test_curves_are_of_the_metrics_they_name():
    run = run_of([{"step": 0, "base/accuracy": 0.25}, step(1, accuracy=0.5, reward__answer=0.5, length=float("nan"),
                                                                kl__sampler=0.125),
                  step(2, accuracy=0.75, eval__accuracy=0.625), {"step": 2, "final/accuracy": 0.875}])  # fmt: skip
    text = report._curves(run).replace("&quot;", '"')
    titles = re.findall(r"<figcaption><b>([^<]*)</b>", text)
    assert titles == ["reward", "accuracy", "KL"]
    assert "total <b>1</b>" in text and "answer <b>0.5</b>" in text and "to the sampler <b>0.125</b>" in text
    assert '"lines": [[[1, 0.5], [2, 0.75]], [[0, 0.25], [2, 0.625], [2, 0.875]]]' in text
    assert report._curves(run_of([{"step": 0, "base/accuracy": 0.25}])) == ""


def test_the_table_has_shares_in_percent_and_counts_as_they_are():
    text = report._table({
        "base": {"accuracy": 0.5, "tools/calls": 1.5, "end/void": 0.0, "end/fault": 0.25, "time/evaluation": 3.0},
        "trained": {"accuracy": 0.625, "tools/calls": 2.0, "tools/invalid": 0.25, "length": 60.0, "end/void": 0.0,
                    "end/fault": 0.0, "tools/time/search": 0.5, "time/evaluation": 3.0},
    })  # fmt: skip
    rows = {
        name: re.findall(r"<td>([^<]*)</td>", cells)
        for name, cells in re.findall(r"<th>([^<]*)</th>((?:<td>.*?</td>)*)</tr>", text)
    }
    assert rows.pop("trained") == []
    assert rows == {"accuracy": ["50.0 %", "62.5 %"], "tools/calls": ["1.50", "2.00"], "tools/invalid": ["–", "0.25"],
                    "tools/time/search": ["–", "0.50"], "length": ["–", "60.00"], "end/fault": ["25.0 %", "0.0 %"]}  # fmt: skip
    assert "<tr class=main><th>accuracy" in text and text.count("class=main") == 1
    assert report._table({}) == "<p>No evaluation has been logged yet.</p>"


def test_the_time_of_a_run_is_told_by_what_it_was_spent_on():
    run = run_of([
        {"step": 0, "base/time/evaluation": 5.0}, step(1, time__train=2.0, time__judge=1.0, time__step=3.0, time__total=10.0),
        step(2, time__train=3.0, time__step=3.0, time__total=14.0),
        {"step": 2, "final/time/evaluation": 4.0, "time/total": 20.0},
    ])  # fmt: skip
    row = r"<th>([^<]*)</th><td(?: class=bar><i style='width:([\d.]+)%'></i)?></td><td>([^<]*)</td><td>([^<]*)</td>"
    found = re.findall(row, report._times(run))
    assert found == [("train", "55.6", "5.0 s", "25.0 %"), ("judge", "11.1", "1.0 s", "5.0 %"),
                     ("evaluation", "100.0", "9.0 s", "45.0 %"),
                     ("starting, saving and the rest", "55.6", "5.0 s", "25.0 %"), ("in all", "", "20.0 s", "")]  # fmt: skip


def test_faults_are_counted_and_the_first_hundred_listed():
    text = report._faults(
        run_of([step(1, end__fault=0.25), step(2, end__fault=0.0)], faults=[f"row {i} <" for i in range(102)], torn=3)
    )
    assert "102 row(s) of data were left out for faults; 12.50 % of the training trajectories" in text and "and 2 more in" in text
    assert text.count("<li>") == 100 and "<li>row 99 &lt;</li>" in text and " 3 log line(s) were not whole" in text
    assert "more in" not in report._faults(run_of(faults=["a"] * 100)) and "log line" not in report._faults(run_of())
    assert (report._number(999.4), report._number(0.12345), report._number(-1234.5)) == ("999", "0.123", "-1,234")


# ---- cases ------------------------------------------------------------------------------------------------------------


def told(task="t", rollout=0, right=False, end="ANSWERED", calls=(), said="no", **more) -> dict:
    turns = [{"text": "x", "call": {"status": status, "said": [said], "images": []}} for status in calls]
    return {"task": task, "rollout": rollout, "right": right, "end": end, "turns": [*turns, {"text": "y", "call": None}],
            "rewards": {}, "advantage": None, "error": None} | more  # fmt: skip


def test_cases_are_those_that_changed_that_misuse_and_that_spread():
    base = [told(f"q{i}", right=i in (7, 8, 9)) for i in range(11)]
    trained = [told(f"q{i}", right=i not in (7, 8, 9), calls=["EXECUTED"] * (i % 6)) for i in range(11)]
    train = [told("a", 0, right=True, rewards={"total": 0.5}, advantage=0.25),
             told("a", 1, right=True, rewards={"total": 1.5}, advantage=1.0),
             told("a", 2, rewards={"total": -1.0}, advantage=-1.5),
             *(told("b", n, right=True) for n in (0, 1))]  # fmt: skip
    earlier = [told("e", 0, right=True, advantage=1.0), told("e", 5, end="REPEATED"),
               told("e", 6, calls=["INVALID"], said="bad box"),
               told("e", 7, calls=["INVALID"], said="bad box"),
               told("e", 8, calls=["INVALID"], said="bad image"),
               *(told("e", n, end="FAULT") for n in (3, 9))]  # fmt: skip
    found = instructive(
        run_of(trajectories={"base-000000": base, "train-000004": earlier, "train-000012": train, "trained-000012": trained})
    )
    titles = [title for title, _ in found]
    assert titles == ["Wrong before, right now"] * 4 + ["Right before, wrong now"] * 2 + [
        "An environment error", "An invalid call", "An invalid call", "Ended: repeated",
        "One group, step 12: the best and the worst rollout"]  # fmt: skip
    assert [record["task"] for _, ((_, record), _) in found[:6]] == [
        "q5",
        "q4",
        "q10",
        "q3",
        "q9",
        "q8",
    ]  # with the most calls first
    assert all([label for label, _ in pair] == ["base", "trained"] for _, pair in found[:6])
    assert [pair[0][0] for _, pair in found[6:10]] == [f"step 4, rollout {n}" for n in (3, 6, 8, 5)]
    assert [(label, record["rollout"]) for label, record in found[10][1]] == [
        ("rollout 1, advantage +1.00", 1), ("rollout 2, advantage -1.50", 2)]  # fmt: skip
    only = instructive(run_of(trajectories={"base-000000": [told(end="TRUNCATED")]}))
    assert [(title, [label for label, _ in pair]) for title, pair in only] == [("Ended: truncated", ["base"])]


IMAGES = [
    {"file": "a.png", "size": [100, 80]}, {"parent": 1, "box": [10, 20, 60, 70], "size": [50, 50], "origin": "crop"},
    {"parent": 2, "box": [5, 6, 15, 26], "size": [10, 20]}, {"parent": 2, "size": [50, 50]}, {"parent": 1, "size": [50, 40]},
    {"file": "b.png", "size": [30, 30]}, {"parent": 4, "box": [1, 2, 3, 4], "size": [2, 2]},
]  # fmt: skip


def test_the_box_of_an_image_in_those_it_was_made_from():
    for n, box in (
        (1, [0, 0, 100, 80]),
        (2, [10, 20, 60, 70]),
        (3, [15, 26, 25, 46]),
        (4, [10, 20, 60, 70]),
        (7, [11, 22, 13, 24]),
    ):
        assert source(IMAGES, n) == ("a.png", box) and within(IMAGES, n, 1) == box
    assert source(IMAGES, 6) == ("b.png", [0, 0, 30, 30]) and within(IMAGES, 6, 1) is None and within(IMAGES, 1, 2) is None
    assert (
        within(IMAGES, 3, 2) == [5, 6, 15, 26] and within(IMAGES, 3, 3) == [0, 0, 10, 20] and within(IMAGES, 7, 4) == [1, 2, 3, 4]
    )
    assert within(IMAGES, 5, 1) is None  # of another size: made, not cut


def test_pictures_are_embedded_once_and_cut_where_they_were_cut(tmp_path, monkeypatch):
    folder = tmp_path / "trajectories" / "images"
    folder.mkdir(parents=True)
    Image.new("RGB", (100, 80), "red").save(folder / "a.png")
    pictures = Pictures(run_of(path=tmp_path).path)
    svg = pictures.svg(IMAGES, 2, 25, [([1, 2, 11, 22], "<3>", True), ([0, 0, 5, 5], "4", False)])
    assert svg.startswith('<svg class=picture viewBox="10 20 50 50" width=25 height=25><use href="#a.png" />')
    assert (
        "<g class=good><rect x=11 y=22 width=10 height=20 /><text x=11 y=14.0 font-size=22.0>&lt;3&gt;</text></g><g class=bad>"
        in svg
    )
    assert "width=12 height=25" in pictures.svg(IMAGES, 3, 25)
    pictures.svg(IMAGES, 6, 25)
    embedded = pictures.definitions()
    data = base64.b64encode((folder / "a.png").read_bytes()).decode()
    assert embedded == ('<image id="a.png" width="100" height="80" preserveAspectRatio="none" '
                        f'href="data:image/png;base64,{data}" />'
                        '<rect id="b.png" width="30" height="30" fill="#8884" />')  # fmt: skip
    monkeypatch.setattr(cases, "LARGEST_FILE", 10)
    monkeypatch.setattr(cases, "LARGEST_SIDE", 50)
    small = re.search(r"data:image/jpeg;base64,([^\"]*)", pictures.definitions())[1]
    assert Image.open(io.BytesIO(base64.b64decode(small))).size == (50, 40)


def test_a_case_tells_what_was_asked_said_called_and_seen():
    call = {"status": "EXECUTED", "images": [2], "said": ["Image 2: crop of Image 1", "Image 1 <is> a hit"]}
    bad = {"status": "INVALID", "images": [], "said": ["no", "box"]}
    one = told(
        right=True, question="Which <one>?", truth="A", answer="A", images=IMAGES, turns=[{"text": "Look <", "call": call}]
    )
    two = told(end="FAULT", question="Which <one>?", truth="A", answer=None, images=IMAGES, error="Traceback\nOSError: full\n",
               turns=[{"text": "Hm", "call": bad}])  # fmt: skip
    text = Pictures(run_of().path).case("Title", [("base", one), ("trained", two)])
    assert "<p class=kind>Title</p><h3>Which &lt;one&gt;?</h3><p>truth <b>A</b></p>" in text
    assert re.findall(r"<figcaption>([^<]*)</figcaption>", text) == ["Image 1", "Image 6", "Image 2: crop of Image 1"]
    assert (
        "<div class=good><h4>base <span>✓ A</span></h4><pre>Look &lt;</pre><pre class=said>Image 1 &lt;is&gt; a hit</pre><figure>"
        in text
    )
    assert "<div class=bad><h4>trained <span>✗ no answer</span></h4><pre>Hm</pre><p class=error>no box</p>" in text
    assert "<p class=error>ended: fault: OSError: full</p>" in text and text.count("class=error") == 2
    assert (
        text.count("<g class=good><rect x=10 y=20 width=50 height=50 />")
        == 1
        == text.count("<g class=bad><rect x=10 y=20 width=50")
    )


def test_progress_is_a_status_on_a_terminal_and_else_a_line_every_ten_seconds(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(report.time, "monotonic", lambda: now[0])
    for terminal in (True, False):
        console = Console(file=io.StringIO(), force_terminal=terminal, width=100)
        status = console.status("Loading")
        show = report.progress_on(console, status)
        for now[0] in (101.0, 109.0, 111.0, 112.0, 122.0):
            show(f"at {now[0]:.0f}")
        assert status.status == ("at 122" if terminal else "Loading")
        assert console.file.getvalue() == ("" if terminal else "at 111\nat 122\n")
        now[0] = 100.0


def test_a_warning_is_printed_when_it_begins_and_when_its_words_change_but_not_when_its_figures_do():
    figures = {"time/step": 2.0, "time/judge": 0.5, "time/train": 0.5, "reward/total": 1.0, "accuracy": 0.5, "tools/calls": 1.0,
               "mask/dropped_tokens": 0.5}  # fmt: skip

    def printed(now, before):
        console = Console(file=io.StringIO(), width=200)
        print_step(console, figures | {"warnings": {"mostly_masked": now} if now else {}}, 3, 9, before)
        return console.file.getvalue().count("warning")

    masked = "The mask drops {} % of the tokens, most of them for: {}."
    assert printed(masked.format(60, "void"), {}) == 1
    assert printed(masked.format(61, "void"), {"mostly_masked": masked.format(60, "void")}) == 0
    assert printed(masked.format(60, "fault"), {"mostly_masked": masked.format(60, "void")}) == 1
    assert printed(masked.format(60, "void"), {"calls_invalid": masked.format(60, "void")}) == 1 and printed("", {}) == 0
