"""Makes a data set by a server: `python tests/curation_client.py URL CACHE OUT ITEMS THREADS`. Prints "began" and its counts."""

import json
import os
import random
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from agent_server import SCHEMA

from imagent_jax.curation.endpoint import Endpoint, EndpointConfig


def asked(item: int) -> list[dict]:
    return [{"role": "user", "content": f"What is the square of item {item}?"}]


def config(url: str, cache: str, **changes) -> EndpointConfig:
    return EndpointConfig(**{"base_url": url, "model": "m", "cache_dir": cache, "timeout_s": 1.0, "backoff_s": 0.02} | changes)


def start(url: str, cache: Path, out: Path, items: int, threads: int) -> subprocess.Popen:
    """Start this program in a process of its own and wait until it begins to ask."""
    command = [sys.executable, __file__, url, cache, out, items, threads]
    process = subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "began\n"
    return process


def killed_and_resumed(server, folder: Path, items: int, kills: int, threads: int = 8) -> dict:
    """Makes a data set in one go, and again while its process is killed (SIGKILL) at moments spread over the work.

    Returns `same` (both files, to the byte), and `asked_again`, the requests for answers that were on disk at a kill.
    """
    server.tell(reset=True, every=3, pause=0.02)
    whole = start(server.url, folder / "whole", folder / "whole.jsonl", items, threads)
    counts = json.loads(whole.communicate()[0])
    server.tell(reset=True, every=3, pause=0.02)
    names, moments, kept = Endpoint(config(server.url, str(folder / "cut"))), [], {}
    paths = {str(item): names.path(names.key(asked(item), SCHEMA)) for item in range(items)}
    for kill in range(kills):
        process = start(server.url, folder / "cut", folder / "cut.jsonl", items, threads)
        while sum(path.exists() for path in paths.values()) < items * (kill + 1) // (kills + 2):
            time.sleep(0.005)
        time.sleep(random.uniform(0, 0.05))
        process.kill()
        process.communicate()
        before = server.stats()["asked"]
        moments.append(sum(path.exists() for path in paths.values()))
        kept |= {item: before[item] for item, path in paths.items() if path.exists() and item not in kept}
    last = start(server.url, folder / "cut", folder / "cut.jsonl", items, threads)
    resumed = json.loads(last.communicate()[0])
    stats = server.stats()
    return {
        "items": items, "kills": kills, "kept_at_kills": moments, "uninterrupted": counts, "last_process": resumed,
        "asked_again": sum(stats["asked"][item] - count for item, count in kept.items()),
        "answered_twice": sum(count > 1 for count in stats["answered"].values()), "most_in_flight": stats["most"],
        "same": (folder / "whole.jsonl").read_bytes() == (folder / "cut.jsonl").read_bytes(),
    }  # fmt: skip


def main():
    url, cache, out, items, threads = sys.argv[1:]
    endpoint = Endpoint(config(url, cache, parallel=int(threads)))
    print("began", flush=True)
    with ThreadPoolExecutor(int(threads)) as pool:
        answers = list(pool.map(lambda item: endpoint.complete(asked(item), SCHEMA), range(int(items))))
    part = Path(out).with_suffix(".part")
    part.write_text("".join(json.dumps(answer) + "\n" for answer in answers))
    os.replace(part, out)
    print(json.dumps(endpoint.counts), flush=True)


if __name__ == "__main__":
    main()
