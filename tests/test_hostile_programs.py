"""Hostile programs: each does harm without the sandbox, none does in it, and the next trajectory notices nothing."""

import os
import shutil
import socket
import string
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import hostile
import hostile_calls
import numpy as np
import pytest
from PIL import Image

from imagent_jax.config import SandboxConfig
from imagent_jax.tools.sandbox import BACKENDS, Ran, Sandbox, SandboxError
from imagent_jax.types import ToolError

ROOT = Path(__file__).parent.parent
GROUPS = (hostile.NETWORK, hostile.READING, hostile.WRITING, hostile.FILLING, hostile.MEMORY, hostile.TIME, hostile_calls.ALL)
PROGRAMS = [program for group in GROUPS for program in group]
LIMITS = {"memory_mb": 128, "disk_mb": 32, "files": 64, "cpu_s": 30, "printed": 500}
LIBRARIES = ("numpy", "PIL", "cv2", "scipy")
HARM = "print('HARM')"


class World:
    """What hostile programs attack: a folder with a secret, listeners, and a process that has the secret in its environment."""

    def __init__(self, folder: Path):
        self.folder, self.secret, self.heard = folder, "s3cr3t-of-the-trainer", []
        folder.chmod(0o755)
        self.process = None
        self.reset()
        address = str(folder.parent / f"{folder.name}.socket")
        tcp, unix, abstract = socket.create_server(("127.0.0.1", 0)), socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)
        unix.bind(address)
        abstract.bind(f"\0{folder.name}")
        self.udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.udp.bind(("127.0.0.1", 0))
        for listener in (tcp, unix, abstract):
            listener.listen()
            threading.Thread(target=self.accept, args=(listener,), daemon=True).start()
        threading.Thread(target=lambda: self.heard.append(self.udp.recvfrom(99)), daemon=True).start()
        self.facts = {
            "secret": self.secret, "file": str(folder / "secret"), "folder": str(folder), "module": str(folder / "module.py"),
            "netrc": str(folder / "netrc"), "port": tcp.getsockname()[1], "udp": self.udp.getsockname()[1], "unix": address,
            "abstract": folder.name, "repository": str(ROOT), "package": pytest.__file__,
            "packages": str(Path(np.__file__).parents[1]), "library": "libutil.so.1",
        }  # fmt: skip

    def accept(self, listener: socket.socket) -> None:
        while True:
            peer, _ = listener.accept()
            self.heard.append(listener)
            peer.close()

    def reset(self) -> None:
        """Put everything as it was at first."""
        subprocess.run(["rm", "-rf", *map(str, self.folder.iterdir())] if self.folder.exists() else ["true"], check=True)
        self.folder.mkdir(exist_ok=True)
        (self.folder / "secret").write_text(self.secret)
        (self.folder / "module.py").write_text("x = 1\n")
        (self.folder / "netrc").write_text("machine x login y password z\n")
        for file in self.folder.iterdir():
            file.chmod(0o644)
        self.files = self.listing()
        if self.process:  # one of its own for every program: a signal may be on its way to the old one
            self.process.kill()
            self.process.wait()
        # In a session of its own: that of these tests may have begun outside of a container, where its number reads 0.
        self.process = subprocess.Popen(["sleep", "1000"], env={"HOSTILE_SECRET": self.secret}, start_new_session=True)
        self.heard.clear()

    def listing(self) -> dict[str, tuple]:
        return {p.name: (p.lstat().st_mode, p.lstat().st_mtime_ns, p.read_bytes()) for p in self.folder.iterdir()}

    def untouched(self) -> bool:
        return self.listing() == self.files and self.process.poll() is None and self.heard == []

    def code(self, program: hostile.Program) -> str:
        facts = self.facts | {"pid": self.process.pid}
        return string.Template(program.code).safe_substitute(facts) + f"\n{HARM}\n"


@pytest.fixture(scope="module")
def world():
    made = World(Path(tempfile.mkdtemp(prefix="hostile_")))
    yield made
    made.process.kill()
    made.process.wait()
    shutil.rmtree(made.folder)
    Path(made.facts["unix"]).unlink()


@pytest.fixture(scope="module", params=list(BACKENDS))
def sandbox(request):
    made = Sandbox(SandboxConfig(backend=request.param, wall_s=3.0, **LIMITS))
    yield made
    made.close()


@pytest.fixture(scope="module", params=list(BACKENDS))
def impatient(request):
    made = Sandbox(SandboxConfig(backend=request.param, wall_s=0.3, **LIMITS))
    yield made
    made.close()


def attempt(sandbox: Sandbox, code: str) -> Ran | str:
    """The result of code in a worker of its own, or the error by which the policy is told."""
    worker = sandbox.open(0)
    try:
        return worker.run(code, [Image.new("RGB", (8, 8), "red")], 4)
    except (ToolError, SandboxError) as error:
        assert not worker.alive and (isinstance(error, ToolError) or "the machine was too busy" in str(error))
        return str(error)
    finally:
        worker.close()


def check_others(sandbox: Sandbox, world: World) -> None:
    """Nothing outside was touched, and the next trajectory's call runs."""
    assert world.untouched()
    neighbour = sandbox.open(1)
    assert neighbour.run("print(6 * 7)", [], 0) == Ran("42\n", [], None)
    neighbour.close()


def of(*groups, hangs=False):
    chosen = [p for group in groups for p in group if p.hangs == hangs]
    return pytest.mark.parametrize("program", chosen, ids=[p.name for p in chosen])


def test_there_are_enough_programs_and_all_differ():
    assert len(PROGRAMS) > 450 and len({p.code for p in PROGRAMS}) == len(PROGRAMS)


@pytest.mark.slow(150)
@of(*GROUPS)
def test_no_program_gets_out(sandbox, world, program):
    world.reset()
    outcome = attempt(sandbox, world.code(program))
    if program.untried != hostile_calls.OUTSIDE and not (program.strict and sandbox.backend == "landlock"):
        assert isinstance(outcome, str) or (outcome.error and "HARM" not in outcome.text), outcome
    check_others(sandbox, world)


@pytest.mark.parametrize("kind", sorted({program.kind for program in PROGRAMS}))
def test_the_first_program_of_each_kind_does_no_harm(world, kind):
    """The quick tier's share of the test above, by the backend that is taken here."""
    program = next(p for p in PROGRAMS if p.kind == kind)
    made = Sandbox(SandboxConfig(wall_s=0.5 if program.hangs else 8.0, **LIMITS))
    world.reset()
    outcome = attempt(made, world.code(program))
    assert isinstance(outcome, str) or program.strict or "HARM" not in outcome.text
    assert world.untouched()
    made.close()


@pytest.mark.slow(20)
@of(hostile.TIME, hangs=True)
def test_no_program_outlasts_its_time(impatient, world, program):
    began = time.monotonic()
    outcome = attempt(impatient, world.code(program))
    assert any(words in outcome for words in ("ran longer than 0.3 s", "ended its process", "too busy"))
    assert time.monotonic() - began < 30  # far above the limit, and far below never
    assert world.untouched()


@pytest.mark.slow(100)
@of(*GROUPS)
def test_each_program_does_harm_without_the_sandbox(world, tmp_path, program):
    if program.untried or (program.root and os.geteuid()):
        return  # the table says why
    world.reset()
    ended = unconfined(world, program, tmp_path, 120)
    absent = [f"[Errno {number}]" in ended for number in hostile.ABSENT]
    assert "HARM" in ended or (any(absent) and program.kind in ("network", "system calls")), ended[-500:]
    world.reset()
    subprocess.run(["rm", "-rf", str(tmp_path)], check=True)


@pytest.mark.slow(30)
@of(hostile.TIME, hangs=True)
def test_each_slow_program_does_not_end_without_the_sandbox(world, tmp_path, program):
    with pytest.raises(subprocess.TimeoutExpired):
        unconfined(world, program, tmp_path, 1.0)


def unconfined(world: World, program: hostile.Program, folder: Path, seconds: float) -> str:
    """What a program prints as a plain process."""
    code = world.code(program)
    path = "" if not any(name in code for name in LIBRARIES) else f"import sys; sys.path.append({world.facts['packages']!r})\n"
    with open(world.folder / "secret") as inherited:
        ended = subprocess.run(
            [sys.executable, "-I", "-S", "-c", path + code], cwd=folder, text=True, timeout=seconds, errors="replace",
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL if program.hangs else subprocess.PIPE,
            stderr=subprocess.DEVNULL if program.hangs else subprocess.STDOUT, pass_fds=[inherited.fileno()],
            env={"HOSTILE_SECRET": world.secret, "PATH": os.environ["PATH"]},
        )  # fmt: skip
    return ended.stdout or ""
