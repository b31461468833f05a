"""What a run has written, read back: for the report and the trajectory viewer."""

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml


@dataclass(frozen=True)
class RunLog:
    """What a run has written: settings, metrics in order, trajectories by log file in order, rows of data left out.

    `torn` counts lines that are not whole (of a run that was killed, or is writing now).
    """

    path: Path
    config: dict[str, Any]
    metrics: list[dict[str, Any]]
    trajectories: dict[str, list[dict[str, Any]]]
    faults: list[str]
    torn: int

    @property
    def steps(self) -> list[dict[str, Any]]:
        return [record for record in self.metrics if "reward/total" in record]

    @property
    def evaluations(self) -> dict[str, dict[str, float]]:
        """Held-out metrics by name: base, step S, trained."""
        found = {}
        for record in self.metrics:
            for prefix, name in (("base/", "base"), ("eval/", f"step {record['step']}"), ("final/", "trained")):
                if values := {k.removeprefix(prefix): v for k, v in record.items() if k.startswith(prefix)}:
                    found[name] = values
        return found


def read_run(path: Path) -> RunLog:
    """Reads a run's folder.

    Raises:
        ValueError: there is no such folder, it is not a run's, or nothing has been logged yet; with the remedy.
    """
    if not path.is_dir():
        beside = sorted(p.parent.name for p in path.parent.glob("*/metrics.jsonl")) if path.parent.is_dir() else []
        there = f"{path.parent} has {', '.join(beside)}" if beside else "name the folder of a run, such as runs/tiny"
        raise ValueError(f"There is no run {path}; {there}.")
    if not (path / "config.yaml").is_file():
        raise ValueError(f"{path} is not a run, it holds no config.yaml; name a folder such as runs/tiny.")
    log = path / "metrics.jsonl"
    metrics, torn = _lines(log) if log.is_file() else ([], 0)
    if not metrics:
        raise ValueError(f"{path} has no metrics yet; wait until the run has evaluated its base, or start it again.")
    trajectories = {}
    logs = (path / "trajectories").glob("*-[0-9]*.jsonl")
    for file in sorted(logs, key=lambda file: (step_of(file.stem)[1], step_of(file.stem)[0] != "train")):
        trajectories[file.stem], broken = _lines(file, needs="images")
        torn += broken
    faults = path / "data_faults.txt"
    return RunLog(path, yaml.safe_load((path / "config.yaml").read_text()), metrics, trajectories,
                  faults.read_text().splitlines() if faults.is_file() else [], torn)  # fmt: skip


def phases(record: dict[str, Any]) -> dict[str, float]:
    """Seconds of a step by what they were spent on; together they are its `time/step`."""
    wholes = "time/step", "time/total", "time/evaluation"
    return {k.removeprefix("time/"): v for k, v in record.items() if k.startswith("time/") and k not in wholes}


def step_of(stem: str) -> tuple[str, int]:
    """("train", 12) of "train-000012"."""
    name, _, step = stem.rpartition("-")
    return name, int(step)


def _lines(file: Path, needs: str = "step") -> tuple[list[dict[str, Any]], int]:
    whole, lines = [], file.read_text().splitlines()
    for line in lines:
        with contextlib.suppress(ValueError):
            record = json.loads(line)
            if needs in record:  # an earlier version logged trajectories without
                whole.append(record)
    return whole, len(lines) - len(whole)
