"""A run shaped like real use, killed and resumed: the short form of benchmarks/real_use.py."""

import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import tiny_config
from scripted_run import scripted_collector, without_weights

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))
import real_use

from imagent_jax.chat import QWEN
from imagent_jax.rollout.episode import token_kinds
from imagent_jax.tiny.world import task_at
from imagent_jax.types import TokenKind

SMALL = [
    "--rollout.groups=2", "--rollout.group_size=3", "--rollout.refill=1", "--rollout.response_tokens=160", "--images.pages=1",
    "--grpo.length_buckets=1", "--eval.tasks=0", "--eval.every=0", "--data.curriculum=none", "--run.compile_cache=",
]  # fmt: skip


@pytest.mark.slow(80)
def test_a_mixture_with_a_failing_judge_recompiles_nothing_loses_nothing_and_survives(tmp_path):
    """Qwen3-VL's full vocabulary, a trained tower, photographs of megapixels; killed once, resumed, equal to the bit."""
    found = real_use.measure(tmp_path, "Qwen3-VL", 3, 1, 0, *SMALL)
    assert found["differences"] == []
    first, *later = found["compiled_in_steps"]
    assert first > 20 and not any(later) and found["compiled_after_it"] == 2  # checksums of the first checkpoint
    assert found["kills"][0]["code"] == -9
    assert found["rows_used"].keys() == {"charts", "maps", "quiz", "words"} and min(found["rows_used"].values()) > 0
    assert found["groups_refilled"] > 0 and found["pages_left_device"] > 0 and found["trajectories"] == 3 * 2 * 3
    assert {"ANSWERED", "FAULT"} <= found["ends"].keys() and found["calls"].keys() == {"EXECUTED", "INVALID"}
    for replies in found["judge"].values():
        assert min(replies[what] for what in ("scored", "unavailable", "no score", "again")) > 0

    whole, struck = tmp_path / "whole", tmp_path / "struck"
    logged = struck / "trajectories" / "train-000002.jsonl"
    text = logged.read_text()
    logged.write_text(text.replace('"rollout": 1', '"rollout": 2', 1))
    assert real_use.differences(whole, struck) == ["trajectories/train-000002.jsonl"]
    logged.write_text(text.partition("\n")[2])
    with pytest.raises(ValueError, match=r"trajectories by step: \[6, 5, 6\], not \[6, 6, 6\]"):
        real_use.counted(struck, 3)
    for image in (whole / "trajectories" / "images").iterdir():
        image.unlink()
    with pytest.raises(ValueError, match=r"images that trajectories name: 0, not \d"):
        real_use.counted(whole, 3)


@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        ("<answer>7</answer><|im_end|>", "AAAAAAATTT"),
        (QWEN.render_call("visual_reflection", {"images": [1]}), "CCCCCCCCCC"),
        ("I cannot tell.<|im_end|>", "TTTTTTTTTT"),
    ],
)
def test_a_turn_reads_as_scripted_and_its_tokens_have_the_kinds_of_that(text, kinds):
    reading = real_use.Reading(without_weights()[1], text, 10)
    found = token_kinds(np.arange(10), text, reading, QWEN)
    names = {"A": TokenKind.ANSWER, "C": TokenKind.TOOL_CALL, "T": TokenKind.TEXT}
    assert reading.decode(np.arange(10)) == text and found.tolist() == [names[kind] for kind in kinds]


def test_scripted_calls_are_read_and_most_of_them_run():
    """Whatever is drawn: well-formed calls, some of them of an image that is not there, and some that are no JSON."""
    collector, statuses = scripted_collector(tiny_config({"rollout": {"prompt_tokens": 512}})), []
    for i in range(20):
        task = task_at(0, "train", i)
        environment = collector.open_task(task).environment
        for rollout in range(4):
            for turn in range(real_use.CALLS + 1):
                text = real_use.said(task, rollout, turn)
                assert QWEN.makes_call(text) or text.endswith("<|im_end|>")
                if QWEN.makes_call(text):
                    statuses.append(environment.fork().step(QWEN.parse(text)).status.name)
    assert {*statuses} == {"EXECUTED", "INVALID"} and 0.5 < np.mean([s == "EXECUTED" for s in statuses]) < 0.9
