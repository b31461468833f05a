"""Makes a data set by a server: `python tests/curation_client.py URL CACHE OUT ITEMS TIMEOUT`. Prints "began" and its counts."""

import json
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
    return EndpointConfig(**{"base_url": url, "model": "m", "cache_dir": cache, "timeout_s": 20.0, "backoff_s": 0.02} | changes)


THREADS = 8


def make(url: str, cache: str, out: Path, items: int, timeout_s: float) -> dict[str, int]:
    """Write the answers to all items, in order; return the counts."""
    endpoint = Endpoint(config(url, cache, parallel=THREADS, timeout_s=timeout_s))
    with ThreadPoolExecutor(THREADS) as pool:
        answers = list(pool.map(lambda item: endpoint.complete(asked(item), SCHEMA), range(items)))
    out.write_text("".join(json.dumps(answer) + "\n" for answer in answers))
    endpoint.close()
    return endpoint.counts


def killed_and_resumed(server, folder: Path, items: int, kills: int, timeout_s: float = 20.0, **state) -> dict:
    """Makes a data set in one go, and again while its process is killed (SIGKILL) at moments spread over the work.

    Returns `same` (both files, to the byte), and `kept_and_asked_again`, the requests for answers that were on disk at a kill.
    """
    server.tell(reset=True, every=3, pause=0.02, **state)
    counts = make(server.url, str(folder / "whole"), folder / "whole.jsonl", items, timeout_s)
    server.tell(reset=True, every=3, pause=0.02, **state)

    def start() -> subprocess.Popen:
        command = [sys.executable, __file__, server.url, folder / "cut", folder / "cut.jsonl", items, timeout_s]
        process = subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, text=True)
        assert process.stdout.readline() == "began\n"
        return process

    names, moments, kept = Endpoint(config(server.url, str(folder / "cut"))), [], {}
    paths = {str(item): names.path(asked(item), SCHEMA) for item in range(items)}
    for kill in range(kills):
        process = start()
        while sum(path.exists() for path in paths.values()) < items * (kill + 1) // (kills + 2):
            time.sleep(0.005)
        time.sleep(random.uniform(0, 0.05))
        process.kill()
        process.communicate()
        before = server.stats()["asked"]
        moments.append(sum(path.exists() for path in paths.values()))
        kept |= {item: before[item] for item, path in paths.items() if path.exists() and item not in kept}
    resumed = json.loads(start().communicate()[0])
    stats = server.stats()
    return {
        "items": items, "kills": kills, "kept_at_kills": moments, "uninterrupted": counts, "last_process": resumed,
        "kept_and_asked_again": sum(stats["asked"][item] - count for item, count in kept.items()),
        "answered_again_because_not_kept": sum(count > 1 for count in stats["answered"].values()),
        "most_in_flight": stats["most"],
        "same": (folder / "whole.jsonl").read_bytes() == (folder / "cut.jsonl").read_bytes(),
    }  # fmt: skip


if __name__ == "__main__":
    print("began", flush=True)
    print(json.dumps(make(sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]), float(sys.argv[5]))), flush=True)
