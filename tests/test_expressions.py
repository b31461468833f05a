"""Answers that are mathematical expressions: math-verify in its process, and expressions that never end."""

import importlib.util
import os
import signal
import threading
import time

import pytest

from imagent_jax.scoring import BadReference, expressions, score

EQUAL = [
    ("1/2", "0.5"), ("\\frac{1}{2}", "$0.5$"), ("(x+1)^2", "x^2+2x+1"), ("\\boxed{\\sqrt{8}}", "2\\sqrt{2}"), ("7", "7."),
    ("\\{1,2\\}", "\\{2,1\\}"),
    ("50\\%", "1/2"), ("\\frac{\\pi}{2}", "\\pi/2"), ("(0,1]", "(0,1]"), ("\\sin^2 x+\\cos^2 x", "1"),
]  # fmt: skip
DIFFERENT = [("1/2", "1/3"), ("x^2", "x"), ("(0,1)", "(0,1]"), ("7", "-7"), ("7", "}{"), ("7", "\\frac{7}"), ("x", "y")]


@pytest.mark.slow(3)
@pytest.mark.parametrize(("answer", "prediction"), EQUAL)
def test_equal_expressions_are_right(answer, prediction):
    assert score(prediction, answer, "math") == 1.0 == score(answer, answer, "math")


@pytest.mark.parametrize(("answer", "prediction"), DIFFERENT)
def test_other_expressions_are_wrong(answer, prediction):
    assert score(prediction, answer, "math") == 0.0


@pytest.mark.parametrize("answer", ["", "}{", "1+" * 600 + "1"])
def test_a_reference_that_is_no_expression_is_refused(answer):
    with pytest.raises(BadReference, match="is no expression of at most 1000 characters; write LaTeX such as"):
        score("1", answer, "math")


@pytest.mark.slow(12)
@pytest.mark.parametrize("endless", ["9^{9^{9^9}}", "(10^{10})!", "\\sum_{i=1}^{10^9} i^i", "((" * 200 + "1" + "))" * 200])
def test_an_expression_that_never_ends_is_wrong_and_the_next_is_scored(endless):
    began = time.monotonic()
    assert score(endless, "1", "math") == 0.0 and score("2/4", "1/2", "math") == 1.0
    assert time.monotonic() - began < 60


def test_too_long_an_expression_is_wrong():
    assert score("1+" * 500 + "1", "501", "math") == 0.0 and score("+".join(["1"] * 500), "500", "math") == 1.0


def test_threads_share_the_process():
    found = {}
    work = [
        threading.Thread(target=lambda i=i: found.update({i: score(f"{i}/2", f"{i / 2}", "math")}), daemon=True) for i in range(8)
    ]
    [thread.start() for thread in work], [thread.join(20) for thread in work]
    assert found == dict.fromkeys(range(8), 1.0)


def test_a_process_killed_from_outside_is_no_verdict():
    assert score("1", "1", "math") == 1.0
    process = expressions._worker().process
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    with pytest.raises(OSError, match="math-verify ended with code -9"):
        score("1", "1", "math")
    assert score("1", "1", "math") == 1.0


def test_without_math_verify_the_command_that_installs_it_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r'math-verify is not installed; run pip install "imagent-jax\[math\]"\.'):
        expressions.check_installed()
