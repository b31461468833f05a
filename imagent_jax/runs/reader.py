"""Reading of a run folder, for the report and the trajectory viewer."""

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml


@dataclass(frozen=True)
class RunLog:
    """Content of a run folder.

    Attributes:
        config: the resolved settings.
        metrics: records of metrics.jsonl, in order.
        trajectories: records by log file, ordered by step.
        faults: omitted data rows.
        torn: number of incomplete lines (of a run that was killed or is being written).
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
        """Held-out metrics by name: "base", "step S", "trained"."""
        found = {}
        for record in self.metrics:
            for prefix, name in (("base/", "base"), ("eval/", f"step {record['step']}"), ("final/", "trained")):
                if values := {k.removeprefix(prefix): v for k, v in record.items() if k.startswith(prefix)}:
                    found[name] = values
        return found


def read_run(path: Path) -> RunLog:
    """Read a run folder.

    Raises:
        ValueError: no such folder, not a run folder, or nothing logged yet; the message has a remedy.
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
    return RunLog(
        path,
        yaml.safe_load((path / "config.yaml").read_text()),
        metrics,
        trajectories,
        faults.read_text().splitlines() if faults.is_file() else [],
        torn,
    )


def phases(record: dict[str, Any]) -> dict[str, float]:
    """Return the seconds of a step by phase; they sum to its `time/step`."""
    wholes = "time/step", "time/total", "time/evaluation"
    return {k.removeprefix("time/"): v for k, v in record.items() if k.startswith("time/") and k not in wholes}


def step_of(stem: str) -> tuple[str, int]:
    """Return ("train", 12) for "train-000012"."""
    name, _, step = stem.rpartition("-")
    return name, int(step)


def _lines(file: Path, needs: str = "step") -> tuple[list[dict[str, Any]], int]:
    whole, lines = [], file.read_text().splitlines()
    for line in lines:
        with contextlib.suppress(ValueError):
            record = json.loads(line)
            if needs in record:  # logs of earlier versions lack this key
                whole.append(record)
    return whole, len(lines) - len(whole)
