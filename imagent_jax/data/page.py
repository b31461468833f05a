"""The page `summary.html` of a data set: figures, rows left out, and examples with their images, in one file."""

from __future__ import annotations

import html
from pathlib import Path
from typing import Any, NamedTuple

from imagent_jax.images.decode import data_uri
from imagent_jax.types import Task

_STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; } td { border-bottom: 1px solid #8884; padding: .2rem 1rem .2rem 0; vertical-align: top; }
section { border: 1px solid #8884; border-radius: 6px; margin: 1rem 0; padding: .7rem 1rem; }
figure { display: inline-block; margin: .3rem .6rem .3rem 0; } figcaption, .place { opacity: .7; font-size: 13px; }
img { max-height: 190px; max-width: 100%; } pre { white-space: pre-wrap; font: inherit; margin: .3rem 0; }
"""
SIDE = 380
"""Longer side of an example's images on the page, in pixels."""


class Example(NamedTuple):
    """A row as shown: its place, what the policy is shown (texts, and images as data URIs), and answers."""

    place: str
    shown: list[str]
    images: list[str]
    answers: str

    @classmethod
    def of(cls, task: Task, place: str, images: list[bytes]) -> Example:
        """Return the example of a task with its images."""
        shown = [part if isinstance(part, str) else f"[Image {part}]" for part in task.shown]
        answers = f"{' | '.join(task.answers)} ({task.answer_type}{f', {task.kind}' if task.kind else ''})"
        return cls(place, shown, [data_uri(data, SIDE, 20_000) for data in images], answers)

    def html(self) -> str:
        """Return the example as HTML."""
        figures = "".join(
            f'<figure><img src="{uri}" alt=""><figcaption>Image {n}</figcaption></figure>' for n, uri in enumerate(self.images, 1)
        )
        text = html.escape("\n".join(self.shown))
        return (
            f"<section><p class=place>{html.escape(self.place)}</p>{figures}<pre>{text}</pre>"
            f"<p>answer <b>{html.escape(self.answers)}</b></p></section>"
        )


def write_page(path: Path, name: str, splits: dict[str, tuple[dict[str, Any], list[Example]]]) -> None:
    """Write the page of a data set: of each split, its figures (`Summary.figures`) and examples."""
    e = html.escape
    parts = [f"<!doctype html><meta charset=utf-8><title>{e(name)}</title><style>{_STYLE}</style><h1>{e(name)}</h1>"]
    for split, (figures, examples) in splits.items():
        faults = figures["faults"]
        plain = {key: value for key, value in figures.items() if key != "faults" and value not in ({}, 0)}
        parts.append(f"<h2>{e(split)}</h2>{_table({key: _cell(value) for key, value in plain.items()})}")
        if faults:
            rows = {kind: f"{one['rows']} rows: {one['first']}" for kind, one in faults.items()}
            parts.append(f"<h3>Rows left out</h3>{_table(rows)}")
        parts.append(f"<h3>Examples</h3>{''.join(example.html() for example in examples)}")
    path.write_text("\n".join(parts), encoding="utf-8")


def _table(cells: dict[str, str]) -> str:
    return "<table>" + "".join(f"<tr><td>{html.escape(k)}<td>{html.escape(v)}" for k, v in cells.items()) + "</table>"


def _cell(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key or 'none'}: {n:,.4g}" for key, n in value.items())
    return f"{value:,}"
