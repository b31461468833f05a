"""What is in a data set: `imagent data INPUT [--out F.json]`. Every row is read and checked; no model is needed."""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from imagent_jax.config import DataConfig
from imagent_jax.data.files import open_sources
from imagent_jax.data.reader import FileTasks, read_tasks


def summarise(tasks: FileTasks) -> dict[str, Any]:
    """Return figures of tasks: rows by format, answer type, kind and number of images; lengths in characters; faults."""
    rows = [row.task for row in tasks.rows]
    lengths = {"question": [len(task.text) for task in rows], "answer": [len(answer) for task in rows for answer in task.answers]}
    return {
        "rows": len(rows),
        "formats": Counter(row.form.name for row in tasks.rows),
        "images a row": dict(sorted(Counter(len(task.images) for task in rows).items())),
        "answer types": Counter(task.answer_type for task in rows),
        "kinds": dict(Counter(task.kind for task in rows).most_common(20)),
        **{f"{name} characters": {"least": min(n), "mean": sum(n) / len(n), "most": max(n)} for name, n in lengths.items()},
        "left out": len(tasks.faults),
        "faults": dict(Counter(fault.kind for fault in tasks.faults).most_common()),
        "first faults": [str(fault) for fault in tasks.faults[:5]],
    }


def _line(name: str, value: Any) -> str:
    if isinstance(value, dict):
        value = ", ".join(f"{'none' if key == '' else key}: {n:.4g}" for key, n in value.items())
    elif isinstance(value, list):
        value = "".join(f"\n    {line}" for line in value)
    return f"  {name}: {value}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command: exit code 0, or 2 after one sentence about bad input."""
    parser = argparse.ArgumentParser(prog="python -m imagent_jax.data", description=__doc__.splitlines()[0])
    parser.add_argument("input", metavar="INPUT", help="folder with train.* and test.*, a file, a pattern, or a hub id")
    parser.add_argument("--out", type=Path, metavar="F.json", help="write the figures there too")
    args, found = parser.parse_args(argv), {}
    try:
        for split in ("train", "test"):
            try:
                sources = open_sources(DataConfig(path=args.input), split)
            except ValueError:
                if split == "train":
                    raise
                continue
            found[split] = summarise(read_tasks(sources, skip_bad=True))
            print(f"{split}: {', '.join(source.name for source in sources)}")
            print("\n".join(_line(name, value) for name, value in found[split].items() if value))
        if args.out:
            args.out.write_text(json.dumps(found, indent=1))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
