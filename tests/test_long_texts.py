"""Everything that reads a model's text takes time in proportion to its length."""

import subprocess
import sys
from pathlib import Path

import pytest

from imagent_jax.chat import QWEN, Call, answers, extract_answer, well_formed_answer
from imagent_jax.scoring import SCORERS
from imagent_jax.tools import VISUAL_TOOLS, ImageRegistry, ToolSet, ToolSettings
from imagent_jax.types import quote

LENGTH = 100_000
LIMIT_S = 120  # many times what it takes; one quadratic expression needs minutes
TURNS = ("", "<answer>7", "<answer>7</answer>", "7</answer><answer>", "<tool_call>", "<|")
RUNS = (
    *" \t\n\u3000\u00a0.,-+_|<>/\\()[]{}\"'=:09aAxé红ก。，\u0301\u200b\u2019²\u0660",
    "<answer>", "</answer>", "<tool_call>", "</tool_call>",
    "<|im_end|>", "\u0301\u0323", "1,", "1\u202f", "image ", "the ", "<|", " <", '\\"', "[1,", '{"a":', "é.",
    "1,2,3,4,", "[1,2,3,4],", "(1,2),", ";", "、", "`", "$",
)  # fmt: skip
"""Each character and marker that an expression of these modules treats apart, and characters of other scripts."""
REFERENCES = {"exact": ("", "red"), "choice": ("image", "B"), "number": ("-1", "1,234"), "f1": ("a", "the 红 bus"),
              "set_f1": ("a", "the 红 bus"), "set": ("a,", "a; 红"), "box": ("1,", "[0, 0, 1, 1]"),
              "point": ("1,", "[0, 0, 1, 1]"),
              "math": ("1+", "1")}  # fmt: skip
"""What stands before a run in an answer, and a reference, by answer type."""


def read_turn(text: str, tools: ToolSet) -> None:
    """Read a text as the turn of a policy, and as the names in a call."""
    extract_answer(text), well_formed_answer(text), quote(text), QWEN.parse(text)
    for call in (Call(text, {}), Call("visual_reflection", {text: text}), Call("visual_reflection", {"images": text})):
        tools.execute(call, ImageRegistry(), ToolSettings())


def read_all() -> None:
    tools = ToolSet(list(VISUAL_TOOLS.values()))
    for run in RUNS:
        text = run * (LENGTH // len(run)) + "x"
        for before in TURNS:
            read_turn(before + text, tools)
        for name, (before, answer) in REFERENCES.items():
            SCORERS[name](before + text, answer)
    SCORERS["exact"]("e" + "\u0301\u0323" * 2 * LENGTH, "red")  # out of canonical order
    body = ", ".join(f'"k{i}": 0' for i in (*range(LENGTH // 4), LENGTH // 4 - 1))
    assert "given twice" in QWEN.parse(f'<tool_call>{{"name": "f", "arguments": {{{body}}}}}</tool_call>').error


@pytest.mark.slow(15)
def test_long_runs_of_any_character_are_read_in_linear_time():
    command = [sys.executable, "-c", "import test_long_texts; test_long_texts.read_all()"]
    subprocess.run(command, cwd=Path(__file__).parent, check=True, timeout=LIMIT_S)


def test_the_runs_hold_every_literal_of_the_markup_and_every_scorer_is_read():
    assert {answers.ANSWER_OPEN, answers.ANSWER_CLOSE, QWEN.call_open, QWEN.call_close, *QWEN.stop_strings[:1]} <= set(RUNS)
    assert set(REFERENCES) == set(SCORERS)
