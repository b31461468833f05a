"""The sandbox on a server: the same results as here, the same errors, and faults wherever the server fails."""

import base64
import contextlib
import io
import json
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from PIL import Image
from test_search import says, scripted

from imagent_jax.chat import Call
from imagent_jax.config import Config, ImagesConfig, SandboxConfig
from imagent_jax.rollout.environment import ToolEnvironment
from imagent_jax.tools import ToolSettings, tools_by_name
from imagent_jax.tools.sandbox import Remote, RemoteWorker, SandboxError, link, open_sandbox, remote
from imagent_jax.types import CallStatus, Task, ToolError

SERVER = Path(__file__).parent / "fusion_server.py"
IMAGES = [Image.new("RGB", (24, 16), colour) for colour in ("red", "lime")]
CALLS = [
    "import random, time\nx = {'a', 'b', 'c'}\nprint(random.random(), time.time(), x, hash('a'), images[2])",
    "show(images[1].crop((0, 0, 12, 16)))\nprint(len(images), sorted(x), random.random())",
    "1 / 0",
    "y = images[3]\nprint(y.size, y.getpixel((0, 0)), len(images))\nshow(images[9])",
    "import cv2\nim = cv2.imread('path_to_input_image.jpg')\ncv2.imwrite('path_to_output_image.jpg', im[:8])\nprint(y.size)",
    "print(images[4].size)\nshow(images[4].rotate(90, expand=True))\nshow(y)",
    "print('z' * 500, random.random())\nraise SystemExit",
]


@contextlib.contextmanager
def served(port: int = 0):
    process = subprocess.Popen([sys.executable, SERVER, str(port)], stdout=subprocess.PIPE, text=True)
    try:
        yield process, process.stdout.readline().strip()
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def url():
    with served() as (_, address):
        yield address


def begun(**settings) -> ToolEnvironment:
    """An environment with the tool python, on two images."""
    files = []
    for image in IMAGES:
        image.save(data := io.BytesIO(), "PNG")
        files.append(data.getvalue())
    tools = tools_by_name(["python"], SandboxConfig(printed=200, wall_s=20.0, **settings))
    environment = ToolEnvironment(tools, ToolSettings(), ImagesConfig())
    environment.reset(Task("t", "Which?", tuple(files), "a"))
    return environment.fork(5)


@pytest.mark.slow(25)
def test_a_trajectory_on_a_server_is_the_trajectory_here(url):
    """Text, errors, images, their lineage and all chance, call by call; each call depends on the ones before."""
    here, there = begun(backend="landlock"), begun(backend="remote", url=url)
    for code in CALLS:
        expected, found = (world.step(Call("python", {"code": code})) for world in (here, there))
        assert found == expected, code
        assert [i.describe() for i in there.images] == [i.describe() for i in here.images]
        assert [i.pixels.tobytes() for i in there.images] == [i.pixels.tobytes() for i in here.images]
    assert len(here.images) == 6 and found.status is CallStatus.EXECUTED
    here.close()
    there.close()
    assert there.step(Call("python", {"code": "1"})).status is CallStatus.FAULT  # it has ended


@pytest.mark.slow(12)
@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("import os\nos._exit(3)", "the code ended its process; its variables are gone"),
        ("while True: pass", "the code ran longer than 1 s; it was stopped and its variables are gone"),
        ("import os\nos.write(3, b'x' * 400)", link.GARBLED),
        ("import os\nos.write(3, bytes(400))\nos._exit(0)", link.GARBLED),
        ("import os\nos.close(3)", "the code ended its process; its variables are gone"),
        ("import ctypes\nctypes.string_at(0)", "the code ended its process; its variables are gone"),
    ],
)
def test_code_that_ends_its_process_can_be_repaired_in_a_new_one(url, monkeypatch, code, error):
    monkeypatch.setattr(remote, "too_long", lambda wall_s, waited_s: link.too_long(wall_s, 0.0))  # the machine may be busy
    worker = RemoteWorker(SandboxConfig(url=url, wall_s=1.0), 0)
    with pytest.raises(ToolError, match=re.escape(error)):
        worker.run(code, [], 0)
    assert not worker.alive


@pytest.mark.slow(5)
def test_the_time_of_all_calls_together_is_bounded_and_so_is_processor_time(url):
    busy = "t = 0\nfor i in range(10**9):\n    t += i\n    if i == 5_000_000: break"
    worker = RemoteWorker(SandboxConfig(url=url, wall_s=60.0, cpu_s=1), 0)
    with pytest.raises(ToolError, match="used more than 1 s of processor time"):
        for _ in range(20):
            worker.run(busy, [], 0)
    assert len(worker._calls) < 19


@pytest.mark.slow(4)
def test_what_a_server_does_not_repeat_is_a_fault(url):
    """The time of a file is real."""
    worker = RemoteWorker(SandboxConfig(url=url), 0)
    assert worker.run("import os\nprint(os.stat('path_to_output_image.jpg').st_mtime_ns)", [], 0).error is None
    with pytest.raises(SandboxError, match=f"{url} did not repeat the trajectory's earlier calls"):
        worker.run("print(1)", [], 0)
    assert not worker.alive


@pytest.mark.slow(10)
def test_a_server_killed_and_started_again_gives_faults_meanwhile():
    with served() as (process, address):
        world = begun(backend="remote", url=address)
        assert world.step(Call("python", {"code": "x = 3"})).status is CallStatus.EXECUTED
        process.kill()
        process.wait()
        lost = world.fork(1).step(Call("python", {"code": "print(1)"}))
        assert lost.status is CallStatus.FAULT and f"SandboxError: {address} gave no answer" in lost.error
        with served(int(address.split(":")[2].split("/")[0])):
            assert world.step(Call("python", {"code": "print(x + 1)"})).parts == ["4"]


# ---- the start ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow(6)
@pytest.mark.parametrize(
    ("file", "old", "new", "what"),
    [
        ("confine.py", "\n    filter_calls()\n", "\n", "code in it .*opens a socket; starts a process"),
        ("confine.py", "if ruleset is not None:", "if False:", "code in it reads a file; changes a file; makes a file"),
        ("confine.py", "    version = _syscall(", "    version = 0 and _syscall(", "OSError: Landlock has version 0"),
        (
            "worker.py",
            "import scipy.ndimage",
            "import a_missing_module",
            "ModuleNotFoundError: No module named 'a_missing_module'",
        ),
    ],
)
def test_a_server_whose_sandbox_does_not_hold_is_refused_at_the_start(url, tmp_path, monkeypatch, file, old, new, what):
    broken = Path(shutil.copy(remote._MODULES[file], tmp_path))
    assert old in (text := broken.read_text())
    broken.write_text(text.replace(old, new))
    monkeypatch.setitem(remote._MODULES, file, broken)
    with pytest.raises(ValueError, match=rf"gives no sandbox that holds \(.*{what}.*or correct sandbox.url"):
        Remote(SandboxConfig(backend="remote", url=url))


def test_a_server_must_be_named_and_no_other_setting_leads_to_one():
    with pytest.raises(ValueError, match="sandbox.backend is 'remote', but sandbox.url is empty; name a server"):
        Config.from_dict({"sandbox": {"backend": "remote"}})
    with pytest.raises(ValueError, match=re.escape("sandbox.url is 'localhost'; give a full address, such as http://")):
        open_sandbox(SandboxConfig(backend="remote", url="localhost"))
    with pytest.raises(ValueError, match="gives no sandbox that holds .*Connection refused"):
        open_sandbox(SandboxConfig(backend="remote", url="http://127.0.0.1:9/run_code"))
    sandbox = open_sandbox(SandboxConfig(url="http://127.0.0.1:9/run_code"))
    assert sandbox.backend in ("namespaces", "landlock")
    sandbox.close()


# ---- servers that misbehave ---------------------------------------------------------------------------------------------


def reply(said: bytes = b"", **ended) -> dict:
    """What a server answers where the process said `said`."""
    head = json.dumps({"late": False, "waited_s": 0.0, "status": 0, "cpu_s": 0.1} | ended).encode()
    return {"status": "Success", "files": {"result": base64.b64encode(head + b"\n" + said).decode()}}


def frame(**message) -> bytes:
    text = json.dumps(message).encode()
    return len(text).to_bytes(4, "little") + text


READY, DONE = frame(ready=True), frame(text="done", error=None, shown=[])
SICK = {
    "status": "SandboxError",
    "message": "no room\x00",
    "files": {},
    "run_result": {"stderr": "Trace\nOSError: no Landlock"},
}


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (says(reply(READY + DONE), 500), "answered 500"),
        (says(b"{"), "JSONDecodeError"),
        (says([]), "returned no result"),
        (says(SICK), "returned no result (OSError: no Landlock no room)"),
        (says({"status": "Failed", "files": {}, "run_result": {"status": "TimeLimitExceeded"}}), "returned no result"),
        (says({"files": {"result": "é"}}), "returned no result"),
        (says({"files": {"result": base64.b64encode(b"[]\n").decode()}}), "returned no result"),
        (says(reply(READY + DONE, late=1)), "returned no result"),
        (says(reply(READY + DONE, cpu_s=None)), "returned no result"),
        (says(reply()), "did not start a worker"),
        (says(reply(DONE)), "did not start a worker"),
        (says(reply(READY, late=True, waited_s=4.0)), "the machine was too busy: code waited 4.0 s"),
        (says(reply(READY, status=9)), "killed from outside"),
        (says(reply(READY + DONE), **{"Content-Length": "999"}), "broke off"),
    ],
)
def test_a_broken_answer_is_a_fault(answer, words):
    with scripted(answer) as server, pytest.raises(SandboxError, match=re.escape(words)):
        RemoteWorker(SandboxConfig(url=server.url), 0).run("1", [], 0)


@pytest.mark.parametrize(
    ("said", "error"),
    [
        (READY, "the code ended its process"),
        (READY + DONE[:-1], "the code ended its process"),
        (READY + DONE + b"x", link.GARBLED),
        (READY + frame(text=1), link.GARBLED),
        (READY + frame(text="", error=None, shown=[[1, 1, None]]) + b"abc", link.GARBLED),
    ],
)
def test_a_broken_result_is_the_code_s_own(said, error):
    with scripted(says(reply(said))) as server, pytest.raises(ToolError, match=re.escape(error)):
        RemoteWorker(SandboxConfig(url=server.url), 0).run("1", [], 0)


def test_a_server_that_drips_is_given_up(monkeypatch):
    monkeypatch.setattr(remote, "START_S", -4.5)
    over = threading.Event()
    drip = 200, {}, iter(lambda: b" " if not over.wait(0.05) else b"", b"")
    with scripted(lambda *_: drip) as server:
        began = time.monotonic()
        with pytest.raises(SandboxError, match="TimeoutError"):
            RemoteWorker(SandboxConfig(url=server.url, wall_s=0.1), 0).run("1", [], 0)
        assert time.monotonic() - began < 60
        over.set()
