"""The tool that plants bugs: its lists apply to the code as it is, and its verdicts are right."""

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))
import mutants

ROOT = Path(__file__).parent.parent

SMALL = """
- {{name: a fault counts, file: imagent_jax/rl/mask.py, old: "counted[EndReason.FAULT] = False", new: "{new}", tests: {tests}}}
"""
HELD = "tests/test_mask.py::test_counting_has_its_own_switches_and_a_fault_never_counts"


def test_every_listed_bug_applies_and_a_dozen_or_two_are_quick():
    listed = mutants.read_lists()
    assert len(listed) >= 60
    assert 12 <= sum(mutant.quick for mutant in listed) <= 24
    rooms = Counter(Path(mutant.file).parts[1] for mutant in listed)
    assert {"model", "rl", "tools", "data", "train.py"} <= rooms.keys()


def run(folder: Path, new: str, tests: str = HELD, *flags: str) -> subprocess.CompletedProcess:
    """The command on a list of one bug."""
    (folder / "one.yaml").write_text(SMALL.format(new=new, tests=tests))
    code = f"import sys, pathlib, mutants; mutants.read_lists.__defaults__ = (pathlib.Path({str(folder)!r}),)\n"
    code += "sys.argv[1:] = ['--only=fault', '--jobs=1', *sys.argv[1:]]; sys.exit(mutants.main())"
    command = [sys.executable, "-c", code, *flags]
    return subprocess.run(command, cwd=ROOT / "benchmarks", capture_output=True, text=True, timeout=600)


@pytest.mark.slow(25)
@pytest.mark.parametrize(
    ("new", "tests", "flags", "code", "words"),
    [
        ("counted[EndReason.FAULT] = True", HELD, [], 0, "1 of 1 planted bugs caught"),
        ("counted[EndReason.FAULT] = bool(0)", HELD, ["--assume-green"], 1, "LIVES (pytest ended with 0)"),
        ("__import__('time').sleep(99) or True", HELD, ["--assume-green", "--limit=9"], 0, "1 of 1 planted bugs caught"),
        ("counted[EndReason.FAULT] = True", "tests/test_mask.py::test_nothing", [], 2, "there is no test tests/test_mask"),
        ("counted[EndReason.FAULT] = True", "tests/test_nothing.py", [], 2, "there is no test file tests/test_nothing.py"),
        ("counted[EndReason.FAULT] = False", HELD, [], 2, "changes nothing; let `new` differ"),
    ],
    ids=["caught", "lives", "hangs", "no such test", "no such file", "changes nothing"],
)
def test_the_verdict_on_a_planted_bug(tmp_path, new, tests, flags, code, words):
    done = run(tmp_path, new, tests, *flags)
    assert done.returncode == code, done.stdout + done.stderr
    assert words in done.stdout + done.stderr
