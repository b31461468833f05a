"""Scores of answers that are mathematical expressions, by math-verify in a process of its own.

SymPy may need hours or all memory for a short text of a policy (9^{9^{9^9}}). The process limits both. math-verify's own limits
are signals, which only work in the main thread and do not interrupt C code.
"""

import functools
import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

from imagent_jax.scoring.text import BadReference

LONGEST = 1000
"""Most characters of an expression. math-verify's regular expressions take quadratic time."""
_MARKS = ("$", "\\(", "\\[", "\\boxed")
_UNBEARABLE = (-signal.SIGXCPU, -signal.SIGSEGV, -signal.SIGABRT)
"""Exit codes of a process that an expression has ended: out of time, out of stack, out of memory in C code."""


def math(prediction: str, answer: str) -> float:
    """Return 1 if math-verify finds both expressions equal (1/2, 0.5 and \\frac{1}{2}), else 0.

    An expression is LaTeX, with or without $ or \\boxed around it. One of more than `LONGEST` characters, and one that takes more
    than three processor seconds or 2 GiB of memory, is wrong.

    Raises:
        BadReference: the reference is no expression, or too long.
        ValueError: math-verify is not installed.
        OSError: its process cannot start or was killed.
    """
    verdict = _worker().ask(_latex(answer), _latex(prediction)) if len(answer) <= LONGEST else "no reference"
    if verdict == "no reference":
        sentence = f"Answer {answer[:LONGEST]!r} is no expression of at most {LONGEST} characters"
        raise BadReference(rf"{sentence}; write LaTeX such as '\frac{{1}}{{2}}'.")
    return float(verdict == "equal")


def check_installed() -> None:
    """Raise ValueError, with the remedy, where math-verify is not installed."""
    if importlib.util.find_spec("math_verify") is None:
        raise ValueError('math-verify is not installed; run pip install "imagent-jax[math]".')


def _latex(text: str) -> str:
    """Return an expression between the marks by which math-verify finds it; "" for one that is too long."""
    text = text.strip().removesuffix(".")
    return "" if len(text) > LONGEST else text if any(mark in text for mark in _MARKS) else f"${text}$"


class _Worker:
    """The process. It starts with the first question, and again after an expression has ended it."""

    def __init__(self):
        self.lock, self.process = threading.Lock(), None

    def ask(self, reference: str, prediction: str) -> str:
        """Return "equal", "different" or "no reference"."""
        with self.lock:
            if self.process is None:
                command = [sys.executable, "-P", str(Path(__file__).with_name("math_worker.py"))]
                env = os.environ | {"PYTHONHASHSEED": "0"}  # SymPy's order of terms
                pipe = subprocess.PIPE
                self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True, env=env)
            try:
                print(json.dumps([reference, prediction]), file=self.process.stdin, flush=True)
                reply = self.process.stdout.readline().strip()  # ty: ignore[missing-union-attribute] - a pipe
            except BrokenPipeError:
                reply = ""
            if not reply:
                code, self.process = self.process.wait(), None
                if code not in _UNBEARABLE:
                    raise OSError(f"The process of math-verify ended with code {code}.")
            return reply or "different"


@functools.cache
def _worker() -> _Worker:
    check_installed()
    return _Worker()
