"""A run's trajectories and report in the browser: `python -m imagent_jax.view RUN [--no-open]`."""

import argparse
import json
import os
import shutil
import sys
import webbrowser
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from imagent_jax.runs.reader import RunLog, read_run, step_of
from imagent_jax.runs.report import ASSETS, write_report

KINDS = ("TEXT", "TOOL_CALL", "INVALID_CALL", "ANSWER", "OBSERVATION", "PAD")  # TokenKind, without importing jax
FIELDS = (
    "chunk",
    "line",
    "task",
    "rollout",
    "right",
    "reward",
    "advantage",
    "end",
    "executed",
    "invalid",
    "faulted",
    "tools",
    "answer",
)
PAGE = ("index.html", "theme.css", "view.css", "view.js")


def write_view(path: Path) -> tuple[Path, RunLog]:
    """Write the static viewer `view/` into the folder of a run, replacing an earlier one. It needs neither network nor server.

    `data/index.js` has one row per trajectory. Each log file becomes a script of complete records, loaded on demand. Images are
    hard-linked (or copied), so that the folder can be moved.

    Returns:
        Path of the page, and the run's log.
    Raises:
        ValueError: see `read_run`.
    """
    run = read_run(path)
    report = write_report(path)
    out, logged = path / "view", path / "trajectories" / "images"
    shutil.rmtree(out, ignore_errors=True)
    for folder in ("data", "images"):
        (out / folder).mkdir(parents=True)
    for name in PAGE:
        shutil.copyfile(ASSETS / name, out / name)
    shutil.copyfile(report, out / "report.html")
    used = {image["file"] for records in run.trajectories.values() for r in records for image in r["images"] if "file" in image}
    for name in used:
        if (logged / name).is_file():
            _link(logged / name, out / "images" / name)
    (out / "data" / "index.js").write_text(f"const RUN={_script(index(run))};\n")
    for name, records in run.trajectories.items():
        (out / "data" / f"{name}.js").write_text(f"CHUNK({_script(name)},{_script(records)});\n")
    return out / "index.html", run


def index(run: RunLog) -> dict[str, Any]:
    """Return the data of the list and its filters, small enough to load at once."""
    tasks: dict[str, int] = {}
    task_rows, tools, rows, chunks = [], [], [], []
    for c, (stem, records) in enumerate(run.trajectories.items()):
        name, step = step_of(stem)
        label = f"step {step}" if name == "train" else name
        chunks.append({"name": stem, "label": label, "split": "train" if name == "train" else "held-out"})
        for line, r in enumerate(records):
            if r["task"] not in tasks:
                tasks[r["task"]] = len(tasks)
                task_rows.append([r["task"], r["kind"], r["question"], r["truth"]])
            calls = [turn["call"] for turn in r["turns"] if turn["call"]]
            names = sorted({call["name"] for call in calls if call["status"] == "EXECUTED"})
            tools += [name for name in names if name not in tools]
            count = [sum(call["status"] == status for call in calls) for status in ("EXECUTED", "INVALID", "FAULT")]
            reward, advantage = (x if x is None else round(x, 4) for x in (r["rewards"].get("total"), r["advantage"]))
            rows.append(
                [
                    c,
                    line,
                    tasks[r["task"]],
                    r["rollout"],
                    int(r["right"]),
                    reward,
                    advantage,
                    r["end"],
                    *count,
                    [tools.index(name) for name in names],
                    r["answer"],
                ]
            )
    cfg = run.config
    about = f"{cfg['model']['path']} on {cfg['data']['name']}, {len(run.steps)} of {cfg['run']['steps']} steps"
    return {
        "name": cfg["run"]["name"],
        "about": about,
        "report": True,
        "kinds": KINDS,
        "tools": tools,
        "chunks": chunks,
        "tasks": task_rows,
        "fields": FIELDS,
        "rows": rows,
    }


def _script(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or no hard links
        shutil.copyfile(source, target)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command: exit code 0, or 2 after one sentence about bad input."""
    parser = argparse.ArgumentParser(prog="python -m imagent_jax.view", description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run, such as runs/tiny")
    parser.add_argument("--no-open", action="store_true", help="write the page and do not open it")
    args = parser.parse_args(argv)
    try:
        page, run = write_view(args.run)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    count = sum(len(records) for records in run.trajectories.values())
    torn = f" {run.torn} log line(s) were not whole and are left out." if run.torn else ""
    print(f"Wrote {count} trajectories of {len(run.trajectories)} logs to {page.parent}, and {args.run / 'report.html'}.{torn}")
    if args.no_open or not webbrowser.open(page.resolve().as_uri()):
        print(f"Open {page.resolve()} in a browser.")
    return 0
