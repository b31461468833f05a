"""The sandbox: what code sees of its trajectory, its limits, its seed, and that nothing of it stays behind."""

import gc
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import generated
import numpy as np
import pytest
from PIL import Image

from imagent_jax.config import SandboxConfig
from imagent_jax.tools.sandbox import BACKENDS, Ran, Sandbox, SandboxError, host
from imagent_jax.types import ToolError

ROOT = Path(__file__).parent.parent
PIXELS = np.random.default_rng(0).integers(0, 256, (12, 20, 3), np.uint8)
IMAGES = [Image.fromarray(PIXELS), Image.new("RGB", (16, 16), "blue")]


@pytest.fixture(scope="module", params=list(BACKENDS))
def sandbox(request):
    made = Sandbox(SandboxConfig(backend=request.param, wall_s=20.0, memory_mb=128, disk_mb=8, printed=100))
    yield made
    made.close()


@pytest.fixture
def worker(sandbox):
    made = sandbox.open(0)
    yield made
    made.close()


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def gone(pid: int) -> bool:
    """Wait until a process has ended."""
    deadline = time.monotonic() + 60
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    return not alive(pid)


# ---- what code sees -----------------------------------------------------------------------------------------------------


def test_variables_live_as_long_as_the_trajectory(sandbox, worker):
    assert worker.run("x = 41\ndef f(a):\n    return a + 1", [], 0) == Ran("", [], None)
    assert worker.run("print(f(x))", [], 0).text == "42\n"
    other = sandbox.open(0)
    assert other.run("print(x)", [], 0).error == "NameError: name 'x' is not defined (line 1: print(x))"
    other.close()


def test_images_are_the_trajectory_s_pixels_by_number(worker):
    code = "import numpy as np\nprint(len(images), [i.size for i in images], np.asarray(images[1]).astype(int).sum())"
    assert worker.run(code, IMAGES, 0).text == f"2 [(20, 12), (16, 16)] {PIXELS.astype(int).sum()}\n"
    ran = worker.run("show(images[1])", IMAGES, 1)
    assert np.array_equal(np.asarray(ran.shown[0][0]), PIXELS) and ran.shown[0][1] == 1


def test_only_images_that_code_uses_are_sent(worker):
    class Watched:
        size, sent = (20, 12), 0

        def tobytes(self):
            self.sent += 1
            return PIXELS.tobytes()

    watched = [Watched(), Watched()]
    for _ in range(3):
        assert worker.run("print(images[2].size)", watched, 0).text == "(20, 12)\n"
    assert [image.sent for image in watched] == [0, 1]


@pytest.mark.parametrize("number", ["0", "3", "-1", "'1'", "None", "1.0", "10**30"])
def test_numbers_that_do_not_exist_are_named(worker, number):
    error = worker.run(f"images[{number}]", IMAGES, 0).error
    assert error.startswith("KeyError: ") and "image numbers are 1 to 2" in error


def test_changing_an_image_does_not_change_the_trajectory_s(worker):
    assert worker.run("images[1].paste((0, 0, 0), (0, 0, 20, 12))\nprint(images[1].getpixel((0, 0)))", IMAGES, 0).text == (
        f"{tuple(PIXELS[0, 0].tolist())}\n"
    )


@pytest.mark.parametrize(
    "shown, parent, pixel",
    [
        ("images[1].crop((1, 2, 5, 6))", 1, tuple(PIXELS[2, 1].tolist())),
        ("images[2].resize((4, 4)).convert('L')", 2, (29, 29, 29)),
        ("np.zeros((4, 4, 3), np.uint8)", None, (0, 0, 0)),
        ("np.ones((4, 4), bool)", None, (255, 255, 255)),
        ("np.full((4, 4, 1), 0.5)", None, (128, 128, 128)),
        ("np.full((4, 4), 300)", None, (255, 255, 255)),
        ("np.full((4, 4), np.nan)", None, (0, 0, 0)),
        ("Image.new('RGBA', (4, 4), (0, 0, 0, 0))", None, (255, 255, 255)),
        ("Image.fromarray(np.full((4, 4), 128 * 257, np.uint16))", None, (128, 128, 128)),
        ("Image.new('RGB', (4, 4), 'red'), 2", 2, (255, 0, 0)),
    ],
)
def test_what_is_shown_comes_back_with_its_parent(worker, shown, parent, pixel):
    ran = worker.run(f"import numpy as np\nfrom PIL import Image\nprint(show({shown}))", IMAGES, 2)
    assert ran.error is None and ran.text == "3\n" and [p for _, p in ran.shown] == [parent]
    assert ran.shown[0][0].size == (4, 4) and ran.shown[0][0].getpixel((0, 0)) == pixel


@pytest.mark.parametrize(
    "code, message",
    [
        ("for _ in range(4): show(images[1])", "no more images can be shown"),
        ("import numpy as np\nshow(np.zeros((5000, 5000), np.uint8))", "an image of 5000 x 5000 pixels is too large to show"),
        ("import numpy as np\nshow(np.zeros((0, 4), np.uint8))", "an image of 4 x 0 pixels is too large to show"),
        ("show(5)", "show takes an image or an array [h, w] or [h, w, 3], got int64 []"),
        ("import numpy as np\nshow(np.zeros((4, 4, 2)))", "got float64 [4, 4, 2]"),
        ("show('no.png')", "No such file or directory: 'no.png'"),
        (
            "from PIL import Image\nshow(Image.new('F', (4, 4)))",
            "its pixels are 32-bit numbers (mode F), whose white is not known",
        ),
        ("open('path_to_output_image.jpg', 'w').close()\nshow('path_to_output_image.jpg')", "it does not decode"),
    ],
)
def test_what_cannot_be_shown_is_an_error(worker, code, message):
    ran = worker.run(code, IMAGES, 3)
    assert message in ran.error and ran.shown == []
    assert worker.run("print(show(images[2]))", IMAGES, 3).text == "3\n"  # what was shown in vain has no number


def test_code_in_visual_arft_s_form_reads_and_writes_its_two_files(worker):
    code = "import cv2\nim = cv2.imread('path_to_input_image.jpg')\ncv2.imwrite('path_to_output_image.jpg', im[:6])"
    ran = worker.run(code, IMAGES[::-1], 2)
    assert [(image.size, parent) for image, parent in ran.shown] == [((16, 6), 1)]
    assert abs(np.asarray(ran.shown[0][0]).astype(int) - [0, 0, 255]).max() <= 2  # a JPEG
    assert worker.run("x = 'path_to_output_image.jpg'", IMAGES, 2).shown == []  # once


@pytest.mark.parametrize(
    "code, error",
    [
        ("1 / 0", "ZeroDivisionError: division by zero (line 1: 1 / 0)"),
        ("def f(x):\n    return g(x)\ng = lambda x: x.y\nf(1)",
         "AttributeError: 'int' object has no attribute 'y' (line 4: f(1); line 2 in f: return g(x); line 3 in <lambda>: "
         "g = lambda x: x.y)"),
        ("x = (\n", "SyntaxError: '(' was never closed (line 1: x = ()"),
        ("import json\njson.loads('{')", "JSONDecodeError: Expecting property name enclosed in double quotes: line 1 column 2 "
         "(char 1) (line 2: json.loads('{'))"),
        ("raise SystemExit", None), ("import sys\nsys.exit(0)", None), ("import sys\nsys.exit('no')", "SystemExit: no"),
        ("x = '\0'", "SyntaxError: source code string cannot contain null bytes"),
        ("assert False", "AssertionError (line 1: assert False)"),
    ],
)  # fmt: skip
def test_an_exception_is_one_line_with_the_code_s_own_lines(worker, code, error):
    assert worker.run(code, [], 0).error == error


def test_printed_text_is_cut_to_the_limit(worker):
    assert worker.run("import sys\nprint('é' * 60)\nsys.stderr.write('b' * 60)", [], 0).text == (
        "é" * 60 + "\n" + "b" * 39 + "\n... 21 more characters"
    )
    assert worker.run("print('\\ud800')", [], 0).text == "?\n"  # no tokenizer takes a lone surrogate


# ---- the seed -----------------------------------------------------------------------------------------------------------

CHANCE = """
import os, random, secrets, tempfile, time, uuid, datetime
import numpy as np
print(time.time(), time.monotonic(), time.perf_counter_ns(), datetime.datetime.now(), random.random(), random.Random().random())
print(os.urandom(4), uuid.uuid4(), secrets.token_hex(4), np.random.rand(), np.random.default_rng().random(), hash("a"))
print(random.SystemRandom().random(), np.random.RandomState().rand(), next(tempfile._get_candidate_names()), {"a", "b", "c"})
random.seed(), np.random.seed()
print(random.random(), random.randbytes(4), np.random.rand(), uuid.uuid1())
"""
CONSTANT = (
    "import os, threading\nprint(os.getpid(), os.getppid(), threading.get_native_id(), os.getcwd(), os.path.abspath('a.png'))",
    "import email.utils\nprint(email.utils.make_msgid().split('.')[:2])",
    "import logging, sys\nlogging.basicConfig(format='%(process)d', stream=sys.stdout, force=True)\nlogging.warning('now')",
    "import cv2\nprint(cv2.getTickCount() % 10**6, cv2.getCPUTickCount() % 10**6, cv2.getTickFrequency())",
    "import time\nmeter = cv2.TickMeter()\nfor _ in range(2):\n    meter.start(), time.sleep(1), meter.stop()",
    "print(meter.getTimeMilli(), meter.getLastTimeSec(), meter.getCounter(), meter.getAvgTimeSec(), round(meter.getFPS(), 2))",
    "import tempfile\nprint(tempfile.gettempdir())",
)


def test_time_and_entropy_come_from_the_seed():
    def outcome(sandbox, seed):
        worker = sandbox.open(seed)
        text = worker.run(CHANCE, [], 0).text
        worker.close()
        return text.splitlines()

    settings = SandboxConfig(printed=2000, wall_s=20.0)
    first, second = Sandbox(settings), Sandbox(settings)
    outcome(first, 5)  # what ran before makes no difference
    a, b, c = outcome(first, 1), outcome(second, 1), outcome(second, 2)
    assert a == b and len(a) == 4 and all(x != y for x, y in zip(a, c, strict=True))
    first.close()
    second.close()


def test_what_differs_from_process_to_process_reads_the_same(sandbox):
    ran = []
    for _ in range(2):
        worker = sandbox.open(1)
        ran.append([worker.run(code, [], 0) for code in CONSTANT])
        worker.close()
    assert ran[0] == ran[1]
    *texts, folder = [one.text.strip() for one in ran[0]]
    assert texts == [
        "1 0 1 /sandbox /sandbox/a.png", "['<170000000000', '1']", "1", "0 0 1000000000.0", "", "2002.0 1.001 2 1.001 1.0",
    ]  # fmt: skip
    assert folder == "/sandbox" or "'/sandbox']" in ran[0][-1].error


def test_names_of_any_length_and_any_parent_leave_the_worker_alive(worker):
    assert worker.run("raise type('A' * 100000, (Exception,), {})('x')", [], 0).error.startswith(f"{'A' * 80}: x (line 1: ")
    long = "f" * 100_000
    assert f" in {'f' * 80}: raise" in worker.run(f"def {long}():\n    raise ValueError\n{long}()", [], 0).error
    for parent in ("True", "10**5000", "0", "9"):
        [(_, found)] = worker.run(f"show(images[1].copy(), parent={parent})", IMAGES, 1).shown
        assert found is None


def test_code_that_exits_without_an_error_has_shown_its_image(worker):
    save = "from PIL import Image\nImage.new('RGB', (8, 6)).save('path_to_output_image.jpg')\n"
    for end, count in (("raise SystemExit", 1), ("import sys; sys.exit(0)", 1), ("raise SystemExit(3)", 0)):
        ran = worker.run(save + end, [], 1)
        assert [image.size for image, _ in ran.shown] == [(8, 6)] * count and (ran.error == "SystemExit: 3") == (not count)


def test_objects_are_printed_without_addresses_which_chance_gives(worker):
    ran = worker.run("print(images[1], hex(2**40), 'at 0x123456')\nraise ValueError(lambda: 0)", IMAGES, 0)
    assert ran.text == "<PIL.Image.Image image mode=RGB size=20x12 at 0x0> 0x10000000000 at 0x123456\n"
    assert worker.run("print([object()])", IMAGES, 0).text == "[<object object at 0x0>]\n"
    assert ran.error.startswith("ValueError: <function <lambda> at 0x0> (line 2: ")


def test_sleeping_takes_no_time_and_the_clock_knows(worker):
    began = time.monotonic()
    assert worker.run("import time\nt = time.time()\ntime.sleep(10**6)\nprint(round(time.time() - t))", [], 0).text == "1000000\n"
    assert time.monotonic() - began < 1000


# ---- limits -------------------------------------------------------------------------------------------------------------


def test_code_that_ends_its_process_loses_its_variables_only(sandbox, worker):
    other = sandbox.open(1)
    other.run("x = 1", [], 0)
    with pytest.raises(ToolError, match="the code ended its process; its variables are gone"):
        worker.run("import os\nos._exit(3)", [], 0)
    assert not worker.alive and other.run("print(x)", [], 0).text == "1\n"
    other.close()


@pytest.mark.parametrize("backend", list(BACKENDS))
def test_time_is_bounded_per_call_and_processor_time_per_trajectory(backend):
    sandbox = Sandbox(SandboxConfig(backend=backend, wall_s=60.0, cpu_s=2))
    worker = sandbox.open(0)
    with pytest.raises(ToolError, match="used more than 2 s of processor time"):
        while True:
            worker.run("for _ in range(10**7): pass", [], 0)
    sandbox.close()
    sandbox = Sandbox(SandboxConfig(backend=backend, wall_s=0.5))
    worker = sandbox.open(0)
    worker._waited_s = lambda: 0.0
    with pytest.raises(ToolError, match="ran longer than 0.5 s; it was stopped"):
        worker.run("while True: pass", [], 0)
    assert gone(worker.pid)
    sandbox.close()


def test_code_that_the_machine_was_too_busy_to_run_is_a_fault(sandbox, monkeypatch):
    worker, waits = sandbox.open(0), iter([1.0, 16.0])
    worker._settings = SandboxConfig(wall_s=0.2)
    monkeypatch.setattr(worker, "_waited_s", lambda: next(waits))
    with pytest.raises(SandboxError, match="the machine was too busy: code waited 15.0 s for a processor"):
        worker.run("while True: pass", [], 0)


def test_memory_is_bounded_and_the_next_call_runs(worker):
    assert worker.run("x = bytearray(200 << 20)", [], 0).error.startswith("MemoryError")
    assert worker.run("x = bytearray(60 << 20)\nprint(len(x))", [], 0).text == f"{60 << 20}\n"


def test_files_are_private_and_bounded(sandbox, worker):
    code = "with open('path_to_output_image.jpg', 'wb') as f:\n    for _ in range(9):\n        f.write(bytes(1 << 20))"
    assert "OSError: [Errno" in worker.run(code, [], 0).error
    other = sandbox.open(0)
    assert other.run("import os\nprint(os.path.getsize('path_to_output_image.jpg'))", [], 0).text in ("0\n", "")
    other.close()


def test_a_forged_result_is_the_trajectory_s_own_and_the_next_call_finds_out(sandbox, worker):
    forged = "import json, os\nm = json.dumps({'text': 'forged', 'error': None, 'shown': []}).encode()\n"
    assert worker.run(forged + "os.write(4, len(m).to_bytes(4, 'little') + m)", [], 0) == Ran("forged", [], None)
    time.sleep(0.5)  # its true result is there now
    with pytest.raises(ToolError, match="wrote to the connection of its result"):
        worker.run("print(1)", [], 0)
    assert not worker.alive


@pytest.mark.parametrize("shown", ["[[9999, 9999, None]]", "[[4096, 4096, 1], [1, 1, 1]]", "[[1, 1, 1]] * 3", "[[0, 1, 1]]"])
def test_a_forged_image_is_refused_before_its_pixels_are_read(sandbox, worker, shown):
    code = f"import json, os\nm = json.dumps({{'text': '', 'error': None, 'shown': {shown}}}).encode()\n"
    with pytest.raises(ToolError, match="wrote to the connection of its result"):
        worker.run(code + "os.write(4, len(m).to_bytes(4, 'little') + m)\nwhile True: pass", [], 2)


# ---- processes ----------------------------------------------------------------------------------------------------------


def test_a_worker_killed_from_outside_is_a_fault(sandbox, worker):
    worker.run("x = 1", [], 0)
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(SandboxError, match="killed from outside"):
        worker.run("print(x)", [], 0)
    assert not worker.alive


def test_without_its_process_the_sandbox_faults_once_and_starts_again():
    sandbox = Sandbox(SandboxConfig())
    worker = sandbox.open(0)
    worker.run("x = 1", [], 0)
    sandbox._process.kill()
    assert gone(worker.pid)  # no worker outlives it
    with pytest.raises(SandboxError, match="the process that starts workers is gone"):
        worker.run("print(x)", [], 0)
    worker.close()
    again = sandbox.open(0)
    assert again.run("print(1)", [], 0).text == "1\n"
    sandbox.close()


def test_closing_ends_a_call_that_is_running(sandbox):
    worker, errors = sandbox.open(0), []

    def call():
        try:
            worker.run("while True: pass", [], 0)
        except SandboxError as error:
            errors.append(str(error))

    thread = threading.Thread(target=call)
    thread.start()
    time.sleep(0.2)
    worker.close()
    thread.join(60)
    assert errors == ["the trajectory was closed during a call"] and gone(worker.pid)


def test_a_worker_that_nobody_holds_is_ended(sandbox):
    worker = sandbox.open(0)
    pid = worker.pid
    assert alive(pid)
    del worker
    gc.collect()
    assert gone(pid)


def test_trajectories_leave_nothing_behind(sandbox):
    def left() -> tuple[int, int, list[str]]:
        children = Path(f"/proc/{sandbox._process.pid}/task/{sandbox._process.pid}/children").read_text().split()
        return len(os.listdir("/proc/self/fd")), len(children), sorted(Path(tempfile.gettempdir()).glob("imagent_sandbox_*"))

    gc.collect()
    before = left()
    for i in range(40):
        worker = sandbox.open(i)
        assert worker.run("x = bytearray(1 << 20)\nprint(len(images))", IMAGES, 0).text == "2\n"
        worker.close()
    del worker
    deadline = time.monotonic() + 60  # the last worker is waited for after the answer
    while left() != before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert left() == before


SUICIDE = """
import os, sys
from imagent_jax.config import SandboxConfig
from imagent_jax.tools.sandbox import Sandbox
sandbox = Sandbox(SandboxConfig())
worker = sandbox.open(0)
worker.run("x = 1", [], 0)
print(sandbox._process.pid, worker.pid, flush=True)
os.kill(os.getpid(), 9)
"""


def run_python(code: str, *prefix: str) -> subprocess.CompletedProcess:
    return subprocess.run([*prefix, sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=300)


def test_nothing_outlives_a_trainer_that_is_killed():
    pids = [int(pid) for pid in run_python(SUICIDE).stdout.split()]
    assert len(pids) == 2 and all(gone(pid) for pid in pids)


@pytest.mark.parametrize("backend", list(BACKENDS))
def test_an_ordinary_user_has_the_sandbox_too(backend):
    code = (
        "import os\nfrom imagent_jax.config import SandboxConfig\nfrom imagent_jax.tools.sandbox import Sandbox\n"
        f"s = Sandbox(SandboxConfig(backend={backend!r}))\nw = s.open(0)\nprint(os.geteuid(), w.run('print(6 * 7)', [], 0))"
    )
    prefix = (
        ["unshare", "--map-user=1234", "--map-group=1234"] if os.geteuid() == 0 else []
    )  # root plays one, who keeps access to this Python
    ended = run_python(code, *prefix)
    user, text = ended.stdout.split(maxsplit=1)
    assert user == ("1234" if prefix else str(os.geteuid())) and "text='42\\n'" in text, ended.stderr


# ---- the start ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "backend, file, old, new, what",
    [
        ("namespaces", "confine.py", "\n    filter_calls()\n", "\n", "starts a process; starts a thread"),
        ("landlock", "confine.py", "\n    filter_calls()\n", "\n", "opens a socket; starts a process"),
        ("landlock", "confine.py", "if ruleset is not None:", "if False:", "reads a file; changes a file; makes a file"),
        ("namespaces", "zygote.py", 'settings["backend"] == "namespaces"', "False", "did not start"),
        ("namespaces", "confine.py", "(resource.RLIMIT_AS, base_bytes", "(resource.RLIMIT_AS, 10**12", "exceeds its memory"),
        ("namespaces", "confine.py", "(resource.RLIMIT_FSIZE, disk)", "(resource.RLIMIT_FSIZE, -1)", "exceeds its disk"),
        ("namespaces", "confine.py", "_drop_rights(become_nobody", "len(become_nobody", "did not start"),
        ("namespaces", "zygote.py", "import worker\n", "import a_missing_module\n", "No module named 'a_missing_module'"),
    ],
)  # fmt: skip
def test_a_sandbox_that_does_not_hold_is_refused_at_the_start(tmp_path, monkeypatch, backend, file, old, new, what):
    folder = Path(shutil.copytree(host._ZYGOTE.parent, tmp_path / "sandbox"))
    text = (folder / file).read_text()
    assert old in text
    (folder / file).write_text(text.replace(old, new))
    monkeypatch.setattr(host, "_ZYGOTE", folder / "zygote.py")
    with pytest.raises(ValueError, match=re.escape(what)) as refused:
        Sandbox(SandboxConfig(backend=backend))
    assert "take 'python' out of tools.names" in str(refused.value)


def test_the_next_backend_is_taken_where_the_first_is_refused(tmp_path, monkeypatch):
    folder = Path(shutil.copytree(host._ZYGOTE.parent, tmp_path / "sandbox"))
    text = (folder / "confine.py").read_text()
    (folder / "confine.py").write_text(text.replace('"unshare")', '"unshare")\n    raise PermissionError("unshare")'))
    monkeypatch.setattr(host, "_ZYGOTE", folder / "zygote.py")
    sandbox = Sandbox(SandboxConfig())
    assert sandbox.backend == "landlock" and "path_to_output_image.jpg" in sandbox.enforces
    sandbox.close()


def test_where_there_is_none_one_sentence_says_so(monkeypatch):
    monkeypatch.setattr(host.platform, "machine", lambda: "arm64")
    with pytest.raises(ValueError, match=r"finds no sandbox .* on arm64.*; run on Linux 6.2 or newer on x86-64"):
        Sandbox(SandboxConfig())


def test_a_missing_library_is_named_with_its_extra(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "cv2" else find(name))
    with pytest.raises(ValueError, match=re.escape("The tool 'python' needs cv2; pip install 'imagent-jax[sandbox]'.")):
        Sandbox(SandboxConfig())


# ---- generated programs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", generated.REAL)
def test_real_programs_run(worker, code):
    assert worker.run(code, IMAGES, 4).error is None
