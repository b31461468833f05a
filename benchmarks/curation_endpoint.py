"""The agent behind a server, killed and at scale: `python benchmarks/curation_endpoint.py [--kills 20] [--items 10000]`.

A simulated server in a process of its own, on which every third item (killed) or every twentieth (at scale) fails at first: 429,
500, cut bodies, invalid JSON, wrong schema, slow. First a data set is made by a process that is killed (SIGKILL) at moments
spread over the work and resumed each time; it must equal that of a process that was not killed, to the byte. Then 64 requests
are in flight over all items, each with two pictures; memory is read every 1,000 items. Writes
benchmarks/results/curation_endpoint.json.
"""

import base64
import random
import sys
import tempfile
import threading
import time
from pathlib import Path

from common import PeakMemory, parser, report, show

sys.path.append(str(Path(__file__).parent.parent / "tests"))
PICTURE = 30_000
"""Bytes of a picture in a request."""


def private_mb() -> float:
    """Private memory of this process."""
    return round(1000 * PeakMemory._status()["RssAnon"], 1)


def scale(server, folder: Path, items: int, threads: int) -> dict:
    """Complete all items once, then once more from disk."""
    from agent_server import QUICK, SCHEMA, SLOW
    from curation_client import asked, config

    from imagent_jax.curation.endpoint import Endpoint

    server.tell(reset=True, every=20, pause=0.5, faults=[*QUICK, *SLOW])
    data = base64.b64encode(random.Random(0).randbytes(PICTURE)).decode()
    pictures = [{"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{data}"}}] * 2
    cfg = config(server.url, str(folder), parallel=threads, timeout_s=10.0, backoff_s=0.1)
    memory, result = [], {}
    for name in ("first", "repeated"):
        endpoint, numbers, lock = Endpoint(cfg), iter(range(items)), threading.Lock()

        def work(endpoint=endpoint, numbers=numbers, lock=lock) -> None:
            while True:
                with lock:
                    if (item := next(numbers, None)) is None:
                        return
                    if item % 1000 == 0:
                        memory.append(private_mb())
                        print(f"{item} of {items} items, {memory[-1]:.0f} MB, {endpoint.counts['calls']} calls", flush=True)
                content = [{"type": "text", "text": asked(item)[0]["content"]}, *pictures]
                assert endpoint.complete([{"role": "user", "content": content}], SCHEMA) == {"item": item, "square": item**2}

        began = time.perf_counter()
        workers = [threading.Thread(target=work) for _ in range(threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        spent = time.perf_counter() - began
        result[name] = endpoint.counts | {
            "seconds": round(spent, 1),
            "calls_per_item": round(endpoint.counts["calls"] / items, 4),
        }
        result[name] |= {"private_mb_every_1000": [*memory, private_mb()]}
        memory.clear()
        endpoint.close()
    stats = server.stats()
    return {
        "items": items, "in_flight": stats["most"], "answered_once": sum(n == 1 for n in stats["answered"].values()),
        "answered_more": sum(n > 1 for n in stats["answered"].values()),
    } | result  # fmt: skip


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--kills", type=int, default=20)
    options.add_argument("--items", type=int, default=10_000)
    args = options.parse_args()
    from agent_server import QUICK, SLOW, Remote
    from curation_client import killed_and_resumed

    kills, items = (2, 200) if args.quick else (args.kills, args.items)
    server = Remote()
    try:
        with tempfile.TemporaryDirectory() as folder:
            print(
                f"Killing and resuming a client {kills} times, then {items} items; files in {folder}, deleted at the end.",
                flush=True,
            )
            killed = killed_and_resumed(
                server, Path(folder), items=20 * kills, kills=kills, timeout_s=1.0, faults=[*QUICK, *SLOW]
            )
            scaled = scale(server, Path(folder) / "scale", items, threads=64)
    finally:
        server.stop()
    memory = scaled["first"]["private_mb_every_1000"]
    show("The agent behind a server", ["what", "value"], [
        ["kills", killed["kills"]], ["same data set", killed["same"]],
        ["asked again though kept", killed["kept_and_asked_again"]],
        ["items at scale", scaled["items"]], ["requests in flight", scaled["in_flight"]],
        ["calls an item", scaled["first"]["calls_per_item"]], ["seconds", scaled["first"]["seconds"]],
        ["memory, MB, start to end", f"{memory[0]:.0f}, {memory[len(memory) // 2]:.0f}, {memory[-1]:.0f}"],
        ["calls when repeated", scaled["repeated"]["calls"]],
    ])  # fmt: skip
    report("curation_endpoint", args, {"killed": killed, "scale": scaled})


if __name__ == "__main__":
    main()
