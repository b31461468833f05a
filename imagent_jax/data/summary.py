"""What is in a data set, and the data set as ArrayRecord: `imagent data INPUT [OUT]`.

Every row is read and checked; no model is needed. With OUT, valid rows are written to that new folder, which `data.path` can
name, with `summary.json`, `summary.html` and, where rows are left out, `faults.txt`.
"""

import argparse
import contextlib
import json
import random
import sys
from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from imagent_jax.config import DataConfig
from imagent_jax.data.check import Fault, RowError
from imagent_jax.data.convert import Writer, new_folder
from imagent_jax.data.files import NoSplit, Source, open_sources
from imagent_jax.data.formats import FORMATS
from imagent_jax.data.page import Example, write_page
from imagent_jax.data.reader import Row, Sizes, checked, image_bytes

EXAMPLES = 24
"""Rows on the page of a split, drawn at random."""
LISTED = 20
"""Places of a kind of fault in the figures; `faults.txt` lists all."""


class Summary:
    """Figures of the rows of a split, added one by one, and some rows as examples.

    Args:
        count: length of a text, in `unit`.
    """

    def __init__(self, count: Callable[[str], int], unit: str):
        self.count, self.unit = count, unit
        self.counters = {name: Counter() for name in ("formats", "images a row", "answer types", "kinds", "environments")}
        self.lengths = {name: array("q") for name in (f"question {unit}", f"answer {unit}", "image height", "image width")}
        self.faults: list[Fault] = []
        self.examples: list[Example] = []
        self.rows, self.luck = 0, random.Random(0)

    def add(self, row: Row | Fault, sizes: Sizes) -> None:
        """Count a row, or why it is left out."""
        if isinstance(row, Fault):
            self.faults.append(row)
            return
        task, self.rows = row.task, self.rows + 1
        found = row.form.name, len(row.images), task.answer_type, task.kind, task.environment
        for counter, value in zip(self.counters.values(), found, strict=True):
            counter[value] += 1
        self.lengths[f"question {self.unit}"].append(self.count(task.text))
        self.lengths[f"answer {self.unit}"].extend(self.count(answer) for answer in task.answers)
        for height, width in (size for size in sizes if not isinstance(size, RowError)):
            self.lengths["image height"].append(height)
            self.lengths["image width"].append(width)
        place = self.luck.randrange(self.rows)  # a sample of all rows so far, each as likely (reservoir sampling)
        if len(self.examples) < EXAMPLES or place < EXAMPLES:
            images = [image_bytes(row.source, image) for image in row.images]
            example = Example.of(task, f"{row.source.name}, {row.source.unit} {row.line}", images)
            if len(self.examples) < EXAMPLES:
                self.examples.append(example)
            else:
                self.examples[place] = example

    def figures(self) -> dict[str, Any]:
        """Return the figures, as JSON values."""
        counts = {name: dict(counter.most_common(20)) for name, counter in self.counters.items()}
        counts["images a row"] = {str(n): rows for n, rows in sorted(self.counters["images a row"].items())}
        if not any(counts["environments"]):
            del counts["environments"]
        lengths = {
            name: {"least": min(n), "median": float(np.median(n)), "mean": float(np.mean(n)), "most": max(n)}
            for name, n in self.lengths.items()
            if n
        }
        kinds: dict[str, list[Fault]] = {}
        for fault in self.faults:
            kinds.setdefault(fault.kind, []).append(fault)
        faults = {
            kind: {"rows": len(found), "first": str(found[0]), "where": [f"{f.path}, {f.unit} {f.line}" for f in found[:LISTED]]}
            for kind, found in sorted(kinds.items(), key=lambda pair: -len(pair[1]))
        }
        return {"rows": self.rows, **counts, **lengths, "left out": len(self.faults), "faults": faults}


def printed(figures: dict[str, Any]) -> str:
    """Return figures as lines for a screen; those that are 0 or empty are left out."""
    lines = []
    for name, value in figures.items():
        if name == "faults":
            lines += [f"  {kind}: {one['rows']}\n    {one['first']}" for kind, one in value.items()]
        elif isinstance(value, dict):
            lines.append(f"  {name}: " + ", ".join(f"{'none' if key == '' else key}: {n:.4g}" for key, n in value.items()))
        elif value:
            lines.append(f"  {name}: {value}")
    return "\n".join(lines)


def survey(sources: Sequence[Source], summary: Summary, answer_type: str, console: Console, write=None) -> None:
    """Check all rows of sources on all cores, add them to a summary and give valid ones to `write`. Shows how far it is."""
    with console.status("") as status:
        how, name = (None, answer_type), sources[0].path.name
        for row, sizes in checked(sources, FORMATS, how, None, lambda words: status.update(f"{name}: {words}"), {}):
            summary.add(row, sizes)
            if write and isinstance(row, Row):
                write(row, sizes)


def token_counter(name: str) -> Callable[[str], int]:
    """Return a function that counts the tokens of a text, of the tokenizer of a model."""
    from transformers import AutoTokenizer

    from imagent_jax.model.checkpoint import resolve

    tokenizer: Any = AutoTokenizer.from_pretrained(resolve(name, weights=False))
    return lambda text: len(tokenizer.encode(text, add_special_tokens=False))


def run(args: argparse.Namespace, console: Console) -> None:
    """Summarise the splits of `args.input`, and convert them where `args.out` is given.

    Raises:
        ValueError: there are no rows, none that can be used, or `args.out` exists.
        OSError: a file cannot be read or written.
    """
    counting = (token_counter(args.tokenizer), "tokens") if args.tokenizer else (len, "characters")
    splits: dict[str, list[Source]] = {}
    for split in ("train", "test"):
        try:
            splits[split] = open_sources(DataConfig(path=args.input), split)
        except NoSplit:
            if split == "train":
                raise
    with new_folder(args.out) if args.out else contextlib.nullcontext() as folder:
        found, writer = {}, Writer(folder) if folder else None
        for split, sources in splits.items():
            found[split] = summary = Summary(*counting)
            write = writer and (lambda row, sizes, split=split: writer.add(split, row, sizes))
            survey(sources, summary, args.answer_type, console, write)
            print(f"{split}: {', '.join(source.name for source in sources)}\n{printed(summary.figures())}")
            if not summary.rows:
                raise ValueError(f"The {split} split of {args.input} has no row that can be used.")
        if writer and folder:
            writer.close()
            write_files(folder, args.input, found)
    if args.out:
        left = sum(len(summary.faults) for summary in found.values())
        print(f"Written to {args.out}: set data.path to it." + (f" {left:,} rows are left out; see faults.txt." if left else ""))


def write_files(folder: Path, name: str, found: dict[str, Summary]) -> None:
    """Write the summaries of the splits of the data set `name`."""
    figures = {split: summary.figures() for split, summary in found.items()}
    (folder / "summary.json").write_text(json.dumps(figures, indent=1))
    write_page(folder / "summary.html", name, {split: (figures[split], summary.examples) for split, summary in found.items()})
    if faults := [fault for summary in found.values() for fault in summary.faults]:
        (folder / "faults.txt").write_text("".join(f"{fault}\n" for fault in faults))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command: exit code 0, 2 after one sentence about bad input, or 130 after an interrupt."""
    parser = argparse.ArgumentParser(prog="imagent data", description=__doc__.splitlines()[0])
    parser.add_argument("input", metavar="INPUT", help="folder with train.* and test.*, a file, a pattern, or a hub id")
    parser.add_argument("out", metavar="OUT", nargs="?", type=Path, help="new folder: write the tasks there as ArrayRecord")
    parser.add_argument("--tokenizer", metavar="MODEL", help="count texts in tokens: 'tiny', a folder or a hub id")
    parser.add_argument("--answer_type", default="", metavar="TYPE", help="of rows that name none, as data.answer_type")
    args = parser.parse_args(argv)
    try:
        run(args, Console(stderr=True))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"Interrupted.{f' Nothing was written to {args.out}.' if args.out else ''}", file=sys.stderr)
        return 130
    return 0
