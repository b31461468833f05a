"""Random turns and random programs, each of which must end as EXECUTED, INVALID or FAULT.

python benchmarks/fuzz.py --texts 1000000     turns through the chat format and the check of arguments; no tool runs
python benchmarks/fuzz.py --programs 100000   programs through the tool python, in trajectories of up to five calls

Both are changes of real ones (tests/generated.py). A well-formed call is read again as it was written, and jsonschema must agree
on its arguments. Programs may leave no worker, descriptor or folder behind; memory is recorded. Writes
benchmarks/results/fuzz.json, and goes on where that file stops.
"""

import argparse
import concurrent.futures
import io
import json
import random
import sys
import tempfile
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import common
import jsonschema
from PIL import Image

from imagent_jax.chat import QWEN, Answer, Call, MalformedCall, Text
from imagent_jax.config import ImagesConfig, SandboxConfig, SearchConfig
from imagent_jax.rollout.environment import ToolEnvironment
from imagent_jax.tools import VISUAL_TOOLS, ToolSet, ToolSettings, python_tool, search_tool
from imagent_jax.tools.sandbox import Sandbox
from imagent_jax.tools.schema import Tool
from imagent_jax.tools.visual import ALIASES
from imagent_jax.types import CallStatus, Task

sys.path.append(str(Path(__file__).parent.parent / "tests"))
import generated

CHUNK = 100
"""Trajectories between two writes of the result file."""
BUSY = ("the machine was too busy", "killed from outside")
"""Words of the faults that are the machine's."""


# ---- turns ----------------------------------------------------------------------------------------------------------


def offered() -> ToolSet:
    """The shipped tools, as the policy sees them; none of them does anything."""
    search = search_tool(SearchConfig(record="replay"), "{text}")
    tools = [*VISUAL_TOOLS.values(), *ALIASES.values(), python_tool(None), search]
    return ToolSet([replace(tool, function=lambda context, **arguments: "done") for tool in tools])


def validator(tool: Tool) -> jsonschema.Draft202012Validator:
    """jsonschema's check of a tool's arguments, of which there may be no others."""
    parameters = json.loads(json.dumps(tool.schema["function"]["parameters"]))
    for schema in parameters["properties"].values():
        if schema.pop("nullable", False):
            schema["type"] = [schema["type"], "null"]
    return jsonschema.Draft202012Validator(parameters | {"additionalProperties": False})


def check_turn(text: str, tools: ToolSet, validators: dict[str, jsonschema.Draft202012Validator]) -> str:
    """Return how a turn ends: the status of its call, "answer" or "text".

    Raises:
        AssertionError: it ends otherwise, or it was read wrongly.
    """
    action = QWEN.parse(text)
    calls = isinstance(action, (Call, MalformedCall))
    assert calls == QWEN.makes_call(text) and isinstance(action, (Call, MalformedCall, Answer, Text)), action
    if not calls:
        return "answer" if isinstance(action, Answer) else "text"
    result = tools.execute(action, None, ToolSettings()) if isinstance(action, MalformedCall) else _run(action, tools)
    if isinstance(action, Call):
        assert QWEN.parse_call(QWEN.render_call(*action)) == action, action
        if action.name in validators:
            whole = any(type(value) is float and value.is_integer() for value in _numbers(action.arguments))
            valid = validators[action.name].is_valid(action.arguments)
            assert valid == (result.status is CallStatus.EXECUTED) or (valid and whole), (action, result)
    assert result.status in (CallStatus.EXECUTED, CallStatus.INVALID), result.error
    [line] = result.parts
    assert len(line) < 1000 and (result.status is CallStatus.EXECUTED or line.isprintable()), line
    return result.status.name


def _run(call: Call, tools: ToolSet):
    return ToolEnvironment(tools, ToolSettings(), ImagesConfig()).step(call)


def _numbers(value) -> list:
    """All values in arguments that hold no others."""
    if isinstance(value, (dict, list)):
        return [x for inner in (value.values() if isinstance(value, dict) else value) for x in _numbers(inner)]
    return [value]


def texts(first: int, last: int) -> dict:
    """Check the turns of numbers `first` to `last`."""
    tools, ends, slowest = offered(), Counter(), (0.0, "")
    validators = {tool.name: validator(tool) for tool in tools}
    for number in range(first, last):
        text = generated.turn(random.Random(f"turn {number}"))
        began = time.perf_counter()
        try:
            ends[check_turn(text, tools, validators)] += 1
        except Exception as error:
            raise SystemExit(f"error: turn {number} fails ({type(error).__name__}: {error}): {text[:300]!r}") from error
        slowest = max(slowest, (time.perf_counter() - began, text[:60]))
    return {"done": last, "ends": dict(ends), "slowest_ms": round(1e3 * slowest[0], 1), "slowest": slowest[1]}


# ---- programs -------------------------------------------------------------------------------------------------------


def trajectory(number: int, world: ToolEnvironment) -> tuple[Counter, float]:
    """Run the programs of a trajectory; how they ended, and the seconds of the slowest.

    Raises:
        ValueError: a fault that is not the machine's.
    """
    rng, ends, slowest = random.Random(f"programs {number}"), Counter(), 0.0
    world = world.fork(number)
    for _ in range(5):
        began = time.perf_counter()
        result = world.step(Call("python", {"code": generated.changed(rng)}))
        slowest = max(slowest, time.perf_counter() - began)
        ends[result.status.name] += 1
        if result.status is CallStatus.FAULT and not any(words in result.error for words in BUSY):
            raise ValueError(f"trajectory {number} of programs: {result.error}")
        if result.status is CallStatus.INVALID and "variables are gone" in result.error:
            ends["INVALID, and the worker ended"] += 1
    world.close()
    return ends, slowest


def programs(first: int, last: int, sandbox: Sandbox) -> dict:
    """Run the trajectories of numbers `first` to `last`, two at a time. `done` counts trajectories, `run` programs."""
    image, data = Image.linear_gradient("L").resize((32, 24)).convert("RGB"), io.BytesIO()
    image.save(data, "PNG")
    world = ToolEnvironment(ToolSet([python_tool(sandbox)]), ToolSettings(max_images=8), ImagesConfig())
    world.reset(Task("t", "Which?", (data.getvalue(),) * 2, "a"))
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda number: trajectory(number, world), range(first, last)))
    ends = sum((ends for ends, _ in found), Counter())
    return {"done": last, "run": 5 * last, "ends": dict(ends), "slowest_s": round(max(seconds for _, seconds in found), 1)}


# ---- the command ----------------------------------------------------------------------------------------------------


def joined(before: dict, now: dict, seconds: float) -> dict:
    """Return the record of a part of the run and of those before it."""
    worst = {name: max(before.get(name, 0), now[name]) for name in now if name.startswith("slowest_")}
    ends = dict(Counter(before.get("ends", {})) + Counter(now["ends"]))
    return now | worst | {"ends": ends, "seconds": round(before.get("seconds", 0) + seconds)}


def main() -> None:
    parser = common.parser(__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--texts", type=int, default=0, help="turns, those of earlier commands included")
    parser.add_argument("--programs", type=int, default=0, help="programs, those of earlier commands included")
    args = parser.parse_args()
    if args.quick:
        args.texts, args.programs = 5000, 50
    path = (args.out or common.RESULTS) / "fuzz.json"
    record = json.loads(path.read_text()) if path.is_file() and not args.quick else {}
    record = {name: record[name] for name in ("texts", "programs") if name in record}
    scratch = tempfile.TemporaryDirectory()
    tempfile.tempdir = scratch.name  # what other processes have in the common one is theirs
    for name, wanted, size, run in (("texts", args.texts, 50_000, texts), ("programs", args.programs // 5, CHUNK, None)):
        if (done := record.get(name, {}).get("done", 0)) >= wanted:
            continue
        sandbox = None if run else Sandbox(SandboxConfig(wall_s=2.0, memory_mb=128))
        before = common.left(sandbox) if sandbox else {}
        while done < wanted:
            began, last = time.perf_counter(), min(done + size, wanted)
            now = run(done, last) if run else programs(done, last, sandbox) | {"before": before, "after": common.left(sandbox)}
            record[name] = joined(record.get(name, {}), now, time.perf_counter() - began)
            if sandbox and any(now["after"][kind] != before[kind] for kind in ("workers", "descriptors", "folders")):
                sys.exit(f"error: something is left behind: {now['after']}, not {before}.")
            done = last
            common.report("fuzz", args, record)
        print(name, record[name])


if __name__ == "__main__":
    main()
