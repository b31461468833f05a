"""The report of a run: its figures, and a run that is not whole."""

import re
import shutil

import pytest

from imagent_jax.report import chart, write_report
from imagent_jax.run_log import read_run


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
    assert {"A fault of the world", "An invalid call", "Ended: repeated"} <= set(kinds)
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


@pytest.mark.parametrize(
    "ys", [[0.0], [0.0, 0.0], [-3.0, -3.0], [1e-9, 2e-9], [-0.2, 5e6], [0.30000000000000004] * 20, [7.0]]
)
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
