"""Visual-ARFT's published rewards in closed form, and the rows of one step that execute nothing."""

from types import SimpleNamespace

import numpy as np
import pytest
from conftest import small_config
from scripted_run import play

from imagent_jax.chat import QWEN
from imagent_jax.config import load_config
from imagent_jax.rl.published import (
    problem_set,
    published_answer,
    published_code,
    published_format,
    published_query,
    similarity,
    steps_of,
)
from imagent_jax.rl.rewards import REWARDS, reward_functions, score_trajectories
from imagent_jax.tiny.published_steps import code_at, search_at
from imagent_jax.types import EndReason, Task

CALL = QWEN.render_call("python", {"code": "show(images[1])"})
SEARCH = QWEN.render_call("search", {"query": "ship Bakelo"})
CODE = "<think>So.</think>\n<code>\n```python\npass\n```\n</code>"


def turn(text: str, step: str | None, answer: str = "x", **more):
    """A trajectory of one turn, for a row of a step."""
    task = Task("t", "q", (), answer, meta={"step": step} if step else {}, **more)
    return SimpleNamespace(task=task, turns=[SimpleNamespace(text=text)])


@pytest.mark.parametrize(
    ("text", "value"),
    [(CODE, 0.9), (CALL, 0.9), ("", 0.9), ("anything", 0.9), ("<answer>3</answer>", 0.0), ("<problem>{'dark'}</problem>", 0.0)],
)
def test_code_is_paid_a_constant_whatever_it_says(text, value):
    assert published_code(turn(text, "code")) == value
    assert published_code(turn(text, "answer")) is None and published_code(turn(text, None)) is None


@pytest.mark.parametrize(
    ("said", "gold", "value"),
    [
        ("<problem> {'dark'} </problem>", "dark", 1.0),
        ("<problem>{'dark', 'rotation90'}</problem>", "rotation90 dark", 1.0),
        ("rotation90 dark<|im_end|>", "rotation90 dark", 1.0),
        ("<problem>{'rotation90'}</problem>", "rotation90 dark", 0.5),
        ("<problem>{'rotation180'}</problem>", "{'rotation180', 'blur'}", 0.5),
        ("<problem>{'dark'}</problem>", "rotation90 dark", 0.0),
        ("<problem>{'rotation180'}</problem>", "rotation90 dark", 0.0),
        ("<problem>{'rotation90'}</problem>", "dark", 0.0),
        ("<problem>{'rotation90', 'dark', 'blur'}</problem>", "rotation90 dark", 0.0),
        ("none", "none", 1.0),
        ("<answer>dark</answer>", "dark", 0.0),
        ("", "dark", 0.0),
    ],
)
def test_a_problem_set_is_right_as_a_set_and_half_right_by_its_turn(said, gold, value):
    assert problem_set(turn(said, "problem", gold)) == value
    assert problem_set(turn(said, "code", gold)) is None


@pytest.mark.parametrize(
    ("said", "value"),
    [
        ("<answer>the red ship</answer>", 1.0),
        ("<answer>red boat</answer>", 0.5),
        ("red ship", 1.0),
        ("<answer>blue</answer>", 0.0),
        (f"<answer>red ship</answer>{CALL}", 0.0),
        ("<problem>{}</problem><answer>red ship</answer>", 0.0),
    ],
)
def test_an_answer_is_paid_its_set_f1_and_nothing_beside_a_step(said, value):
    assert published_answer(turn(said, "answer", "red ship")) == pytest.approx(value)
    assert published_answer(turn(said, "problem", "red ship")) is None


def test_a_query_is_paid_its_similarity_from_a_half_on():
    gold = "ship Bakelo"
    assert published_query(turn(SEARCH, "query", gold)) == pytest.approx(1.0)
    assert published_query(turn("<search>ship Bakelo</search>", "query", gold)) == pytest.approx(1.0)
    near = published_query(turn("<search>ship Bakela</search>", "query", gold))
    assert 0.5 <= near < 1.0
    assert published_query(turn("<search>ship Tovira</search>", "query", gold)) == 0.0  # a similarity of 0.42
    assert published_query(turn(f"<answer>x</answer>{SEARCH}", "query", gold)) == 0.0
    assert published_query(turn("nothing", "query", gold)) == 0.0 and published_query(turn(SEARCH, "code", gold)) is None


def test_similarity_is_a_cosine_of_words_and_threes_of_characters():
    """Of "ab" and "ab cd": ab, " ab" and "ab " in common, of 3 and of 6."""
    assert similarity("ab", "AB cd") == pytest.approx(3 / (3 * 6) ** 0.5)
    assert similarity("one two", "two one") == pytest.approx(1.0) and similarity("", "x") == 0.0 and similarity("a", "b") == 0.0


@pytest.mark.parametrize(
    ("text", "step", "value"),
    [
        (CODE, "code", 1.0),
        (CALL + "<|im_end|>", "code", 1.0),
        ("So. " + CALL, "code", 0.0),
        (CODE, "answer", 0.0),
        ("<think>x</think> <answer>3</answer>", "answer", 1.0),
        ("<answer>3</answer><answer>4</answer>", "answer", 0.0),
        ("rotation90 dark<|im_end|>", "problem", 1.0),
        ("<think>x</think><problem>{'dark'}</problem>", "problem", 1.0),
        ("<problem>{'dark'}</problem> more", "problem", 0.0),
        (SEARCH, "query", 1.0),
    ],
)
def test_the_format_is_one_step_of_the_rows_sort(text, step, value):
    assert published_format(turn(text, step)) == value
    assert published_format(turn(text, None)) is None


def test_steps_are_tags_or_calls_and_malformed_calls_are_none():
    assert steps_of(CALL) == [("code", "show(images[1])")] and steps_of(SEARCH + "<|im_end|>") == [("query", "ship Bakelo")]
    assert steps_of("<tool_call>{</tool_call>") == [] and steps_of(QWEN.render_call("visual_reflection", {"images": [1]})) == []
    assert steps_of("words") == [("problem", "words")]


def test_rows_of_one_step_are_those_of_the_paper_and_the_test_split_is_the_world():
    rows = [code_at(0, "train", i) for i in range(30)]
    assert {row.meta["step"] for row in rows} == {"problem", "code", "answer"} and len({row.uid for row in rows}) == 30
    assert rows == [code_at(0, "train", i) for i in range(30)]
    for row in rows:
        if row.meta["step"] == "code":
            assert row.answer.startswith(("show(", "from PIL", "import cv2")) and row.meta["problems"][0] in row.question
        elif row.meta["step"] == "problem":
            assert row.answer.split() == row.meta["problems"]
    assert code_at(3, "test", 4).uid == "tiny_code/test/3/4" and search_at(3, "test", 4).uid == "tiny_search/test/3/4"
    rows = [search_at(0, "train", i) for i in range(20)]
    assert {row.meta["step"] for row in rows} == {"query", "answer"}
    assert all(row.answer in row.question for row in rows if row.meta["step"] == "answer")


def test_a_row_of_one_step_executes_nothing_and_ends_with_its_call():
    row = next(row for row in (code_at(0, "train", i) for i in range(10)) if row.meta["step"] == "code")
    from scripted_run import without_weights

    from imagent_jax.rollout.collect import Collector
    from imagent_jax.tools import VISUAL_TOOLS, ToolSet

    cfg = small_config(rollout={"prompt_tokens": 512, "response_tokens": 256, "observation_tokens": 64})
    collector = Collector(*without_weights(), ToolSet([*VISUAL_TOOLS.values()]), cfg)
    bad = QWEN.render_call("python", {"code": "raise SystemExit(1)"})
    trajectory = play(collector, row, 0, [bad])
    assert trajectory.end == EndReason.VOID and trajectory.turns[0].call.parts == [] and len(trajectory.turns) == 1
    (scored,) = score_trajectories([trajectory], reward_functions(load_config("configs/visual_arft/published.yaml").reward))
    assert scored["published_code"] == 0.9 and scored["published_format"] == 1.0 and scored["total"] == pytest.approx(1.9)
    assert np.isfinite(scored["total"]) and {"problem_set", "published_answer"} <= set(REWARDS) - set(scored)
