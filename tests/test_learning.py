"""A short run that must improve: outcomes alone teach the base which call a question asks for."""

import json

import numpy as np
import pytest

from imagent_jax.tiny.corpus import solves
from imagent_jax.train import main


def looked_at_what_was_asked(trajectory) -> float:
    """1 where the first call shows a tag that the question depends on. The base calls on anything."""
    call = trajectory.turns[0].call
    if call is None or call.name != "visual_confirmation" or "label" not in call.arguments:
        return 0.0
    return float(solves(trajectory.task.question, int(call.arguments["image"]), str(call.arguments["label"])))


@pytest.mark.slow(60)
def test_a_short_run_learns_which_call_a_question_needs(tmp_path):
    steps = 24
    status = main([
        f"--run.dir={tmp_path}", "--run.name=short", f"--run.steps={steps}", "--run.compile_cache=", "--run.checkpoint_every=0",
        "--data.train_size=256", "--data.test_size=8", "--eval.tasks=8", "--eval.every=0", "--eval.groups=8",
        "--rollout.groups=8", "--rollout.response_tokens=64", "--mask.drop_truncated=false", "--grpo.micro_groups=4",
        "--grpo.length_buckets=2",
        "--optim.learning_rate=6e-4", "--optim.schedule=constant", "--reward.answer=0", "--reward.format=0",
        "--reward.tool_gain=0", f"--reward.custom=['{__name__}:looked_at_what_was_asked']",
    ])  # fmt: skip
    assert status == 0
    records = map(json.loads, (tmp_path / "short" / "metrics.jsonl").read_text().splitlines())
    rewards = [record["reward/total"] for record in records if "reward/total" in record]
    assert len(rewards) == steps
    assert np.mean(rewards[:4]) < 0.5
    assert np.mean(rewards[-4:]) > np.mean(rewards[:4]) + 0.25
