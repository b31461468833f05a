"""The command `imagent curate [--config FILE.yaml ...] [--section.key VALUE ...]`: from pictures to a released data set.

Ctrl-C stops after the questions in work; the same command goes on. Settings: docs/mifg_qa.md. `imagent curate --review FOLDER
--reviewer NAME` lets people check the questions of a run (`curation.review`).
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import sys
import typing
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from imagent_jax.curation import review
from imagent_jax.curation.agents import AgentError
from imagent_jax.curation.decisions import read_questions, reviewed
from imagent_jax.curation.pipeline import Stopped, curate
from imagent_jax.curation.release import release
from imagent_jax.curation.settings import Curation, read_arguments
from imagent_jax.runs.interrupt import Interrupt
from imagent_jax.runs.lock import Lock


def settings_help() -> str:
    """Return every setting with its default and meaning."""
    lines = ["settings:"]
    for section, kind in typing.get_type_hints(Curation).items():
        lines.append(f"  {section}: {kind.__doc__}")
        lines += [f"    --{section}.{f.name} (default {f.default!r}): {f.metadata['help']}" for f in dataclasses.fields(kind)]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command: exit code 0; 2 after one sentence about bad input; 3 where an agent gave no answers; 130 after Ctrl-C."""
    argv = [*(sys.argv[1:] if argv is None else argv)]
    if argv[:1] == ["--review"]:
        return review.main(argv[1:])
    usage = "%(prog)s [--config FILE.yaml ...] [--section.key VALUE ...] | --review FOLDER --reviewer NAME"
    parser = argparse.ArgumentParser(
        prog="imagent curate",
        usage=usage,
        allow_abbrev=False,
        description=__doc__.splitlines()[0],
        epilog=settings_help(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", action="append", default=[], metavar="FILE.yaml", help="settings; may be given again")
    chosen, rest = parser.parse_known_args(argv)
    console = Console()
    try:
        cfg = read_arguments(chosen.config, rest)
        return _run(cfg, console)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except AgentError as error:
        print(f"error: {error} What is done is kept; the same command goes on.", file=sys.stderr)
        return 3
    except Stopped as error:
        console.print(escape(f"Stopped: {error}"))
        return 130


def _run(cfg: Curation, console: Console) -> int:
    out = Path(cfg.run.out).expanduser()
    if importlib.util.find_spec("pyarrow") is None:  # told now, not at the release
        raise ValueError('pyarrow is not installed, which writes the Parquet files; run pip install "imagent-jax[data]".')
    console.print(
        escape(
            f"Making up to {cfg.run.proposals} questions about groups of pictures of {cfg.pool.path}, asked of "
            f"{cfg.agents.backend}."
        ),
        soft_wrap=True,
    )
    console.print(escape(f"Writes to {out}; Ctrl-C stops it, and the same command goes on."), soft_wrap=True)
    out.mkdir(parents=True, exist_ok=True)
    lock = Lock(out)
    try:
        with Interrupt() as interrupt:
            funnel = curate(
                cfg,
                progress=lambda words: console.print(escape(f"  {words}"), soft_wrap=True),
                asked_to_stop=lambda: bool(interrupt.asked),
            )
        questions = [*(reviewed(out, cfg.release.reviewers) if cfg.release.reviewers else read_questions(out).values())]
        splits = release(out, questions, funnel, cfg.release, cfg.run.seed)
    finally:
        lock.release()
    table = Table(title=f"{funnel['proposed']} proposals, {funnel['kept']} questions kept")
    for name, justify in (("filter", "left"), ("found", "right"), ("dropped", "right"), ("example of what it dropped", "left")):
        table.add_column(name, justify=justify)
    for name, one in funnel["filters"].items():
        table.add_row(name, str(one["found"]), str(one["dropped"]), escape(str(one.get("example", {}).get("why", ""))))
    console.print(table)
    parts = ", ".join(f"{count} {name}" for name, count in splits.items())
    console.print(
        escape(
            f"Released {sum(splits.values())} questions ({parts}) to {out / 'release'}; read its README.md. Train "
            f"with --data.name files --data.path {out / 'release' / 'arrayrecord'}."
        ),
        soft_wrap=True,
    )
    if failed := funnel["without an answer of an agent"]:
        console.print(f"{failed} proposals had no answer of an agent; the same command asks again.")
    return 0
