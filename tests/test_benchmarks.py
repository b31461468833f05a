"""What the benchmarks compare computes the same thing: the GRPO update, here and in torch."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))
import common
from train_step import Ours, Shape, Theirs, differences, make_problem, ungroup

TOY = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": 512, "mrope_section": [2, 3, 3], "depth": 1, "embed_dim": 32, "heads": 2,
}  # fmt: skip
SHAPE = Shape(n=2, g=2, p=64, r=32)


@pytest.fixture(scope="module")
def torch_step(tmp_path_factory):
    """A random checkpoint, a batch, and loss and gradient norm of torch's step on it."""
    folder = tmp_path_factory.mktemp("toy")
    common.SIZES["toy"] = TOY
    common.random_checkpoint(folder, "toy")
    problem = make_problem(SHAPE, TOY["vocab_size"])
    return folder, problem, Theirs(folder, problem, SHAPE).step()


@pytest.mark.parametrize("arrange", [lambda problem: problem, ungroup], ids=["shared", "naive"])
@pytest.mark.slow(4)
def test_a_grpo_update_has_the_loss_and_the_gradient_of_torchs(torch_step, arrange):
    folder, problem, expected = torch_step
    found = Ours(folder, arrange(problem), SHAPE).step()
    assert abs(expected["loss"]) > 1e-2 and expected["grad_norm"] > 0.1
    difference = differences(found, expected)
    assert difference["loss"] < 1e-5 and difference["grad_norm"] < 1e-4, difference
