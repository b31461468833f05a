"""Plants bugs one at a time and runs the tests that must catch them: `python benchmarks/mutants.py [--quick] [--only WORD]`.

A bug is a text replacement in one file, listed with its tests in `benchmarks/mutants/*.yaml`, one list per room. The tests run
in a copy of the tree, first without any bug (they must pass), then once per bug (one must fail). Every run is a fork of this
process, which has imported the libraries already. Prints the bugs that no test caught.

Exit code 1: fewer than 95 % were caught. Exit code 2: an entry does not apply any more, or the tests fail without a bug.
"""

import argparse
import contextlib
import importlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import common
import yaml

ROOT = Path(__file__).parent.parent
LISTS = Path(__file__).parent / "mutants"
PASSED, CAUGHT = 0, 1  # exit codes of pytest
SHARE = 0.95
LIBRARIES = (
    "jax.numpy", "flax.nnx", "optax", "orbax.checkpoint", "grain", "tensorflow_datasets", "transformers", "sentencepiece",
    "safetensors.numpy", "jsonargparse", "tensorboardX", "PIL.Image", "rich.console", "scipy.stats", "torch", "pytest",
    "jaxtyping", "beartype",
)  # fmt: skip
"""Imported once, before the first fork. None of them may start a JAX backend."""


@dataclass(frozen=True)
class Mutant:
    """One planted bug.

    Attributes:
        name: what is wrong, in words.
        file: the file it is planted in, relative to the project's root.
        old, new: the text to replace, which stands exactly once in the file, and what replaces it.
        tests: files or node ids of pytest, separated by spaces; at least one test of them must fail.
        quick: part of the quick dozen that CI runs.
    """

    name: str
    file: str
    old: str
    new: str
    tests: str
    quick: bool = False


def read_lists(folder: Path = LISTS) -> list[Mutant]:
    """All mutants of the YAML lists in `folder`.

    Raises:
        ValueError: an entry does not apply: its text does not stand exactly once, its test is missing, or its name is taken.
    """
    found = [Mutant(**entry) for path in sorted(folder.glob("*.yaml")) for entry in yaml.safe_load(path.read_text())]
    names = set()
    for mutant in found:
        path = ROOT / mutant.file
        count = path.read_text().count(mutant.old) if path.is_file() else 0
        if mutant.old == mutant.new:
            raise ValueError(f"Mutant {mutant.name!r} changes nothing; let `new` differ from `old`.")
        if count != 1:
            raise ValueError(f"Mutant {mutant.name!r}: its text stands {count} times in {mutant.file}; it must stand once.")
        for test in mutant.tests.split():
            file, _, function = test.partition("::")
            if not (ROOT / file).is_file():
                raise ValueError(f"Mutant {mutant.name!r}: there is no test file {file}.")
            if function and f"def {function.partition('[')[0]}(" not in (ROOT / file).read_text():
                raise ValueError(f"Mutant {mutant.name!r}: there is no test {test}.")
        if mutant.name in names:
            raise ValueError(f"Two mutants are named {mutant.name!r}; rename one.")
        names.add(mutant.name)
    return found


def copy_tree(target: Path) -> Path:
    """A copy of the files that git tracks or would track."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in filter(None, subprocess.check_output(command, cwd=ROOT, text=True).split("\0")):
        if os.path.lexists(ROOT / name):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name, follow_symlinks=False)
    return target


class Run:
    """pytest in a fork of this process, in a copy of the tree; `limit` seconds at most."""

    def __init__(self, tree: Path, tests: Sequence[str], limit: int, mutant: Mutant | None = None):
        self.tree, self.mutant, self.log, self.began = tree, mutant, tree / "pytest.log", time.perf_counter()
        if mutant:
            self.clean = (tree / mutant.file).read_text()
            (tree / mutant.file).write_text(self.clean.replace(mutant.old, mutant.new))
        self.pid = os.fork()
        if self.pid == 0:
            self._child(tests, limit)

    def _child(self, tests: Sequence[str], limit: int) -> None:
        os.setsid()  # its own children end with it
        signal.alarm(limit)
        os.chdir(self.tree)
        os.environ |= {"PYTHONPATH": str(self.tree), "PYTHONDONTWRITEBYTECODE": "1"}
        sys.path[:] = [str(self.tree), *(place for place in sys.path if place != str(LISTS.parent))]
        sys.dont_write_bytecode = True
        for stream in (1, 2):
            os.dup2(os.open(self.log, os.O_CREAT | os.O_WRONLY | (os.O_TRUNC if stream == 1 else os.O_APPEND)), stream)
        code = 3
        try:
            code = int(sys.modules["pytest"].main(["-n0", "-x", "--tb=line", "-p", "no:cacheprovider", *tests]))
        finally:
            sys.stdout.flush()
            os._exit(code)

    def end(self, status: int) -> dict:
        """The record of the run, given the status that `os.wait` returned."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        if self.mutant:
            (self.tree / self.mutant.file).write_text(self.clean)
        hung = os.WIFSIGNALED(status)  # past its limit, or it crashed the interpreter
        code = CAUGHT if hung else os.WEXITSTATUS(status)
        output = self.log.read_text(errors="replace")
        lines = [line for line in output.splitlines() if line.startswith(("FAILED", "ERROR"))]
        by = "killed by a signal, or ran past the limit" if hung else "".join(lines[:1]).split(" - ")[0]
        return {"code": code, "seconds": round(time.perf_counter() - self.began, 1), "by": by, "output": output[-2000:]}


def plant_all(mutants: Sequence[Mutant], trees: Sequence[Path], limit: int) -> list[dict]:
    """The records of all mutants, one per copy of the tree at a time; each is printed as it ends."""
    waiting, free, running, records = list(reversed(mutants)), list(trees), {}, []
    while waiting or running:
        while waiting and free:
            mutant = waiting.pop()
            run = Run(free.pop(), mutant.tests.split(), limit, mutant)
            running[run.pid] = run
        pid, status = os.wait()
        if pid not in running:
            continue
        run = running.pop(pid)
        free.append(run.tree)
        found, mutant = run.end(status), run.mutant
        if found["code"] not in (CAUGHT, PASSED):
            print(found["output"])
        records.append({
            "name": mutant.name, "file": mutant.file, "tests": mutant.tests, "caught": found["code"] == CAUGHT,
            "by": found["by"], "exit_code": found["code"], "seconds": found["seconds"],
        })  # fmt: skip
        verdict = "caught" if found["code"] == CAUGHT else f"LIVES (pytest ended with {found['code']})"
        print(f"{len(records)}/{len(mutants)} {verdict}: {mutant.name} ({mutant.file}, {found['seconds']:.0f} s)", flush=True)
    return records


def main() -> int:
    """Entry point; see the module's docstring for exit codes."""
    args = options()
    try:
        mutants = read_lists()
    except (ValueError, TypeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    chosen = [m for m in mutants if (m.quick or not args.quick) and args.only.lower() in f"{m.name} {m.file} {m.tests}".lower()]
    if args.sample:
        chosen = random.Random(args.seed).sample(chosen, min(args.sample, len(chosen)))
    print(f"Plants {len(chosen)} of {len(mutants)} bugs, {args.jobs} at a time, each in a copy of the tree.", flush=True)
    for library in LIBRARIES:
        importlib.import_module(library)
    with tempfile.TemporaryDirectory() as folder:
        trees = [copy_tree(Path(folder) / str(i)) for i in range(args.jobs)]
        if not args.assume_green:
            run = Run(trees[0], sorted({test for m in chosen for test in m.tests.split()}), 3600)
            found = run.end(os.waitpid(run.pid, 0)[1])
            if found["code"] != PASSED:
                print(f"error: without any bug the tests do not pass.\n{found['output']}", file=sys.stderr)
                return 2
        records = plant_all(chosen, trees, args.limit)
    living = [record for record in records if not record["caught"]]
    caught = len(records) - len(living)
    print(f"{caught} of {len(records)} planted bugs caught ({100 * caught / max(1, len(records)):.1f} %).")
    for record in living:
        print(f"  lives: {record['name']} in {record['file']}; it should fail {record['tests']}")
    if not args.only:
        common.report("mutants", args, {"planted": len(records), "caught": caught, "living": living, "mutants": records})
    return int(caught < SHARE * len(records))


def options() -> argparse.Namespace:
    """Options of the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="only the dozen that CI plants; writes no result file")
    parser.add_argument("--only", default="", help="only mutants whose name, file or tests hold this word; writes no result file")
    parser.add_argument("--sample", type=int, default=0, help="so many of them, drawn by --seed (0: all)")
    parser.add_argument("--seed", type=int, default=0, help="seed of --sample")
    parser.add_argument("--jobs", type=int, default=2, help="mutants at a time")
    parser.add_argument("--limit", type=int, default=600, help="seconds a mutant's tests may run; beyond that it is caught")
    parser.add_argument("--assume-green", action="store_true", help="do not run the tests without a bug first")
    parser.add_argument("--out", type=Path, help="folder of the result file (default: benchmarks/results)")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
