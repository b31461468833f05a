"""Many trajectories at once that call tools, some of them hostile or slow: `python benchmarks/load.py [--seconds 600]`.

64 trajectories run at a time, each of up to five calls, without a model. Three in four are honest: programs that build on each
other, searches, crops. The others make hostile programs (tests/hostile.py) and, one call in ten, programs that do not end. The
search server is killed at two fifths of the time and started again at half of it.

An honest call must return exactly what it should, or be a fault of a kind that the machine or the killed server explains. A
hostile program may do no harm, to its end or to what it attacks. Workers, descriptors and folders must be gone at the end, and
memory may not grow. Counted: calls a second, faults by reason, times of honest calls, memory by tenth of the run.
"""

import itertools
import json
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import acting
import common

from imagent_jax.chat import Call
from imagent_jax.config import ImagesConfig, SandboxConfig, SearchConfig
from imagent_jax.rollout.environment import ToolEnvironment
from imagent_jax.tiny.world import task_at
from imagent_jax.tools import VISUAL_TOOLS, CallPool, ToolSet, ToolSettings, python_tool, search_tool
from imagent_jax.tools.sandbox import Sandbox
from imagent_jax.tools.search import Index
from imagent_jax.types import CallResult, CallStatus

sys.path.append(str(Path(__file__).parent.parent / "tests"))
import hostile_calls
from hostile import TIME
from test_hostile_programs import LIMITS, PROGRAMS, World

CALLS, WORKERS, TIMEOUT_S = 5, 16, 60.0
BUSY = ("the machine was too busy", "killed from outside")
GONE = ("gave no answer that can be used", "and broke off")
MOST_GROWTH_MB = 50


@dataclass
class Seen:
    """What was counted."""

    ends: Counter = field(default_factory=Counter)
    faults: Counter = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    honest_s: list[float] = field(default_factory=list)
    memory_mb: list[float] = field(default_factory=list)


class Searcher:
    """The search server, in a process of its own, and what it should answer."""

    def __init__(self, folder: Path):
        acting.write_index(folder)
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.folder, self.url = folder / "index", f"http://127.0.0.1:{self.port}/retrieve"
        self.index = Index(str(self.folder))
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-m", "imagent_jax.index", "--serve", str(self.folder), "--port", str(self.port)]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        while socket.socket().connect_ex(("127.0.0.1", self.port)):
            time.sleep(0.1)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def answer(self, query: str) -> list[str]:
        return [hit.text for hit in self.index.search(query, 3)]


class Trajectory:
    """One trajectory: its world, and its next call with what it should return."""

    def __init__(self, number: int, world: ToolEnvironment, attacked: World, searcher: Searcher):
        self.rng, self.world = random.Random(f"load {number}"), world.fork(number)
        self.attacked, self.searcher = attacked, searcher
        self.hostile, self.left = self.rng.random() < 0.25, self.rng.randint(1, CALLS)
        self.total: int | None = None  # the sum that its programs keep

    def next(self) -> tuple[str, Call, object]:
        """The kind of the next call, the call, and what it should return."""
        self.left -= 1
        kind, number = self.rng.random(), self.rng.randrange(10**6)
        if self.hostile and kind < 0.1:
            return "slow", Call("python", {"code": self.attacked.code(self.rng.choice(TIME))}), None
        if self.hostile:
            program = self.rng.choice([p for p in PROGRAMS if not p.hangs])
            return "hostile", Call("python", {"code": self.attacked.code(program)}), program
        if kind < 0.33:
            query = " ".join(self.rng.sample(acting.WORDS, 2))
            return "search", Call("search", {"query": query}), self.searcher.answer(query)
        if kind < 0.5:
            return "crop", Call("visual_confirmation", {"image": 1, "bbox_2d": [100, 100, 900, 900]}), None
        code = f"total = {number}\n" if self.total is None else f"total += {number}\n"
        self.total = (self.total or 0) + number
        if kind < 0.7:
            return "python", Call("python", {"code": code + "print(total)\nshow(images[1])"}), str(self.total)
        return "python", Call("python", {"code": code + "print(total)"}), str(self.total)

    def check(self, kind: str, call: Call, expected, result: CallResult | None, strict: bool) -> str:
        """Return what was wrong with a result; "" where nothing was."""
        said = [part for part in result.parts if isinstance(part, str)] if result else []
        if kind in ("slow", "hostile"):
            outside = kind == "hostile" and (expected.untried == hostile_calls.OUTSIDE or (expected.strict and not strict))
            return "" if outside or not any("HARM" in line for line in said) else f"harm: {call.arguments['code']}"
        if result is None or result.status is CallStatus.FAULT:
            return ""  # counted by reason
        right = {"search": lambda: said == expected, "python": lambda: said[:1] == [expected],
                 "crop": lambda: len(result.images) == 1}[kind]()  # fmt: skip
        return "" if result.status is CallStatus.EXECUTED and right else f"{kind} {call.arguments}: {result}, not {expected}"


def reason(result: CallResult | None) -> str:
    """Why a call is a fault, in a few words."""
    if result is None:
        return "past the time limit"
    known = [words for words in (*BUSY, *GONE) if words in result.error]
    return known[0] if known else result.error.splitlines()[-1][:100]


def run(folder: Path, seconds: float, trajectories: int, wall_s: float = 2.0) -> dict:
    """Run the load, and return what was counted.

    Raises:
        ValueError: something was wrong; the sentence says what.
    """
    searcher, attacked = Searcher(folder), World(Path(tempfile.mkdtemp(prefix="hostile_")))
    sandbox = Sandbox(SandboxConfig(wall_s=wall_s, **LIMITS))
    search = search_tool(SearchConfig(backend="server", url=searcher.url, timeout_s=5.0, passage_chars=500), "{text}")
    tools = ToolSet([*VISUAL_TOOLS.values(), python_tool(sandbox), search])
    world = ToolEnvironment(tools, ToolSettings(max_images=32), ImagesConfig())
    world.reset(task_at(0, "train", 0))
    before, seen, began = common.left(sandbox), Seen(), time.perf_counter()
    try:
        drive(world, attacked, searcher, seen, seconds, trajectories, sandbox)
        took = time.perf_counter() - began
        after = common.left(sandbox)
        if not attacked.untouched():
            seen.wrong.append("what hostile programs attack is not as it was")
    finally:
        searcher.kill()
        sandbox.close()
        attacked.process.kill()
        attacked.process.wait()
    grown = statistics.median(seen.memory_mb[-3:]) - statistics.median(seen.memory_mb[:3])
    if any(after[kind] != before[kind] for kind in ("workers", "folders")):
        seen.wrong.append(f"left behind: {after}, not {before}")
    if grown > MOST_GROWTH_MB:
        seen.wrong.append(f"memory grew by {grown:.0f} MB: {seen.memory_mb}")
    if unexplained := [words for words in seen.faults if words not in (*BUSY, *GONE, "past the time limit")]:
        seen.wrong.append(f"faults that nothing explains: {unexplained}")
    if seen.wrong:
        raise ValueError(f"{len(seen.wrong)} things are wrong, the first: {seen.wrong[0]}")
    times = sorted(seen.honest_s)
    return {
        "seconds": round(took, 1), "trajectories_at_once": trajectories, "calls": sum(seen.ends.values()),
        "calls_a_second": round(sum(seen.ends.values()) / took, 1), "ends": dict(sorted(seen.ends.items())),
        "faults": dict(seen.faults), "honest_median_s": round(statistics.median(times), 3),
        "honest_99_s": round(times[int(0.99 * len(times))], 3), "memory_mb": [round(m, 1) for m in seen.memory_mb],
        "before": before, "after": after,
    }  # fmt: skip


def drive(world, attacked, searcher: Searcher, seen: Seen, seconds: float, trajectories: int, sandbox: Sandbox) -> None:
    """Keep `trajectories` in progress for `seconds`, killing the search server and starting it again."""
    pool, began, numbers = CallPool(WORKERS, TIMEOUT_S), time.perf_counter(), itertools.count()
    calls: dict[int, tuple] = {}
    events = [(0.4, searcher.kill), (0.5, searcher.start)]
    samples = [0.05 + 0.1 * i for i in range(10)]

    def submit(trajectory: Trajectory) -> None:
        call = trajectory.next()
        calls[number := next(numbers)] = (trajectory, *call)
        pool.submit(number, lambda: timed(trajectory.world, call[1]))

    def begin() -> None:
        submit(Trajectory(next(numbers), world, attacked, searcher))

    for _ in range(trajectories):
        begin()
    while calls:
        share = (time.perf_counter() - began) / seconds
        while events and share > events[0][0]:
            events.pop(0)[1]()
        while samples and share > samples[0]:
            samples.pop(0)
            seen.memory_mb.append(memory_mb(sandbox))
        for number, found in pool.poll(0.2):
            trajectory, kind, call, expected = calls.pop(number)
            result, took = found or (None, TIMEOUT_S)
            status = CallStatus.FAULT if result is None else result.status
            seen.ends[f"{kind} {status.name}"] += 1
            if status is CallStatus.FAULT:
                seen.faults[reason(result)] += 1
            elif kind not in ("slow", "hostile"):
                seen.honest_s.append(took)
            if wrong := trajectory.check(kind, call, expected, result, sandbox.backend == "namespaces"):
                seen.wrong.append(wrong)
            if trajectory.left and status is not CallStatus.FAULT:
                submit(trajectory)
                continue
            trajectory.world.close()
            if share < 1:
                begin()


def timed(world: ToolEnvironment, call: Call) -> tuple[CallResult, float]:
    began = time.perf_counter()
    return world.step(call), time.perf_counter() - began


def memory_mb(sandbox: Sandbox) -> float:
    """Resident memory of this process and of the one that starts workers."""
    pids = ("self", sandbox._process.pid)
    return sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in pids) * 4096 / 1e6


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--seconds", type=float, default=600.0, help="how long")
    parser.add_argument("--trajectories", type=int, default=64, help="trajectories at once")
    args = parser.parse_args()
    if args.quick:
        args.seconds = 20.0
    with tempfile.TemporaryDirectory() as folder:
        tempfile.tempdir = folder  # what other processes have in the common one is theirs
        try:
            record = run(Path(folder), args.seconds, args.trajectories)
        except ValueError as error:
            sys.exit(f"error: {error}")
    common.report("load", args, record)
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
