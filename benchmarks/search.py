"""Search over a generated corpus: building, memory and queries, beside SQLite's FTS5 on the same.

Nine passages in ten are of English-like words, one is Chinese. A query is five words (or three pairs of characters) of a passage;
`found` is the share of queries whose passage is among the three best. FTS5, which is slower, is asked a tenth of the queries.
"""

import argparse
import concurrent.futures
import json
import random
import re
import sqlite3
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import common
import numpy as np

K, THREADS = 3, 8


# ---- the corpus ---------------------------------------------------------------------------------------------------------


def passages(count: int, seed: int = 0) -> Iterator[dict[str, str]]:
    """Passages of 30 to 90 words by Zipf's law, of 300,000 words; or of as many Chinese characters, of 3,000."""
    rng = np.random.default_rng(seed)
    letters = np.asarray(list("etaoinshrdlucmfwypvbgk"))
    english = np.unique(["".join(rng.choice(letters, rng.integers(3, 10))) for _ in range(300_000)])
    chinese = np.asarray([chr(0x4E00 + i) for i in range(3000)])
    words = {" ": rng.permutation(english), "": chinese}
    odds = {space: np.cumsum(1 / (np.arange(len(known)) + 2.7)) for space, known in words.items()}
    for i in range(count):
        space = "" if i % 10 == 9 else " "
        drawn = np.searchsorted(odds[space], rng.random(rng.integers(33, 93)) * odds[space][-1])
        text = words[space][np.minimum(drawn, len(words[space]) - 1)]
        yield {"id": f"p{i}", "title": space.join(text[:3]), "text": space.join(text[3:])}


def queries(corpus: Path, count: int) -> list[tuple[str, str]]:
    """(id, query) of passages that are spread over the corpus."""
    rng, step = random.Random(0), max(1, (corpus.stat().st_size // 500) // count)
    found = []
    with corpus.open() as file:
        for i, line in enumerate(file):
            if i % step == 0:
                row = json.loads(line)
                words = row["text"].split() if " " in row["text"] else [row["text"][j : j + 2] for j in range(0, 60, 2)]
                found.append((row["id"], " ".join(rng.sample(words, 5 if " " in row["text"] else 3))))
    return rng.sample(found, min(count, len(found)))


# ---- ours and theirs ----------------------------------------------------------------------------------------------------


def build_ours(corpus: Path, out: Path) -> None:
    from rich.console import Console

    from imagent_jax.index import make_index

    make_index([str(corpus)], out, False, Console(stderr=True))


def open_ours(out: Path) -> Callable[[str], list[str]]:
    from imagent_jax.tools.search import Index

    index = Index(out)
    return lambda query: [hit.id for hit in index.search(query, K)]


def build_fts5(corpus: Path, out: Path) -> None:
    """The index as its documentation recommends, optimised; Chinese as single characters between spaces."""
    out.mkdir()
    database = sqlite3.connect(out / "fts5.db")
    database.execute("CREATE VIRTUAL TABLE passages USING fts5(id UNINDEXED, title, text, tokenize='porter unicode61')")
    with corpus.open() as file:
        rows = ([row["id"], _spaced(row["title"]), _spaced(row["text"])] for row in map(json.loads, file))
        database.executemany("INSERT INTO passages VALUES (?, ?, ?)", rows)
    database.execute("INSERT INTO passages(passages) VALUES ('optimize')")
    database.commit()
    database.close()


def open_fts5(out: Path) -> Callable[[str], list[str]]:
    database = sqlite3.connect(out / "fts5.db", check_same_thread=False)

    def search(query: str) -> list[str]:
        terms = " OR ".join(f'"{word}"' for word in _spaced(query).split())
        found = database.execute("SELECT id, title, text FROM passages WHERE passages MATCH ? ORDER BY rank LIMIT ?", (terms, K))
        return [row[0] for row in found]

    return search


def _spaced(text: str) -> str:
    return re.sub("([\u4e00-\u9fff])", r" \1 ", text)


WAYS = {"tantivy (ours)": (build_ours, open_ours), "SQLite FTS5": (build_fts5, open_fts5)}


# ---- measuring, each in a process of its own ----------------------------------------------------------------------------


def build(way: str, corpus: Path, out: Path, count: int) -> dict:
    """Seconds, megabytes of the index, and the most memory of the process."""
    memory, began, worked = common.PeakMemory(), time.perf_counter(), time.process_time()
    WAYS[way][0](corpus, out)
    seconds, processor = time.perf_counter() - began, time.process_time() - worked
    size = sum(file.stat().st_size for file in out.iterdir()) / 1e6
    figures = {"seconds": seconds, "processor_seconds": processor, "passages_a_second": count / seconds, "index_mb": size}
    return figures | memory.read()


def ask(way: str, corpus: Path, out: Path, count: int) -> dict:
    """Milliseconds of a query, alone and beside others, and the memory that the process shares with no other."""
    memory, asked = common.PeakMemory(), queries(corpus, count)
    search = WAYS[way][1](out)
    for _, query in asked[: count // 10]:  # the file is read
        search(query)
    times, found = [], 0
    for name, query in asked:
        began = time.perf_counter()
        found += name in search(query)
        times.append(1e3 * (time.perf_counter() - began))
    record = {
        "median_ms": statistics.median(times),
        "p99_ms": statistics.quantiles(times, n=100)[98],
        "found": found / len(asked),
    }
    if way.startswith("tantivy"):
        with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
            began = time.perf_counter()
            list(pool.map(search, [query for _, query in asked]))
            record["queries_a_second_of_8_threads"] = len(asked) / (time.perf_counter() - began)
    return record | memory.read()


def measure(count: int, repeats: int) -> dict:
    """Build and ask in every way, over one corpus of `count` passages."""
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder) / "corpus.jsonl"
        with corpus.open("w") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in passages(count))
        record = {"passages": count, "corpus_mb": corpus.stat().st_size / 1e6, "queries": repeats}
        for number, way in enumerate(WAYS):
            out = Path(folder) / str(number)
            record[way] = {
                part: common.child(__file__, ["--part", part, way, corpus, out, n])
                for part, n in (("build", count), ("ask", repeats if way == "tantivy (ours)" else max(repeats // 10, 20)))
            }
    return record


def main() -> None:
    parser = common.parser(__doc__, repeats=1000)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--passages", type=int, default=1_000_000, help="passages of the corpus")
    parser.add_argument("--part", nargs=5, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        part, way, corpus, out, count = args.part
        print(json.dumps({"build": build, "ask": ask}[part](way, Path(corpus), Path(out), int(count))))
        return
    record = measure(20_000 if args.quick else args.passages, 200 if args.quick else args.repeats)
    rows = [
        (way, build["passages_a_second"], build["peak_resident_gb"], build["index_mb"], ask["median_ms"], ask["p99_ms"],
         ask["peak_private_gb"], ask["found"])
        for way, (build, ask) in ((way, record[way].values()) for way in WAYS)
    ]  # fmt: skip
    columns = ["", "passages/s", "build GB", "index MB", "median ms", "p99 ms", "private GB", "found"]
    common.show(f"Search over {record['passages']:,} passages", columns, rows)
    common.report("search", args, record)


if __name__ == "__main__":
    main()
