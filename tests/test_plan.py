"""Plans: what a chip holds against closed forms, what is exchanged and computed, what is refused, and with which
remedy."""

import io
import json
import os
import subprocess
import sys
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import tiny_config
from rich.console import Console

from imagent_jax.distributed.mesh import make_mesh
from imagent_jax.planner import plan
from imagent_jax.planner import programs as footprint
from imagent_jax.planner.programs import CHIPS, Chip, Cost, chip_bytes, cost, open_topology, programs

TPU = pytest.mark.skipif(find_spec("libtpu") is None, reason="libtpu is not installed: pip install 'imagent-jax[test]'")
PROGRAMS = ["gather", "vision", "show", "prefill", "decode", "observe", "train", "apply"]
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
        "--images.pages=2",
        *("--images.min_pixels=64", "--images.max_pixels=1536", "--tools.low_pixels=64", "--tools.high_pixels=1536"),
        *("--tools.confirm_min_pixels=64", "--tools.confirm_max_pixels=1536"),  # 96 patches of 4 x 4 pixels
    ]


def planned(tmp_path, *arguments: str) -> tuple[int, dict]:
    code = plan.main([*arguments, f"--json={tmp_path / 'plan.json'}"])
    return code, json.loads((tmp_path / "plan.json").read_text())


@TPU
@pytest.mark.slow(60)
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
@pytest.mark.slow(4)
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
    assert chip_bytes(held.opt_state) == 2 * 4 * text + sum(x.size * 4 for x in jax.tree.leaves(held.opt_state) if not x.ndim)
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


@pytest.mark.slow(30)
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


@pytest.mark.slow(60)
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


# ---- what a run holds and calls, from shapes alone ---------------------------------------------------------------------

STEP = ["--rollout.groups=8", "--grpo.micro_groups=2", "--grpo.minibatches=2", "--grpo.epochs=3", "--images.pages=5",
        "--rollout.response_tokens=64", "--rollout.temperature=0.7", "--rollout.decode_chunk=9"]  # fmt: skip


def held_by(toy, *arguments):
    return plan.hold(plan.parse(["--topology=x", *toy, *STEP, *arguments])[1], "cpu:1")[0]


def test_programs_are_called_as_often_as_a_step_calls_them(toy):
    rolling = {"gather": (1, "rollout"), "vision": (5, "rollout"), "decode": (64, "rollout"), "observe": (0, "rollout")}
    learning = {"train": (12, "update"), "apply": (6, "update")}
    found = {p.name: p for p in programs(held_by(toy))}
    shared = "prefill", "show"
    assert {name: (p.calls, p.phase) for name, p in found.items() if name not in shared} == rolling | learning
    admitted = found["prefill"].args[2].shape[0]
    assert found["prefill"].calls == found["show"].calls == 8 // admitted and found["decode"].args[-2:] == (9, 0)
    assert found["decode"].static[1:] == (64,)
    every = programs(held_by(toy, "--grpo.kl=0.1", "--grpo.recompute=true", "--model.freeze_vision=false"))
    found = {p.name: (p.calls, p.phase) for p in every if p.name not in shared}
    more = {"score": (4, "update"), "reference": (4, "update"), "vision backward": (5, "update")}
    assert found == rolling | learning | more


def test_the_training_programs_read_what_the_settings_need(toy):
    """Log-probabilities of the reference where there is a penalty, those of now where they are recomputed."""
    for kl in ("0", "0.1"):
        for recompute in ("false", "true"):
            held = held_by(toy, f"--grpo.kl={kl}", f"--grpo.recompute={recompute}")
            args = {p.name: p.args for p in programs(held)}
            assert [x is not None for x in args["train"][-2:]] == [kl != "0", recompute == "true"]
            assert ("score" in args, "reference" in args) == (recompute == "true", kl != "0")
            if "reference" in args:
                assert args["reference"][0] is held.reference
            if "score" in args:
                assert args["score"][0] is held.params


def test_what_is_alive_beside_a_program_is_all_of_its_phase(toy):
    for kl in ("0", "0.1"):
        held = held_by(toy, f"--grpo.kl={kl}", "--model.freeze_vision=false")
        always = chip_bytes(held.params) + chip_bytes(held.opt_state) + (kl != "0") * chip_bytes(held.trained)
        features, copied = chip_bytes(held.pages), chip_bytes(held.sampled) + chip_bytes(held.state)
        assert features == 5 * chip_bytes(held.page) > 0 and chip_bytes(held.shown) == 4 * 64 * sum(
            x.size for x in (held.batch.prompt_ids, held.batch.response_ids)
        )
        totals = chip_bytes(held.trained) + features + chip_bytes(held.shown)  # gradients of parameters and of pages
        alive = {p.name: chip_bytes(p.alive) for p in programs(held)}
        for name in ("vision", "show", "prefill", "decode", "observe"):
            assert alive[name] == always + features + copied, name
        for name in ("train", "vision backward", "apply"):
            assert alive[name] == always + features + totals + chip_bytes(held.batch), name
        assert alive["gather"] == always
        assert plan.least(held) == always + features + max(copied, totals)


def test_the_shapes_a_run_holds_are_those_of_its_settings(toy):
    held = held_by(toy, "--model.dtype=bfloat16", "--rollout.group_size=4", "--rollout.prompt_tokens=48", "--model.remat=dots")
    cfg = held.cfg
    rows = cfg.images.pack_blocks * cfg.images.vision_block // 4
    assert len(held.pages) == 5 and all((x.shape, x.dtype) == ((rows, 64), jnp.bfloat16) for x in held.pages)
    assert [x.shape for x in held.shown] == [(2, 48, 64), (2, 4, 64, 64)] and held.of_pages == []
    assert held.batch.prompt_ids.shape == (2, 48) and held.batch.logprobs.shape == (2, 4, 64)
    assert held.batch.prompt_positions.shape == (3, 2, 48) and held.batch.logprobs.dtype == jnp.float32
    assert {x.dtype.name for x in jax.tree.leaves(held.sampled)} == {"bfloat16"}
    assert {x.dtype.name for x in jax.tree.leaves(held.params)} == {"float32"} and held.reference is None
    assert (held.model.dtype, held.model.remat, held.model.vision_block) == ("bfloat16", "dots", cfg.images.vision_block)
    half = held_by(toy, "--model.param_dtype=bfloat16", "--optim.moment_dtype=bfloat16")
    assert {x.dtype.name for x in jax.tree.leaves(half.params)} == {"bfloat16"}
    assert half.learns == (not cfg.model.freeze_vision)


def test_a_family_with_wider_features_is_planned_with_its_tower_trained(tmp_path, toy):
    """Every program traces; a feature row holds the last block's feature and that of the DeepStack block."""
    text = TOY["text_config"] | {"head_dim": 24, "rope_parameters": {"mrope_section": [5, 4, 3], "rope_theta": 1e4}}
    tower = {"depth": 2, "hidden_size": 32, "out_hidden_size": 64, "intermediate_size": 48, "num_heads": 4, "patch_size": 4,
             "num_position_embeddings": 25, "deepstack_visual_indexes": [0]}  # fmt: skip
    hf = TOY | {"model_type": "qwen3_vl", "text_config": text, "vision_config": tower}
    (tmp_path / "config.json").write_text(json.dumps(hf))
    flags = "--grpo.kl=0.1", "--grpo.recompute=true", "--model.freeze_vision=false"
    held = held_by([*toy, f"--model.path={tmp_path}"], *flags)
    assert held.page.shape[1] == 128 and held.learns and len(held.of_pages) == 5
    traced = []
    for program in programs(held):
        with held.on_mesh():
            if isinstance(program.function, partial):  # it is a `trace`
                program.function(*program.static, *program.args)
            else:
                program.function.trace(*program.static, *program.args)
        traced.append(program.name)
    assert {"vision", "show", "prefill", "observe", "train", "vision backward"} <= set(traced)


def test_adapters_alone_have_moments_and_gradients(toy):
    held = held_by(toy, "--lora.rank=2", "--model.freeze_vision=true")
    d, q, kv, f = 64, 64, 32, 128
    pairs = {"q": (d, q), "k": (d, kv), "v": (d, kv), "o": (q, d), "gate": (d, f), "up": (d, f), "down": (f, d)}
    adapters = 4 * 2 * sum(sum(pairs[name.removesuffix("_proj")]) for name in held.cfg.lora.targets)
    assert chip_bytes(held.trained) == chip_bytes(held.total) == adapters
    assert chip_bytes(held.params) == adapters + chip_bytes(held_by(toy).params)


def test_a_cost_adds_up_and_its_bound_is_the_slowest_of_three(toy):
    held = held_by(toy)
    program = next(p for p in programs(held) if p.name == "prefill")
    memory = 1e12
    by_flops = cost(held, program, Chip("cpu", memory, 1e-3, 1e30, 1e30))
    by_bytes = cost(held, program, Chip("cpu", memory, 1e30, 1e-3, 1e30))
    assert by_flops.flops > 1e6 and by_flops.bound_s == pytest.approx(1e3 * by_flops.flops)
    assert by_bytes.bound_s >= 1e3 * by_bytes.arguments > 0 and by_bytes.wire == 0
    assert by_flops.total == by_flops.arguments + by_flops.temporaries + by_flops.resident and not by_flops.refused
    assert by_flops.resident == chip_bytes(program.alive) - chip_bytes(held.sampled["text"], held.state)
    assert (by_flops.name, by_flops.phase, by_flops.calls) == ("prefill", "rollout", program.calls)
    assert cost(held, program, Chip("cpu", memory, 0, 0, 0)).bound_s == 0


@pytest.mark.parametrize(
    ("message", "needed"),
    [
        ("RESOURCE_EXHAUSTED: the size of the temporaries (1.50G) is too much", 100 + 1.5 * 2**30),
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.25G of 15.75G hbm.", 20.25 * 2**30),
        ("RESOURCE_EXHAUSTED: total hbm requirement 512.0M", 2**29),
        ("RESOURCE_EXHAUSTED: Used 12 of 3", 12),
        ("RESOURCE_EXHAUSTED", 100),
    ],
)
def test_what_a_refused_program_needs_is_read_from_the_compilers_words(message, needed):
    assert footprint._needed(message, 100) == needed


def test_chips_have_their_published_figures():
    """GB, TFLOP/s in bfloat16, GB/s of memory, GB/s from peers."""
    found = {name: [round(x / 1e9) for x in chip[1:]] for name, chip in CHIPS.items()}
    assert found == {
        "v5e": [16, 197_000, 819, 200], "v5p": [95, 459_000, 2765, 600], "v6e": [32, 918_000, 1640, 448],
        "h100": [80, 989_000, 3350, 450], "h200": [141, 989_000, 4800, 450], "cpu": [0, 0, 0, 0],
    }  # fmt: skip
    for shapes in plan.SLICES.values():
        assert [int(np.prod([int(n) for n in shape.split("x")])) for shape in shapes] == [4, 8, 16, 32, 64, 128, 256]
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert open_topology("cpu:1")[0].memory == whole and open_topology("h100:1")[0] == CHIPS["h100"]


def test_a_model_is_known_by_folder_by_tiny_or_by_published_name(toy):
    path = toy[0].partition("=")[2]
    assert footprint.model_config(path).text.vocab_size == 512 and footprint.model_config("tiny").text.hidden_size == 128
    assert footprint.model_config("Qwen/Qwen2.5-VL-7B-Instruct").name == "Qwen2.5-VL-7B"


# ---- plans made by hand --------------------------------------------------------------------------------------------------


def made(*costs, memory=10e9, least=0, **more) -> plan.Plan:
    settings = {"model.path": "m", "rollout.response_tokens": 50}
    return plan.Plan("v5e:2x2", 4, {"data": 1, "fsdp": 2, "tensor": 2}, memory, settings, {"cache": 10**9}, least, list(costs),
                     **more)  # fmt: skip


def test_a_plan_fits_where_nothing_is_above_the_memory_or_refused():
    train, decode = Cost("train", "update", 3, total=9 * 10**9), Cost("decode", "rollout", 50, total=10 * 10**9)
    assert made(train, decode).fits and made(train, decode).peak is decode
    assert not made(train, decode, memory=10e9 - 1).fits
    assert not made(train, Cost("x", "update", 1, total=1, refused=True)).fits
    arrays = made(train, least=11 * 10**9)
    assert not arrays.fits and arrays.peak.name == "arrays" and arrays.to_dict()["peak_program"] == "arrays"
    found = made(train, decode).to_dict()
    assert (found["peak"], found["peak_program"], found["fits"], found["chips"]) == (10 * 10**9, "decode", True, 4)


def test_a_plan_is_shown_with_its_verdict_and_bounds():
    train = Cost("train", "update", 3, arguments=10**9, temporaries=2 * 10**9, resident=4 * 10**9, total=7 * 10**9, wire=5e8,
                 flops=6e12, bound_s=0.25, compile_s=8.0)  # fmt: skip
    decode = Cost("decode", "rollout", 50, total=3 * 10**9, bound_s=0.004)
    refused = Cost("score", "update", 2, total=12 * 10**9, bound_s=0.5, refused=True)

    def shown(found):
        console = Console(file=io.StringIO(), width=160)
        plan.show(found, console)
        return console.file.getvalue()

    text = shown(made(train, decode))
    assert "m on v5e:2x2: 4 chips of 10 GB, data 1, fsdp 2, tensor 2" in text and "cache 1.000" in text
    row = next(line for line in text.splitlines() if "train" in line and "│" in line).replace("│", " ").split()
    assert row == ["train", "3", "1.00", "2.00", "4.00", "7.00", "0.500", "6", ">=", "2.5e+02", "8", "s"]
    assert "Most in train: 7.00 of 10.00 GB. It fits." in text
    assert "no update of all groups takes less than 0.75 s" in text and "no token of all rows takes less than 4 ms" in text
    text = shown(made(train, decode, refused, stopped=True))
    assert "> 12.00" in text and "It does NOT fit, as far as it was compiled." in text and "less than 1.8 s" in text


def test_changes_that_take_less_memory_are_those_of_the_settings():
    cfg = tiny_config({
        "rollout": {"groups": 32, "group_size": 4, "response_tokens": 128}, "grpo": {"micro_groups": 16, "minibatches": 2},
        "model": {"remat": "none"},
    })  # fmt: skip
    found = plan.changes(cfg, {"data": 2, "fsdp": 2, "tensor": 2})
    assert found == [
        ("update", {"grpo.micro_groups": 4}), ("update", {"model.remat": "full"}), ("", {"mesh.data": 1, "mesh.fsdp": 4}),
        ("", {"mesh.tensor": 4, "mesh.data": 1, "mesh.fsdp": 2}), ("", {"mesh.tensor": 8, "mesh.data": 1, "mesh.fsdp": 1}),
        ("rollout", {"rollout.groups": 16}), ("rollout", {"rollout.groups": 8}),
        ("", {"lora.rank": 16, "model.freeze_vision": True, "model.param_dtype": "bfloat16"}),
        ("", {"rollout.response_tokens": 64}), ("", {"rollout.response_tokens": 32}), ("", {"rollout.group_size": 2}),
    ]  # fmt: skip
    small = cfg.changed({"grpo.micro_groups": 4, "model.remat": "full", "rollout.group_size": 2, "lora.rank": 4})
    assert [settings for _, settings in plan.changes(small, {"data": 1, "fsdp": 4, "tensor": 1})] == [
        {"mesh.tensor": 2, "mesh.data": 1, "mesh.fsdp": 2}, {"mesh.tensor": 4, "mesh.data": 1, "mesh.fsdp": 1},
        {"rollout.groups": 16}, {"rollout.groups": 8}, {"rollout.response_tokens": 64}, {"rollout.response_tokens": 32},
    ]  # fmt: skip
    assert plan.options({"lora.rank": 16, "model.freeze_vision": True}) == "--lora.rank=16 --model.freeze_vision=true"


def test_the_run_of_other_slices_has_the_same_work_a_chip(monkeypatch):
    cfg = tiny_config({
        "mesh": {"fsdp": 4, "tensor": 2}, "rollout": {"groups": 16}, "grpo": {"micro_groups": 8, "minibatches": 2},
    })  # fmt: skip
    for chips, expected in ((8, (4, 8, 16)), (32, (16, 32, 64)), (4, (2, 4, 8)), (2, (1, 2, 4))):
        found = plan.resized(cfg, chips, 8)
        assert (found.mesh.fsdp, found.grpo.micro_groups, found.rollout.groups) == expected
        assert (found.mesh.data, found.mesh.tensor) == (1, 2)
    asked = []

    def make_plan(cfg, topology, memory, *, only, say):
        asked.append((cfg.mesh.fsdp, topology, memory, only))
        return made()

    monkeypatch.setattr(plan, "make_plan", make_plan)
    cfg = cfg.changed({"mesh.tensor": 4, "mesh.fsdp": 1})
    assert len(plan.scale(cfg, "v5p", [4, 16], 5e9, print)) == 2
    assert asked == [(1, "v5p:2x2x1", 5e9, ("decode", "train")), (4, "v5p:2x2x4", 5e9, ("gather", "decode", "train"))]


@pytest.mark.parametrize(
    ("wrong", "fitting", "expected", "tried"),
    [
        ("update", {"grpo.micro_groups": 2}, {"grpo.micro_groups": 2}, 1),
        ("rollout", {"rollout.groups": 2}, {"rollout.groups": 2}, 3),
        ("update", {"grpo.micro_groups": 2, "model.remat": "full"}, {"grpo.micro_groups": 2, "model.remat": "full"}, 8),
        ("update", {"mesh.tensor": 4, "model.remat": "full"}, None, 8),
    ],
)
def test_the_nearest_change_helps_the_phase_that_is_too_large(toy, monkeypatch, wrong, fitting, expected, tried):
    cfg = plan.parse(["--topology=x", *toy, "--model.remat=none", "--rollout.group_size=4"])[1]
    tries, chip = [], open_topology("cpu:1")[0]

    def make_plan(cfg, topology, memory, *, first, give_up, say):
        tries.append(cfg)
        assert (topology, memory, first, give_up) == ("v5e:2x2", 10e9, ["train", "decode"][wrong == "rollout" :][:1], True)
        good = all(cfg.get(name) == value for name, value in fitting.items())
        return made(Cost("train", "update", 1, total=1 if good else 11 * 10**9))

    monkeypatch.setattr(plan, "make_plan", make_plan)
    monkeypatch.setattr(plan, "hold", lambda cfg, topology, memory: (cfg, chip))
    monkeypatch.setattr(plan, "least", lambda cfg: 10e9)
    big = Cost("train" if wrong == "update" else "decode", wrong, 1, total=11 * 10**9)
    found, _, count = plan.nearest(cfg, made(big, Cost("apply", "update", 1, total=10 * 10**9)), lambda line: None)
    assert (found, count) == (expected, tried) and len(tries) == tried
    monkeypatch.setattr(plan, "least", lambda cfg: 10e9 + 1)  # arrays alone are too much: nothing is compiled
    monkeypatch.setattr(plan, "changes", lambda cfg, mesh: [("", {"rollout.groups": 4}), ("", {"lora.rank": 1})])
    assert plan.nearest(cfg, made(big), lambda line: None) == (None, None, 0)


def test_the_smallest_slice_that_fits_is_taken_else_the_last(monkeypatch):
    cfg, chip = tiny_config({"rollout": {"groups": 10}}), CHIPS["v5e"]
    arrays = {4: 20 * 10**9, 8: 16 * 10**9, 16: 16 * 10**9}
    sizes = {4: 0, 8: 17 * 10**9, 16: 16 * 10**9}

    def devices(topology):
        return int(np.prod([int(n) for n in topology.partition(":")[2].split("x")]))

    monkeypatch.setattr(plan, "SLICES", {"v5e": ("2x2", "2x4", "4x4")})
    monkeypatch.setattr(plan, "open_topology", lambda topology: (chip, range(devices(topology))))
    monkeypatch.setattr(plan, "hold", lambda cfg, topology, memory: (topology, chip))
    monkeypatch.setattr(plan, "least", lambda topology: arrays[devices(topology)])
    asked = []

    def make_plan(cfg, topology, memory, *, only, first, give_up, say):
        asked.append((cfg.rollout.groups, topology, memory, only, first, give_up))
        return made(Cost("train", "update", 1, total=sizes[devices(topology)]), memory=16e9)

    monkeypatch.setattr(plan, "make_plan", make_plan)
    taken, found, ruled_out = plan.smallest_slice(cfg, "v5e", None, ["train"], print)
    assert found.fits and taken.rollout.groups == 16 and (taken.mesh.fsdp, taken.mesh.data) == (-1, 1)
    assert ruled_out == {"v5e:2x2": 20 * 10**9, "v5e:2x4": 17 * 10**9}
    assert asked == [(16, "v5e:2x4", None, ["train"], ["train"], True), (16, "v5e:4x4", None, ["train"], ["train"], False)]
    arrays[16] = sizes[16] = 18 * 10**9
    _, found, ruled_out = plan.smallest_slice(cfg, "v5e", None, (), print)
    assert not found.fits and list(ruled_out) == ["v5e:2x2", "v5e:2x4"]


def test_every_chip_has_slices_of_its_published_kind():
    assert all(CHIPS[kind].platform == "tpu" for kind in plan.SLICES)
    assert open_topology("cpu:1")[0].memory > 1e8
