"""The report of a run, `report.html`, a self-contained file: curves, base against trained, time by phase, examples, warnings."""

import html
import json
import math
import re
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.status import Status

from imagent_jax.runs.examples import Pictures, instructive
from imagent_jax.runs.reader import RunLog, phases, read_run

ASSETS = Path(__file__).parent / "assets"
CHARTS: dict[str, dict[str, str]] = {  # title: label -> key of metrics.jsonl, "*": each source; {}: keys with the title before
    "reward": {},
    "accuracy": {"training": "accuracy"},
    "tool calls a rollout": {"calls": "tools/calls", "invalid": "tools/invalid"},
    "accuracy by source": {"": "source/*/accuracy"},
    "reward by source": {"": "source/*/reward"},
    "groups without spread by source": {"": "source/*/flat"},
    "share dropped by the mask": {"tokens": "mask/dropped_tokens", "trajectories": "mask/dropped_trajectories"},
    "entropy, nats a token": {"entropy": "entropy"},
    "KL": {"to the sampler": "kl/sampler", "to the reference": "kl/reference"},
    "importance weights": {"mean": "importance/mean", "at the cap": "importance/capped"},
    "gradient norm": {"norm": "grad_norm"},
    "groups without spread": {"share": "groups/flat", "as sampled": "groups/flat_sampled"},
    "share of tokens clipped": {"low": "clip/low", "high": "clip/high"},
    "calling rollouts, more often right by": {"gain in a group": "tools/gain"},
    "tokens a response": {"length": "length", "sampled": "length/sampled"},
    "seconds a step": {"step": "time/step", "train": "time/train", "decode": "time/decode"},
}
PLAIN = ("length", "tools/calls", "tools/invalid", "tools/time/")  # metrics that are not shares


def write_report(path: Path) -> Path:
    """Write `report.html` into the folder of a run and return its path.

    Raises:
        ValueError: see `read_run`.
    """
    run = read_run(path)
    e, pictures = html.escape, Pictures(run.path)
    cfg = run.config
    seconds = max((record.get("time/total", 0.0) for record in run.metrics), default=0.0)
    about = (
        f"{cfg['model']['path']} on {cfg['data']['name']} · {len(run.steps)} of {cfg['run']['steps']} steps of "
        f"{cfg['rollout']['groups']} tasks × {cfg['rollout']['group_size']} rollouts · learning rate "
        f"{cfg['optim']['learning_rate']:g} · seed {cfg['run']['seed']} · {seconds:.0f} s"
    )
    cases = "".join(pictures.case(title, records) for title, records in instructive(run))
    parts = {
        "NAME": e(cfg["run"]["name"]),
        "ABOUT": e(about),
        "THEME": (ASSETS / "theme.css").read_text(),
        "STYLE": (ASSETS / "report.css").read_text(),
        "SCRIPT": (ASSETS / "report.js").read_text(),
        "HEADLINE": _headline(run),
        "CURVES": _curves(run) or "<p>No training step has been logged yet.</p>",
        "WARNINGS": _warnings(run),
        "TABLE": _table(run.evaluations),
        "TIMES": _times(run),
        "FAULTS": _faults(run),
        "IMAGES": pictures.definitions(),
        "CASES": cases or "<p>No trajectories were logged.</p>",
    }
    page = re.sub(r"<!--(\w+)-->", lambda mark: parts[mark[1]], (ASSETS / "report.html").read_text())
    out = path / "report.html"
    out.write_text(page)
    return out


def print_step(console: Console, metrics: dict[str, Any], step: int, steps: int, said: dict[str, str]) -> None:
    """Print one line for a training step, and its warnings that `said` has not, or had with other words than figures."""
    rollout = metrics["time/step"] - metrics["time/judge"] - metrics["time/train"]
    console.print(
        f"step {step:4d}/{steps}  reward {metrics['reward/total']:.3f}  right {100 * metrics['accuracy']:5.1f} %  "
        f"tools {metrics['tools/calls']:.2f} a rollout  dropped {100 * metrics['mask/dropped_tokens']:4.1f} %  "
        f"{metrics['time/step']:.1f} s (rollout {rollout:.1f}, train {metrics['time/train']:.1f})"
    )
    known = {(name, _words(sentence)) for name, sentence in said.items()}
    for name, sentence in metrics.get("warnings", {}).items():
        if (name, _words(sentence)) not in known:
            console.print(f"[yellow]warning[/] ({name}): {sentence}")


def progress_on(console: Console, status: Status) -> Callable[[str], None]:
    """Return a function that shows a sentence in a console's status line; off a terminal, on a line every ten seconds."""
    said = [time.monotonic()]

    def show(sentence: str) -> None:
        if console.is_terminal:
            status.update(sentence)
        elif time.monotonic() - said[0] > 10:
            said[0] = time.monotonic()
            console.print(sentence)

    return show


def _words(sentence: str) -> str:
    return sentence.translate(str.maketrans("", "", "0123456789.e+-"))


# ---- figures ----------------------------------------------------------------------------------------------------------


def _number(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def _headline(run: RunLog) -> str:
    base, trained = run.evaluations.get("base"), run.evaluations.get("trained")
    if not base:
        return ""
    if not trained:
        words = "of held-out tasks right before training; the run has not ended"
        return f"<p class=headline>{100 * base['accuracy']:.1f} % <small>{words}</small></p>"
    words = f"of held-out tasks right, with {base['tools/calls']:.2f} → {trained['tools/calls']:.2f} calls a task"
    return f"<p class=headline>{100 * base['accuracy']:.1f} % → {100 * trained['accuracy']:.1f} % <small>{words}</small></p>"


def _curves(run: RunLog) -> str:
    charts = []
    for title, series in CHARTS.items() if run.steps else ():
        series = series or {key.removeprefix(f"{title}/"): key for key in run.steps[0] if key.startswith(f"{title}/")}
        if "*" in (key := "".join(series.values())):
            names = {logged.split("/")[1] for record in run.steps for logged in record if logged.startswith("source/")}
            series = {name: key.replace("*", name) for name in sorted(names)}
        lines = {
            label: [(r["step"], r[key]) for r in run.metrics if math.isfinite(r.get(key, math.nan))]
            for label, key in series.items()
        }
        if title == "accuracy":
            prefixes = ("base/", "eval/", "final/")
            lines["held-out"] = [(r["step"], r[p + title]) for r in run.metrics for p in prefixes if p + title in r]
        if lines := {label: points for label, points in lines.items() if points}:
            charts.append(chart(title, lines))
    return "".join(charts)


def chart(title: str, lines: dict[str, list[tuple[float, float]]], width: int = 330, height: int = 150) -> str:
    """Return curves as inline SVG, at most about four per chart: raw values faint, running mean firm; few points as dots."""
    left, right, top, bottom = 38, 8, 8, 20
    xs, ys = zip(*(point for points in lines.values() for point in points), strict=True)
    x0, x1 = min(xs), max(max(xs), min(xs) + 1)
    ticks = _ticks(min(0.0, *ys), max(0.0, *ys))
    y0, y1 = min(ticks[0], *ys), max(ticks[-1], *ys)

    def at(x, y):
        across, up = (x - x0) / (x1 - x0), (y - y0) / (y1 - y0)
        return left + across * (width - left - right), height - bottom - up * (height - top - bottom)

    def path(points):
        return " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(*point) for point in points))

    body = [
        f"<line class=grid x1={left} x2={width - right} y1={at(0, y)[1]:.1f} y2={at(0, y)[1]:.1f} />"
        f"<text x={left - 6} y={at(0, y)[1] + 3.5:.1f} text-anchor=end>{_number(y)}</text>"
        for y in ticks
    ]
    body += [f"<text x={at(x, 0)[0]:.1f} y={height - 5} text-anchor={a}>{x:g}</text>" for x, a in ((x0, "start"), (x1, "end"))]
    legend = []
    for i, (label, points) in enumerate(lines.items()):
        few = len(points) < 12
        if not few:
            body.append(f'<polyline class="raw s{i}" points="{path(points)}" />')
        body.append(f'<polyline class="s{i}" points="{path(points if few else _smooth(points))}" />')
        body += [f'<circle class="s{i}" cx={x:.1f} cy={y:.1f} r=2.5 />' for x, y in (at(*p) for p in points if few)]
        legend.append(f'<span class="s{i}">{html.escape(label)} <b>{_number(points[-1][1])}</b></span>')
    data = html.escape(json.dumps({"x": [x0, x1], "left": left, "right": width - right, "lines": list(lines.values())}))
    body.append(f"<line class=cursor y1={top} y2={height - bottom} />")
    caption = f"<figcaption><b>{html.escape(title)}</b> {''.join(legend)}</figcaption>"
    svg = f'<svg viewBox="0 0 {width} {height}">{"".join(body)}</svg>'
    return f'<figure class=chart data-chart="{data}">{caption}{svg}</figure>'


def _ticks(low: float, high: float) -> list[float]:
    high = high if high > low else low + 1.0
    span = high - low
    unit = 10 ** math.floor(math.log10(span / 2))
    step = next(unit * m for m in (1, 2, 5, 10) if span / (unit * m) <= 3.2)
    return [round(step * k, 12) for k in range(math.floor(low / step), math.ceil(high / step - 1e-9) + 1)]


def _smooth(points: list[tuple[float, float]], keep: float = 0.8) -> list[tuple[float, float]]:
    """Return the bias-corrected exponential moving average."""
    out, total, weight = [], 0.0, 0.0
    for x, y in points:
        total, weight = keep * total + y, keep * weight + 1
        out.append((x, total / weight))
    return out


def _table(evaluations: dict[str, dict[str, float]]) -> str:
    if not evaluations:
        return "<p>No evaluation has been logged yet.</p>"
    keys = [k for k in list(evaluations.values())[-1] if not k.startswith("time/")]
    rare = ("end/", "tools/calls/")
    keys = [k for k in keys if not k.startswith(rare) or any(m.get(k) for m in evaluations.values())]
    rows = []
    for key in keys:
        figures = [m.get(key) for m in evaluations.values()]
        texts = ["–" if x is None else f"{x:.2f}" if key.startswith(PLAIN) else f"{100 * x:.1f} %" for x in figures]
        cells = "".join(f"<td>{text}</td>" for text in texts)
        rows.append(f"<tr{' class=main' if key == 'accuracy' else ''}><th>{html.escape(key)}</th>{cells}</tr>")
    return f"<table><tr><th>held-out</th>{''.join(f'<th>{html.escape(n)}</th>' for n in evaluations)}</tr>{''.join(rows)}</table>"


def _times(run: RunLog) -> str:
    spent: dict[str, float] = defaultdict(float)
    for name, seconds in (item for record in run.steps for item in phases(record).items()):
        spent[name] += seconds
    spent["evaluation"] = sum(m.get("time/evaluation", 0.0) for m in run.evaluations.values())
    whole = max(max((r.get("time/total", 0.0) for r in run.metrics), default=0.0), sum(spent.values()))
    spent["starting, saving and the rest"] = max(whole - sum(spent.values()), 0.0)
    longest, rows = max(spent.values()), ""
    for name, s in spent.items():
        if s > 0:
            bar = f"<td class=bar><i style='width:{100 * s / longest:.1f}%'></i></td>"
            rows += f"<tr><th>{name}</th>{bar}<td>{s:.1f} s</td><td>{100 * s / whole:.1f} %</td></tr>"
    return f"<table>{rows}<tr class=main><th>in all</th><td></td><td>{whole:.1f} s</td><td></td></tr></table>"


def _warnings(run: RunLog) -> str:
    """Return the warnings of the guards (`rl.guards`): the last sentence of each guard, and the steps with a warning."""
    said: dict[str, list[tuple[int, str]]] = {}
    for record in run.steps:
        for name, sentence in record.get("warnings", {}).items():
            said.setdefault(name, []).append((record["step"], sentence))
    rows = ""
    for name, at in said.items():
        when = f"{len(at)} step(s) from {at[0][0]} to {at[-1][0]}"
        rows += f"<li><b>{html.escape(name)}</b>, {when}: {html.escape(at[-1][1])}</li>"
    return f"<ul>{rows}</ul>" if rows else "<p>None of the guards against collapse and hacking has warned.</p>"


def _faults(run: RunLog) -> str:
    share = sum(r.get("end/fault", 0.0) for r in run.steps) / (len(run.steps) or 1)
    rows = "".join(f"<li>{html.escape(fault)}</li>" for fault in run.faults[:100])
    torn = f" {run.torn} log line(s) were not whole and are left out here." if run.torn else ""
    more = f"<p>… and {len(run.faults) - 100} more in data_faults.txt.</p>" if len(run.faults) > 100 else ""
    world = f"{100 * share:.2f} % of the training trajectories failed on an environment error and were excluded from training."
    listed = f"<ul>{rows}</ul>{more}" if rows else ""
    return f"<p>{len(run.faults)} row(s) of data were left out for faults; {world}{torn}</p>{listed}"
