"""Plans: what a chip holds against closed forms, what is exchanged and computed, what is refused, and with which
remedy."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imagent_jax import plan
from imagent_jax.config import Config
from imagent_jax.footprint import CHIPS, chip_bytes, open_topology
from imagent_jax.hlo import Collective, collectives, kernel_pairs, matrix_flops
from imagent_jax.model.sharding import make_mesh
from imagent_jax.model.splash import _GroupMask

TPU = pytest.mark.skipif(find_spec("libtpu") is None, reason="libtpu is not installed: pip install 'imagent-jax[test]'")
PROGRAMS = ["gather", "vision", "prefill", "decode", "observe", "train", "apply"]
TOY = {  # one layer of each kind: compiled in seconds
    "model_type": "qwen2_vl", "image_token_id": 1, "vision_start_token_id": 2, "vision_end_token_id": 3,
    "text_config": {
        "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads":
        4, "num_key_value_heads": 2, "rope_parameters": {"mrope_section": [2, 3, 3], "rope_theta": 1e4},
    },
    "vision_config": {"depth": 1, "embed_dim": 32, "hidden_size": 64, "num_heads": 4, "mlp_ratio": 2, "patch_size": 4},
}  # fmt: skip


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> list[str]:
    """Arguments for a toy model; its folder holds a config and no weights."""
    folder = tmp_path_factory.mktemp("toy")
    (folder / "config.json").write_text(json.dumps(TOY))
    return [
        f"--model.path={folder}",
        "--rollout.groups=8",
        "--grpo.micro_groups=8",
        "--grpo.minibatches=1",
        "--images.packs=2",
    ]


def planned(tmp_path, *arguments: str) -> tuple[int, dict]:
    code = plan.main([*arguments, f"--json={tmp_path / 'plan.json'}"])
    return code, json.loads((tmp_path / "plan.json").read_text())


@TPU
def test_the_tiny_run_fits_four_chips_that_are_only_described(tmp_path):
    code, found = planned(tmp_path, "--topology=v5e:2x2", "--mesh.fsdp=2", "--mesh.tensor=2", "--grpo.micro_groups=2")
    assert code == 0 and found["fits"] and found["chips"] == 4 and found["memory"] == CHIPS["v5e"].memory
    costs = {c["name"]: c for c in found["costs"]}
    assert list(costs) == PROGRAMS
    assert all(c["arguments"] > 0 and c["bound_s"] > 0 and c["total"] < 1e9 for c in costs.values())
    for name in ("train", "decode"):
        kinds = {c["kind"]: c["size"] for c in costs[name]["collectives"]}
        assert kinds["all-reduce"] == 2, "sums over two devices of tensor, or of fsdp"
    # the head alone: three passes of two operations, for every token of a response
    tokens, (v, d) = 2 * 8 * 192, (1088, 128)
    assert costs["train"]["flops"] > 6 * tokens * v * d / 4


@TPU
def test_observed_rows_do_not_leave_their_chip(tmp_path):
    flags = "--topology=v5e:2x2", "--mesh.fsdp=4", "--grpo.micro_groups=4", "--only=observe"
    assert planned(tmp_path, *flags)[1]["costs"][0]["wire"] == 0


def test_parameters_of_a_chip_have_a_closed_form(toy):
    """Width over fsdp, the rest over tensor; norms are whole."""
    held, _ = plan.hold(plan.parse(["--topology=x", *toy])[1], "cpu:1")
    v, d, f, q, kv, e, m, patch = 512, 64, 128, 64, 32, 32, 64, 3 * 2 * 4 * 4
    text = v * d + d + (2 * d + 2 * d * q + 2 * d * kv + q + 2 * kv + 3 * d * f) + d * v
    tower = patch * e + (4 * e + 3 * e * e + 3 * e + e * e + e + 2 * e * m + m + e)
    tower += 2 * e + (4 * e) ** 2 + 4 * e + 4 * e * d + d
    assert chip_bytes(held.params) == 4 * (text + tower)
    assert chip_bytes(held.opt_state) == 2 * 4 * text + sum(
        x.size * 4 for x in jax.tree.leaves(held.opt_state) if not x.ndim
    )
    kinds, tokens = 2, 8 * 112 + 64 * 192  # keys and values; of prompts, of responses
    caches = [x for x in jax.tree.leaves(held.state) if x.ndim == 4]
    assert sum(x.size for x in caches) == kinds * kv * tokens


@TPU
def test_parameters_are_divided_as_the_table_of_axes_says(toy):
    arguments = ["--topology=x", *toy, "--mesh.fsdp=2", "--mesh.tensor=2"]
    held, chip = plan.hold(plan.parse(arguments)[1], "v5e:2x2")
    v, d, f, q, kv = 512, 64, 128, 64, 32
    quarter = 2 * v * d + 2 * d * q + 2 * d * kv + 3 * d * f  # matrices: width over fsdp, the other axis over tensor
    text = quarter / 4 + (q + 2 * kv) / 2 + 3 * d  # biases over tensor; norms whole
    assert chip_bytes(held.params["text"]) == 4 * text
    whole = quarter / 2 + (q + 2 * kv) / 2 + 3 * d
    assert chip_bytes(held.sampled["text"]) == 2 * whole, "rollouts: whole over fsdp, bfloat16"


def test_what_does_not_fit_fits_with_the_nearest_change(tmp_path, toy, capsys):
    code, roomy = planned(tmp_path, "--topology=cpu:1", *toy)
    assert code == 0 and [c["name"] for c in roomy["costs"]] == PROGRAMS
    peak = {c["name"]: c["total"] for c in roomy["costs"]}
    limit = peak["train"] / 4  # of the eight groups in a micro-batch two would fit, not four
    assert limit > max(size for name, size in peak.items() if name != "train")
    code, found = planned(tmp_path, "--topology=cpu:1", f"--memory={limit / 1e9}", *toy)
    assert code == 1 and not found["fits"] and found["peak_program"] == "train"
    assert found["nearest"]["changes"] == {"grpo.micro_groups": 1} and found["nearest"]["fits"]
    assert found["nearest"]["peak"] <= limit < found["peak"]
    assert "with --grpo.micro_groups=1" in capsys.readouterr().out
    code, found = planned(tmp_path, "--topology=cpu:1", "--memory=1e-6", *toy)
    assert code == 1 and found["nearest"] is None and "take more or larger chips" in capsys.readouterr().out


def test_the_tiny_run_on_eight_simulated_devices(tmp_path):
    mesh = "--mesh.fsdp=4", "--mesh.tensor=2"
    arguments = ["--topology=cpu:8", *mesh, "--grpo.micro_groups=4", "--grpo.minibatches=1"]
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "imagent_jax.plan", *arguments, f"--json={tmp_path / 'plan.json'}"]
    ended = subprocess.run(command, capture_output=True, text=True, env=env)
    assert ended.returncode == 0, ended.stderr[-2000:]
    found = json.loads((tmp_path / "plan.json").read_text())
    assert found["chips"] == 8 and found["mesh"] == {"data": 1, "fsdp": 4, "tensor": 2} and "It fits" in ended.stdout
    train = next(c for c in found["costs"] if c["name"] == "train")
    assert {c["size"] for c in train["collectives"]} <= {2, 4, 8} and train["wire"] > 0


@TPU
def test_a_mesh_may_split_the_axes_of_a_slice():
    mesh = make_mesh(fsdp=8, tensor=8, devices=open_topology("v5p:4x4x4")[1])
    assert dict(mesh.shape) == {"data": 1, "fsdp": 8, "tensor": 8}


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--topology=v9:2x2"], "There is no topology 'v9:2x2'; name one of v5e, v5p, v6e, h100, h200, cpu with"),
        (["--topology=cpu"], "There is no topology 'cpu'; name one of"),
        (["--topology=cpu:many"], "There is no topology 'cpu:many'; name a number of devices"),
        (["--topology=cpu:1", "--mesh.fsdp=3"], "does not divide the 1 there are; choose sizes"),
        (["--topology=cpu:1", "--model.path=Qwen/Qwen9"], "'Qwen/Qwen9' is neither a folder nor a published size;"),
        (["--topology=cpu:1", "--rollout.grups=3"], "There is no setting 'rollout.grups'; did you mean"),
        (["--topology=v5e", "--scale=7"], "There is no slice of 7 v5e chips; choose from 4, 8, 16"),
        pytest.param(["--topology=v5e:3x5"], "There is no topology 'v5e:3x5': ", marks=TPU),
        pytest.param(["--topology=v5e:2x2", "--mesh.tensor=3"], "does not divide the 4 there are", marks=TPU),
    ],
)  # fmt: skip
def test_bad_input_is_refused_in_one_sentence(arguments, sentence, capsys):
    assert plan.main(arguments) == 2
    said = capsys.readouterr().err
    assert sentence in said and said.count("\n") == 1


# ---- counting --------------------------------------------------------------------------------------------------------

TEXT = """HloModule step

%cond (p: (s32[], f32[8])) -> pred[] {
  %constant.3 = s32[]{:T(128)} constant(28)
  ROOT %lt = pred[] compare(%i, %constant.3), direction=LT
}

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %g = bf16[4,128]{1,0} all-gather(%x), channel_id=1, replica_groups=[2,4]<=[8], dimensions={0}
  %r = (f32[16]{0}, f32[16]{0}) all-reduce(%a, %b), channel_id=2, replica_groups={{0,1},{2,3}}, to_apply=%add
}

%start (p: f32[4]) -> f32[8] {
  %s = f32[8]{0} reduce-scatter(%x), channel_id=3, replica_groups=mesh['a'=2,'b'=4] {'b'}, dimensions={0}
}

%done (p: f32[4]) -> f32[8] {
  %s2 = f32[8]{0} reduce-scatter(%x), channel_id=3, replica_groups=mesh['a'=2,'b'=4] {'b'}, dimensions={0}
}

ENTRY %main (p: f32[8]) -> f32[8] {
  %w = (s32[], f32[8]) while(%t), condition=%cond, body=%body
  %f = f32[8] fusion(%x), kind=kCustom, calls=%start
  %f2 = f32[8] fusion(%x), kind=kCustom, calls=%done
  %c = (u32[64]{0}, u32[64]{0}) collective-permute-start(%x), channel_id=4, source_target_pairs={{0,1},{1,0}}
  %alone = f32[8] all-reduce(%x), channel_id=5, replica_groups={{0},{1}}, to_apply=%add
}
"""


def test_exchanges_are_counted_as_often_as_their_loop_runs_and_once_a_channel():
    assert collectives(TEXT) == [
        Collective("all-gather", 4, 28, 28 * 4 * 128 * 2),
        Collective("all-reduce", 2, 28, 28 * 2 * 16 * 4),
        Collective("collective-permute", 2, 1, 64 * 4),
        Collective("reduce-scatter", 4, 1, 4 * 8 * 4),
    ]
    assert [Collective(kind, 4, 1, 100).wire for kind in ("all-gather", "all-reduce", "collective-permute")] == [
        75,
        150,
        100,
    ]


def test_products_are_counted_in_loops_and_branches_and_once_in_loops_of_unknown_length():
    def program(x, w, n):
        x, _ = jax.lax.scan(lambda x, w: (x @ w, None), x, w)
        x = jax.lax.cond(n > 3, lambda x: x @ w[0] @ w[1], lambda x: x @ w[0], x)
        return jax.lax.while_loop(lambda c: c[0] < n, lambda c: (c[0] + 1, c[1] @ w[2]), (0, x))[1]

    jaxpr = jax.jit(program).trace(jnp.zeros((2, 8)), jnp.zeros((5, 8, 8)), 4).jaxpr.jaxpr
    assert matrix_flops(jaxpr, kernel_pairs(1, False)) == (5 + 2 + 1) * 2 * 2 * 8 * 8


def test_pairs_of_query_and_key_in_a_kernel():
    s, p, g = 6, 4, 3
    assert kernel_pairs(g, False)(g * s, p + g * s) == _GroupMask(p, g, s)[slice(0, g * s), slice(0, p + g * s)].sum()
    assert kernel_pairs(g, False)(s, s) == np.tril(np.ones((s, s))).sum() and kernel_pairs(g, True)(s, s) == s * s


@pytest.mark.parametrize(("p", "g", "s"), [(0, 1, 8), (8, 3, 8), (16, 2, 24), (5, 3, 7), (8, 4, 4)])
def test_blocks_of_the_group_mask_are_those_of_the_whole_mask(p, g, s):
    q, k = np.arange(g * s)[:, None], np.arange(p + g * s)[None, :] - p
    whole, mask = (k < 0) | ((q // s == k // s) & (q >= k)), _GroupMask(p, g, s)
    for block in (1, 3, 4, 8):
        for i in range(0, g * s, block):
            for j in range(0, p + g * s, block):
                index = slice(i, i + block), slice(j, j + block)
                assert (mask[index] == whole[index]).all(), index


def test_every_chip_has_slices_of_its_published_kind():
    assert all(CHIPS[kind].platform == "tpu" for kind in plan.SLICES)
    assert open_topology("cpu:1")[0].memory > 1e8 and Config().model.path == "tiny"
