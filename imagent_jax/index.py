"""Build an index of passages, or serve one: `imagent index CORPUS.jsonl OUT`, `imagent index --serve INDEX`."""

import argparse
import sys
import time
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from rich.console import Console

from imagent_jax.data.check import Fault, RowError
from imagent_jax.data.files import CONTAINERS, Source
from imagent_jax.tools.search.hits import passage
from imagent_jax.tools.search.index import Index, build
from imagent_jax.tools.search.serve import RetrieveServer

SUFFIXES = (".jsonl", ".parquet")
LISTED = 20
"""Faults that are printed; more are counted."""


class Corpus:
    """Passages of files, read one at a time.

    `skipped` holds (file, line) of the rows that `passages` leaves out.

    Raises:
        ValueError: a file is missing or of an unknown kind.
    """

    def __init__(self, paths: Sequence[str], console: Console):
        self.sources = [_source(Path(path).expanduser()) for path in paths]
        self.console, self.total = console, 0
        self.skipped: set[tuple[int, int]] = set()

    def check(self) -> list[Fault]:
        """Read all rows once; return the invalid ones, those with the id of an earlier row among them, and skip them from now on.

        Memory: 8 bytes a row.
        """
        faults, names = [], array("q")
        for place, source, found in self._rows("read"):
            if isinstance(found, RowError):
                faults.append((place, self._fault(source, place, found)))
            else:
                names.append(hash(found[0]))
        self.total = len(names)
        hashes, counts = np.unique(np.frombuffer(names, np.int64), return_counts=True)
        if len(again := set(hashes[counts > 1].tolist())):
            faults += self._repeated(again)
        faults.sort(key=lambda fault: fault[0])
        self.skipped = {place for place, _ in faults}
        return [fault for _, fault in faults]

    def passages(self) -> Iterator[tuple[str, str, str]]:
        """Yield id, title and text of every row that is not skipped."""
        for place, _, found in self._rows("indexed"):
            if place not in self.skipped and not isinstance(found, RowError):
                yield found

    def _repeated(self, hashes: set[int]) -> Iterator[tuple[tuple[int, int], Fault]]:
        first: dict[str, str] = {}
        for place, source, found in self._rows("compared"):
            if not isinstance(found, RowError) and hash(found[0]) in hashes:
                if found[0] in first:
                    reason = f"the id {found[0]!r} is also that of {first[found[0]]}; give every passage its own"
                    yield place, self._fault(source, place, RowError("repeated id", reason))
                first.setdefault(found[0], f"{source.name}, {source.unit} {place[1]}")

    def _rows(self, done: str) -> Iterator[tuple[tuple[int, int], Source, tuple[str, str, str] | RowError]]:
        count = 0
        with self.console.status("") as status:
            for number, source in enumerate(self.sources):
                for line, _, row in source.rows():
                    if count % 10_000 == 0:
                        status.update(f"{count:,}{f' of {self.total:,}' if self.total else ''} passages {done}")
                    count += 1
                    try:
                        found = row if isinstance(row, RowError) else passage(row)
                    except ValueError as error:
                        found = RowError("no passage", str(error))
                    yield (number, line), source, found

    @staticmethod
    def _fault(source: Source, place: tuple[int, int], error: RowError) -> Fault:
        return Fault(source.name, place[1], error.reason, error.kind, source.unit)


def _source(path: Path) -> Source:
    if not path.is_file():
        raise ValueError(f"The corpus {path} does not exist; write rows {{id, title, text}} or {{id, contents}} to it.")
    if path.suffix not in SUFFIXES:
        raise ValueError(f"The corpus {path} ends in {path.suffix!r}; use one of {', '.join(SUFFIXES)}.")
    return CONTAINERS[path.suffix](path)


def make_index(paths: Sequence[str], out: Path, skip_bad: bool, console: Console) -> None:
    """Build the index `out` of files, and print a summary.

    Raises:
        ValueError: a file or a row is invalid (rows only without `skip_bad`), or `out` exists.
    """
    if out.exists():
        raise ValueError(f"{out} exists; name another folder, or remove it first.")
    began, corpus = time.perf_counter(), Corpus(paths, console)
    faults = corpus.check()
    for fault in faults[:LISTED]:
        console.print(str(fault), markup=False, highlight=False, soft_wrap=True)
    if faults and not skip_bad:
        raise ValueError(f"{len(faults):,} rows are no passages; mend them, or leave them out with --skip-bad.")
    build(corpus.passages(), out)
    seconds, size = time.perf_counter() - began, sum(file.stat().st_size for file in out.iterdir())
    skipped = f", {len(faults):,} rows left out" if faults else ""
    count = Index(out).passages
    print(f"{out}: {count:,} passages{skipped}, {size / 1e6:,.1f} MB, {seconds:.1f} s ({count / seconds:,.0f} passages a second)")


def serve(path: str, host: str, port: int) -> None:
    """Serve an index until the process is interrupted.

    Raises:
        ValueError: it is no index.
        OSError: the address cannot be used.
    """
    index = Index(path)
    with RetrieveServer(index, host, port) as server:
        address = f"http://{host}:{server.server_address[1]}/retrieve"
        print(f"Serving {index.passages:,} passages of {path} at {address} until Ctrl-C.", flush=True)
        server.serve_forever()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command: exit code 0, 2 after one sentence about bad input, or 130 where it was interrupted."""
    usage = "imagent index CORPUS [CORPUS ...] OUT [--skip-bad]\n       imagent index --serve INDEX [--host H] [--port P]"
    parser = argparse.ArgumentParser(prog="imagent index", usage=usage, description=__doc__)
    parser.add_argument("paths", nargs="*", metavar="CORPUS OUT", help="JSON Lines or Parquet files of passages; the new folder")
    parser.add_argument("--skip-bad", action="store_true", help="leave out rows that are no passages (counted and listed)")
    parser.add_argument("--serve", metavar="INDEX", help="answer Search-R1's POST /retrieve from this index")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default: this machine only)")
    parser.add_argument("--port", type=int, default=8000, help="port to listen at (0: a free one)")
    args = parser.parse_args(argv)
    if (args.serve is None) != (len(args.paths) >= 2) or (args.serve and args.paths):
        parser.error("name a corpus and a new folder, or --serve and an index")
    try:
        if args.serve:
            serve(args.serve, args.host, args.port)
        else:
            make_index(args.paths[:-1], Path(args.paths[-1]).expanduser(), args.skip_bad, Console(stderr=True))
    except (ValueError, OSError, OverflowError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Stopped." if args.serve else "Stopped; no index was written.", file=sys.stderr)
        return 0 if args.serve else 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
