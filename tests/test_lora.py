"""LoRA: what adapters change and what they leave alone, PEFT's files in both directions, training, export, settings."""

import contextlib
import copy
import functools
import json
import re
from dataclasses import replace

import hf_oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conftest import small_config
from flax import nnx
from hf_oracle import tiny_model
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.numpy import load_file, save_file
from test_model_parity import BLOCK, all_logits, pack, prepare, samples_of
from test_model_parity import batch as padded

from imagent_jax import train as job
from imagent_jax.config import Config
from imagent_jax.config import LoraConfig as Adapters
from imagent_jax.model import checkpoint, lora
from imagent_jax.model.features import FeatureStore
from imagent_jax.model.sharding import shardings
from imagent_jax.model.vlm import at_tokens, encode_images
from imagent_jax.rl.batch import GroupBatch, pack_batch
from imagent_jax.rl.learner import Learner, LossSettings, batch_loss, group_normalisers, score, shown_in
from imagent_jax.rl.mask import mask_tables
from imagent_jax.rl.optim import make_optimizer
from imagent_jax.rollout.collect import Collector
from imagent_jax.tiny.base import base_folder
from imagent_jax.types import EndReason, TokenKind

SAMPLES = samples_of("images between texts") + samples_of("no image")
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
MERGER_TOO = {"rank": 4, "alpha": 8.0, "targets": TARGETS, "merger": True}
ATTENTION = {"rank": 2, "alpha": 3.0, "targets": ("q_proj", "v_proj")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return hf_oracle.save_checkpoint(tiny_model(), tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def base(folder):
    return checkpoint.load(folder, vision_block=BLOCK)


def logits(model, params) -> np.ndarray:
    """Logits [T V] of every real token of SAMPLES."""
    packed, first = pack([image for _, images in SAMPLES for image in images])
    b = padded(SAMPLES + [([1], [])] * (4 - len(SAMPLES)), first)
    out = np.asarray(all_logits(model, params, packed, b.ids, b.positions, b.vision))
    return np.concatenate([out[i, : len(ids)] for i, (ids, _) in enumerate(SAMPLES)])


def reference_logits(model) -> np.ndarray:
    out, mask = hf_oracle.logits(model, SAMPLES)
    return out[mask]


def shaken(params, size: float = 0.1):
    """The parameters with random adapters, B included."""
    adapters, frozen = nnx.split_state(params, nnx.LoRAParam, ...)
    leaves, tree = jax.tree.flatten(adapters)
    keys = jax.random.split(jax.random.key(5), len(leaves))
    leaves = [size * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    return nnx.merge_state(jax.tree.unflatten(tree, leaves), frozen)


def flat(params) -> dict[str, np.ndarray]:
    return {".".join(map(str, path)): np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(params)}


# ---- what adapters change -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [MERGER_TOO, ATTENTION], ids=["all", "attention"])
def test_fresh_adapters_change_no_logit(base, settings):
    model, params = lora.attach(*base, Adapters(**settings))
    np.testing.assert_array_equal(logits(model, params), logits(*base))
    added = flat(params).keys() - flat(base[1]).keys()
    assert len(added) == 2 * (len(settings["targets"]) + 2 * settings.get("merger", False))
    a = flat(params)["text.layers.q_lora_a"]
    into = a.shape[1]
    assert a.shape == (3, 64, settings["rank"]) and 0.8 < np.abs(a).max() * into**0.5 <= 1
    assert abs(a.std() * (3 * into) ** 0.5 - 1) < 0.15  # as of kaiming_uniform_(a=sqrt(5)), PEFT's
    assert not flat(params)["text.layers.v_lora_b"].any()


def test_a_seed_gives_its_own_adapters_and_every_matrix_others(base):
    def fresh(seed):
        return flat(lora.attach(*base, Adapters(**MERGER_TOO), seed)[1])

    one, again, other = fresh(3), fresh(3), fresh(4)
    names = [name for name in one if name.endswith("_lora_a")]
    assert all(np.array_equal(one[name], again[name]) and not np.array_equal(one[name], other[name]) for name in names)
    assert not np.array_equal(one["text.layers.gate_lora_a"], one["text.layers.up_lora_a"])
    assert not np.array_equal(*one["text.layers.q_lora_a"][:2])


def test_the_merger_can_be_adapted_alone(base, tmp_path):
    model, params = lora.attach(*base, Adapters(rank=2, alpha=3.0, targets=(), merger=True))
    params = shaken(params)
    added = flat(params).keys() - flat(base[1]).keys()
    assert added == {f"vision.merge_fc{i}_lora_{half}" for i in (1, 2) for half in "ab"}
    lora.save(tmp_path, model, params)
    again = flat(lora.load(tmp_path, *base)[1])
    assert all(np.array_equal(again[name], flat(params)[name]) for name in added)
    with pytest.raises(ValueError, match="There is nothing to adapt"):
        lora.attach(*base, Adapters(rank=2, alpha=3.0, targets=()))


@pytest.mark.slow(3)
def test_merged_weights_give_the_logits_of_the_adapters(base):
    model, params = lora.attach(*base, Adapters(**MERGER_TOO))
    params = shaken(params)
    merged_model, merged = lora.merge(model, params)
    ours = logits(model, params)
    assert np.abs(ours - logits(merged_model, merged)).max() <= 1e-5 * np.abs(ours).max()
    assert np.abs(ours - logits(*base)).max() > 0.1
    assert merged_model == base[0] and jax.tree.structure(merged) == jax.tree.structure(base[1])
    again, same = lora.merge(*base)
    assert again == base[0] and all(map(np.array_equal, jax.tree.leaves(same), jax.tree.leaves(base[1])))


def test_adapters_are_float32_beside_a_bfloat16_base(folder):
    model, params = lora.attach(*checkpoint.load(folder, param_dtype="bfloat16"), Adapters(**ATTENTION))
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.split_state(params, nnx.LoRAParam, ...)[0])} == {jnp.dtype("float32")}
    assert {leaf.dtype for leaf in jax.tree.leaves(lora.merge(model, params)[1])} == {jnp.dtype("bfloat16")}


def test_every_adapter_has_a_place_on_the_mesh(base):
    _, params = lora.attach(*base, Adapters(**MERGER_TOO))
    mesh = jax.make_mesh((1, 1, 1), ("data", "fsdp", "tensor"))
    specs = flat_specs(shardings(params, mesh))
    assert specs["text.layers.gate_lora_a"] == (None, "fsdp", None) and specs["text.layers.gate_lora_b"] == (None, None, "tensor")


def flat_specs(params) -> dict[str, tuple]:
    return {".".join(map(str, path)): tuple(leaf.get_value().spec) for path, leaf in nnx.to_flat_state(params)}


# ---- PEFT's files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl"])
@pytest.mark.parametrize("settings", [MERGER_TOO, ATTENTION], ids=["all", "attention"])
def test_peft_loads_what_we_save_and_gives_our_logits(tmp_path_factory, tmp_path, settings, family):
    theirs = tiny_model(family=family)
    base = checkpoint.load(hf_oracle.save_checkpoint(theirs, tmp_path_factory.mktemp(family)), vision_block=BLOCK)
    model, params = lora.attach(*base, Adapters(**settings))
    params = shaken(params)
    lora.save(tmp_path, model, params, base="somewhere/qwen2-vl")
    assert {path.name for path in tmp_path.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    loaded = PeftModel.from_pretrained(theirs, tmp_path)
    names = {name.replace(".default", "") for name, _ in loaded.named_parameters() if "lora_" in name}
    assert names == set(load_file(tmp_path / "adapter_model.safetensors"))
    ours = logits(model, params)
    assert np.abs(ours - reference_logits(theirs)).max() <= 1e-4
    again_model, again = lora.load(tmp_path, *base)
    assert again_model == model
    np.testing.assert_array_equal(ours, logits(again_model, again))


@pytest.mark.parametrize(
    ("change", "alpha"),
    [({}, 3.0), ({"lora_alpha": 10}, 10.0), ({"use_rslora": True}, 3 * 2**0.5)],
    ids=["ours", "other", "rslora"],
)
def test_the_saved_alpha_is_that_of_the_adapters(base, tmp_path, change, alpha):
    """As attached, and as loaded; alpha / rank is the scale, that of rank-stabilised ones alpha / sqrt(rank)."""
    lora.save(tmp_path, *lora.attach(*base, Adapters(**ATTENTION)), base="somewhere/qwen2-vl")
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    lora.save(tmp_path / "again", *lora.load(tmp_path, *base), base="elsewhere")
    config = json.loads((tmp_path / "again/adapter_config.json").read_text())
    assert (config["r"], config["base_model_name_or_path"]) == (2, "elsewhere")
    assert config["lora_alpha"] == pytest.approx(alpha) and not config.get("use_rslora")


def test_of_many_faults_of_an_adapter_eight_are_named(base, tmp_path):
    lora.save(tmp_path, *lora.attach(*base, Adapters(**ATTENTION)))
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    save_file(
        {name.replace("lora_B", "lora_C"): tensor for name, tensor in tensors.items()}, tmp_path / "adapter_model.safetensors"
    )
    with pytest.raises(ValueError, match=r"lora_B.weight is missing; .*; and 4 more\.$") as refused:
        lora.load(tmp_path, *base)  # three layers of two matrices: six B are missing, and six C are nothing
    assert str(refused.value).count(";") == 8


@pytest.mark.parametrize(
    ("targets", "rslora"), [(["q_proj", "down_proj"], False), ([*TARGETS, "merger.mlp.0", "merger.mlp.2"], True)]
)
def test_what_peft_writes_loads_here(base, tmp_path, targets, rslora):
    theirs = tiny_model()
    settings = LoraConfig(r=4, lora_alpha=4, target_modules=targets, use_rslora=rslora, init_lora_weights=False)
    get_peft_model(theirs, settings).save_pretrained(tmp_path)
    model, params = lora.load(tmp_path, *base)
    ours = logits(model, params)
    assert np.abs(ours - reference_logits(theirs)).max() <= 1e-4 and np.abs(ours - logits(*base)).max() > 0.1


EVERYTHING = {
    "qwen2_vl": ["qkv", "proj", "fc1", "fc2"], "qwen2_5_vl": ["qkv", "proj"],
    "qwen3_vl": ["qkv", "proj", "linear_fc1", "linear_fc2"],
}  # fmt: skip
"""Names of the tower's matrices beside the usual seven."""


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """By family, a model of transformers' and ours of its weights."""

    @functools.cache
    def made(family):
        theirs = tiny_model(family=family)
        return theirs, checkpoint.load(hf_oracle.save_checkpoint(theirs, tmp_path_factory.mktemp(family)), vision_block=BLOCK)

    return made


def vision_modules(tensors) -> set[str]:
    """Modules of the tower that have adapters, without numbers of layers."""
    found = (name.partition("visual.")[2].partition(".lora_") for name in tensors if "visual" in name)
    return {re.sub(r"\.\d+\.", ".N.", module) for module, adapter, _ in found if adapter}


@pytest.mark.parametrize("modules", [None, ["merger", "lm_head"], ["embed_tokens", "input_layernorm", "patch_embed"]])
@pytest.mark.parametrize("family", list(EVERYTHING))
def test_adapters_of_the_usual_seven_names_and_whole_modules_of_peft_load_here(bases, tmp_path, family, modules):
    """The seven match the tower of Qwen2.5-VL too. Adapters and whole modules are random."""
    theirs, base = bases(family)
    made = get_peft_model(copy.deepcopy(theirs), LoraConfig(r=4, lora_alpha=4, target_modules=[*TARGETS], modules_to_save=modules,
                                                            init_lora_weights=False))  # fmt: skip
    torch.manual_seed(3)
    for name, parameter in made.named_parameters():
        if "modules_to_save" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    made.save_pretrained(tmp_path)
    seven = {f"blocks.N.mlp.{name}_proj" for name in ("gate", "up", "down")} if family == "qwen2_5_vl" else set()
    assert vision_modules(load_file(tmp_path / "adapter_model.safetensors")) == seven
    model, params = lora.load(tmp_path, *base)
    ours = logits(model, params)
    assert np.abs(ours - reference_logits(made)).max() <= 1e-4 and np.abs(ours - logits(*base)).max() > 0.1
    assert lora.adapts_vision(params) == bool(seven or modules)
    merged_model, merged = lora.merge(model, params)
    assert merged_model == base[0] and np.abs(logits(merged_model, merged) - ours).max() <= 1e-4
    lora.save(tmp_path / "again", model, params)
    again = load_file(tmp_path / "again" / "adapter_model.safetensors")
    written = load_file(tmp_path / "adapter_model.safetensors")
    assert again.keys() == written.keys() and all(np.array_equal(again[name], written[name]) for name in again)


@pytest.mark.parametrize("family", list(EVERYTHING))
def test_peft_loads_adapters_of_the_whole_tower_and_whole_modules(bases, tmp_path, family):
    theirs, base = bases(family)
    names = (*TARGETS, *EVERYTHING[family])
    settings = Adapters(rank=2, alpha=3.0, targets=names, tower=True, merger=True, modules_to_save=("ln_q", "lm_head", "norm1"))
    if family == "qwen3_vl":
        settings = replace(settings, modules_to_save=("pos_embed", "lm_head", "norm1"))
    fresh = lora.attach(*base, settings)
    np.testing.assert_array_equal(logits(*fresh), logits(*base))
    model, params = fresh[0], shaken(fresh[1])
    lora.save(tmp_path, model, params)
    loaded = PeftModel.from_pretrained(copy.deepcopy(theirs), tmp_path)
    written = load_file(tmp_path / "adapter_model.safetensors")
    theirs_too = {n.replace(".default", "").replace("modules_to_save.", "") for n, _ in loaded.named_parameters()
                  if "lora_" in n or "modules_to_save" in n}  # fmt: skip
    assert theirs_too == set(written)
    count = {"qwen2_vl": 4 + 2, "qwen2_5_vl": 5 + 2, "qwen3_vl": 4 + 2 + 2}[family]  # blocks, merger, mergers of DeepStack
    assert len(vision_modules(written)) == count
    ours = logits(model, params)
    assert np.abs(ours - reference_logits(loaded)).max() <= 1e-4 * np.abs(ours).max()
    assert np.abs(ours - logits(*lora.merge(model, params))).max() <= 1e-4 * np.abs(ours).max()


def test_without_the_tower_the_seven_names_are_the_decoders(bases):
    _, base = bases("qwen2_5_vl")
    assert not lora.adapts_vision(lora.attach(*base, Adapters(rank=2, targets=TARGETS))[1])
    seven = lora.attach(*base, Adapters(rank=2, targets=TARGETS, tower=True))[1]
    assert {name for name in flat(seven) if "vision" in name and "lora" in name} == {
        f"vision.blocks.{name}_lora_{half}" for name in ("gate", "up", "down") for half in "ab"
    }


WRONG = [
    ({"targets": ("q_proj", "fc1")}, "holds 'fc1'; for Qwen2-VL, choose from q_proj, .*; those of the vision tower need lora"),
    ({"targets": ("linear_fc1",), "tower": True}, "holds 'linear_fc1'; for Qwen2-VL, choose from q_proj, .*, fc2.$"),
    ({"modules_to_save": ("score",)}, "modules_to_save holds 'score', which Qwen2-VL has not"),
    ({"modules_to_save": ("merger",), "merger": True}, "lora.modules_to_save holds 'merger', which is adapted too"),
    ({"modules_to_save": ("q_proj",)}, "lora.modules_to_save holds 'q_proj', which is adapted too"),
]  # fmt: skip


@pytest.mark.parametrize(("settings", "words"), WRONG)
def test_what_a_model_cannot_adapt_is_refused(base, settings, words):
    with pytest.raises(ValueError, match=words):
        lora.attach(*base, Adapters(**{"rank": 2, "targets": ("q_proj",)} | settings))


def test_a_tied_embedding_is_not_saved_apart(tmp_path):
    tied = checkpoint.load(hf_oracle.save_checkpoint(tiny_model(tied=True), tmp_path))
    with pytest.raises(ValueError, match="holds 'embed_tokens', but this model's output matrix is tied to it; leave it out"):
        lora.attach(*tied, Adapters(rank=2, modules_to_save=("embed_tokens",)))


def test_a_whole_module_that_is_missing_in_the_files_is_named(base, tmp_path):
    lora.save(tmp_path, *lora.attach(*base, Adapters(rank=2, targets=("q_proj",), modules_to_save=("ln_q",))))
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    del tensors[f"{lora.PREFIX}model.visual.merger.ln_q.bias"]
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="does not fit the model: model.visual.merger.ln_q.bias is missing.$"):
        lora.load(tmp_path, *base)


def test_whole_modules_are_float32_beside_a_bfloat16_base_and_merge_to_it(folder):
    base = checkpoint.load(folder, param_dtype="bfloat16")
    model, params = lora.attach(*base, Adapters(rank=2, modules_to_save=("merger",)))
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.split_state(params, nnx.LoRAParam, ...)[0])} == {jnp.dtype("float32")}
    merged_model, merged = lora.merge(model, params)
    assert merged_model == base[0] and all(map(np.array_equal, jax.tree.leaves(merged), jax.tree.leaves(base[1])))


def test_older_tensor_names_are_understood(base, tmp_path):
    model, params = lora.attach(*base, Adapters(**MERGER_TOO))
    params = shaken(params)
    lora.save(tmp_path, model, params)
    file = tmp_path / "adapter_model.safetensors"
    save_file({checkpoint.older_name(name): tensor for name, tensor in load_file(file).items()}, file)
    assert any(name.startswith("base_model.model.model.layers.") for name in load_file(file))
    np.testing.assert_array_equal(logits(*lora.load(tmp_path, *base)), logits(model, params))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tensors, config: config.update(use_dora=True), "use_dora"),
        (lambda tensors, config: config.update(bias="all"), "sets bias"),
        (lambda tensors, config: config.update(peft_type="IA3"), "peft_type"),
        (lambda tensors, config: config.update(r=3), "q_proj.lora_A.weight has shape [2, 64], expected [3, 64]"),
        (lambda tensors, config: tensors.pop(f"{lora.PREFIX}model.language_model.layers.1.self_attn.v_proj.lora_B.weight"),
         "model.language_model.layers.1.self_attn.v_proj.lora_B.weight is missing"),
        (lambda tensors, config: tensors.update({"base_model.model.lm_head.lora_A.weight": np.ones((2, 64), np.float32)}),
         "base_model.model.lm_head.lora_A.weight belongs to nothing"),
    ],
)  # fmt: skip
def test_an_adapter_that_does_not_fit_is_refused_in_one_sentence(base, tmp_path, change, words):
    lora.save(tmp_path, *lora.attach(*base, Adapters(**ATTENTION)))
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    change(tensors, config)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError) as refused:
        lora.load(tmp_path, *base)
    assert words in str(refused.value) and "\n" not in str(refused.value)


def test_a_folder_without_an_adapter_is_refused(base, tmp_path):
    with pytest.raises(ValueError, match=r"holds no adapter_config.json"):
        lora.load(tmp_path, *base)


# ---- training -------------------------------------------------------------------------------------------------------


CFG = small_config(
    lora=MERGER_TOO | {"targets": list(TARGETS)}, optim={"warmup_steps": 0}, rollout={"response_tokens": 6},
    grpo={"clip_low": 0.99, "clip_high": 1e6},  # nothing is clipped, so every token has a gradient
)  # fmt: skip
TABLES = mask_tables(CFG.mask)


def store_of(model, params) -> FeatureStore:
    """Two images, encoded: 4 and 12 feature rows."""
    store, rng = FeatureStore(model, params, 1, pages=1), np.random.default_rng(0)
    store.add([prepare(hf_oracle.random_image(rng, size)) for size in ((16, 16), (24, 32))])
    return store


@pytest.fixture(scope="module")
def groups() -> GroupBatch:
    """Four groups of two rollouts of random ids; every prompt shows the first image of `store_of`."""
    rng, (n, g, p, r) = np.random.default_rng(1), (4, 2, 8, 6)
    ids, positions = rng.integers(1, 100, (n, p + g * r), np.int32), np.arange(p + r, dtype=np.int32)
    vision = np.tile(np.int32([-1, 0, 1, 2, 3, -1, -1, -1]), (n, 1))
    advantages = rng.normal(size=(n, g)).astype(np.float32)
    return GroupBatch(
        prompt_ids=ids[:, :p], prompt_positions=np.tile(positions[:p], (3, n, 1)), prompt_len=np.full(n, p, np.int32),
        prompt_vision=vision, response_ids=ids[:, p:].reshape(n, g, r), response_len=np.full((n, g), r, np.int32),
        response_positions=np.tile(positions[p:], (3, n, g, 1)), response_vision=np.full((n, g, r), -1, np.int32),
        kind=np.full((n, g, r), TokenKind.TEXT, np.uint8), logprobs=np.full((n, g, r), -5.0, np.float32),
        end=np.full((n, g), EndReason.ANSWERED, np.uint8), rewards=advantages, advantages=advantages,
    )  # fmt: skip


def copied(params):
    return jax.tree.map(jnp.copy, params)  # an update donates what it trains


TOWER_TOO = MERGER_TOO | {"tower": True, "targets": (*TARGETS, "qkv", "fc2"), "modules_to_save": ("norm1", "lm_head")}


@pytest.mark.parametrize("settings", [MERGER_TOO | {"merger": False}, MERGER_TOO, TOWER_TOO], ids=["decoder", "merger", "tower"])
@pytest.mark.slow(15)
def test_a_step_changes_adapters_alone_and_the_optimizer_holds_only_them(base, groups, settings):
    model, params = lora.attach(*base, Adapters(**settings))
    learner, before = Learner(model, CFG, make_optimizer(CFG.optim, 4), TABLES), flat(params)
    learner.warm = True  # one width is enough here
    params = copied(params)
    after, opt_state, seen = learner.update(params, learner.init(params), groups, store_of(model, params))
    after = flat(after)
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    whole = {"vision.blocks.norm1", "vision.blocks.norm1_bias", "text.lm_head"} if settings.get("modules_to_save") else set()
    assert changed == {name for name in before if name.endswith("_lora_b")} | whole  # A's gradient is zero while B is
    assert any("vision" in name for name in changed) == settings["merger"] and seen["grad_norm"] > 0
    adapters = sorted(value.shape for name, value in before.items() if "_lora_" in name or name in whole)
    assert sorted(leaf.shape for leaf in jax.tree.leaves(opt_state) if leaf.ndim) == sorted(adapters * 2)


@pytest.mark.slow(20)
@pytest.mark.parametrize("settings", [MERGER_TOO, TOWER_TOO], ids=["merger", "tower"])
def test_gradients_of_adapters_are_those_through_merged_weights(base, groups, settings):
    model, params = lora.attach(*base, Adapters(**settings))
    adapters, frozen = nnx.split_state(shaken(params), nnx.LoRAParam, ...)
    normaliser, packed = group_normalisers(CFG.grpo, groups, TABLES).sum(), store_of(*base).packs[0]

    def loss(adapters, merge):
        here, whole = model, nnx.merge_state(adapters, frozen)
        if merge:
            here, whole = lora.merge(model, whole)
        features = encode_images(here, whole, *map(jnp.asarray, packed))
        batch = jax.tree.map(jnp.asarray, groups)
        shown = tuple(at_tokens(features, vision) for vision in (batch.prompt_vision, batch.response_vision))
        return batch_loss(here, LossSettings.of(CFG), whole, nnx.State({}), shown, batch, TABLES, normaliser, None, None)[0]

    ours, expected = (flat(jax.jit(jax.grad(loss), static_argnums=1)(adapters, merge)) for merge in (False, True))
    for name, value in expected.items():
        assert np.abs(ours[name] - value).max() <= 1e-4 * np.abs(value).max() > 0, name

    learner = Learner(model, CFG, make_optimizer(CFG.optim, 4), TABLES)
    params = nnx.merge_state(adapters, frozen)
    learned, _ = learner._gradient(params, [(groups, None, None)], store_of(model, params), normaliser, fresh=True)
    for name, value in flat(learned).items():  # the merger's through the features' summed gradient
        assert np.abs(value - expected[name]).max() <= 1e-4 * np.abs(expected[name]).max(), name
    assert flat(learned).keys() == expected.keys()


@pytest.mark.slow(4)
def test_the_kl_reference_outlives_the_updates(base, groups):
    cfg = small_config(lora={"rank": 2}, grpo={"kl": 0.1}, optim={"warmup_steps": 0}, rollout={"response_tokens": 6})
    model, params = lora.attach(*base, Adapters(**ATTENTION))
    params = copied(params)
    learner, store = Learner(model, cfg, make_optimizer(cfg.optim, 4), TABLES, reference=params), store_of(model, params)
    learner.warm, opt_state = True, learner.init(params)
    for i in range(2):
        params, opt_state, seen = learner.update(params, opt_state, groups, store)
        assert (seen["kl/reference"] > 1e-9) == (i > 0)


@pytest.mark.slow(18)
def test_the_trainer_recomputes_the_logprobs_of_an_adapted_sampler(parts, tasks, config):
    model, params = lora.attach(parts.model, parts.params, Adapters(**MERGER_TOO))
    params = shaken(params, 0.01)
    out = Collector(model, parts.processor, parts.tools, config).collect(params, tasks, group_size=4, seed=11)
    zeros = np.zeros((4, 4), np.float32)
    b = pack_batch(out, zeros, zeros, config.rollout.prompt_tokens, config.rollout.response_tokens)
    chosen = (b.kind != TokenKind.OBSERVATION) & (b.kind != TokenKind.PAD)
    again = np.asarray(jax.jit(score, static_argnums=(0, 4))(model, params, b, shown_in(out.store, b), 1.0)[0])
    assert np.abs(again - b.logprobs)[chosen].max() <= 1e-4
    plain = np.asarray(jax.jit(score, static_argnums=(0, 4))(parts.model, parts.params, b, shown_in(out.store, b), 1.0)[0])
    assert np.abs(plain - b.logprobs)[chosen].max() > 1e-3


def number(trajectory) -> float:
    """A reward that spreads in every group."""
    return float(trajectory.rollout)


@pytest.mark.slow(30)
def test_a_stopped_run_resumes_to_the_same_adapters_and_leaves_them_with_a_merged_model(tmp_path, monkeypatch):
    """Stopped after the first of two steps, each of which moves the adapters."""
    flags = (
        "--lora.rank=4", "--lora.alpha=6", "--lora.merger=true", "--run.steps=2", "--run.checkpoint_every=1",
        "--run.log_trajectories=0", "--optim.warmup_steps=0", "--rollout.groups=2", "--rollout.group_size=2",
        "--rollout.response_tokens=32", "--images.pack_blocks=2", "--grpo.length_buckets=1", "--mask.drop_truncated=false",
        "--eval.every=0", "--eval.tasks=1", "--eval.groups=1", "--data.train_size=8", "--data.test_size=1",
        "--grpo.minibatches=1", "--run.compile_cache=", f"--run.dir={tmp_path}", f"--data.cache_dir={tmp_path}/data",
        f"--reward.custom=['{__name__}:number']",
    )  # fmt: skip
    assert job.main([*flags, "--run.name=whole"]) == 0
    with monkeypatch.context() as patch:
        interrupt, save = job.Interrupt(), job.RunFolder.save

        def stop(self, step, *rest):
            save(self, step, *rest)
            interrupt.asked = int(step == 1)

        patch.setattr(job, "Interrupt", lambda: contextlib.nullcontext(interrupt))
        patch.setattr(job.RunFolder, "save", stop)
        assert job.main([*flags, "--run.name=cut"]) == 0
    assert not (tmp_path / "cut/adapter").exists()
    assert job.main([*flags, "--run.name=cut", "--run.resume=true"]) == 0
    a, b = (load_file(tmp_path / name / "adapter/adapter_model.safetensors") for name in ("whole", "cut"))
    assert a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)
    described = json.loads((tmp_path / "cut/adapter/adapter_config.json").read_text())
    assert (described["r"], described["lora_alpha"], described["base_model_name_or_path"]) == (4, 6.0, "tiny")

    path = tmp_path / "cut"
    kept = sum(file.stat().st_size for file in (path / "checkpoints/2").rglob("*") if file.is_file())
    assert kept < (path / "model/model.safetensors").stat().st_size / 4
    base, exported = checkpoint.load(base_folder()), checkpoint.load(path / "model")[1]
    merged = lora.merge(*lora.load(path / "adapter", *base))[1]
    assert all(np.allclose(a, b, atol=1e-7) for a, b in zip(jax.tree.leaves(merged), jax.tree.leaves(exported), strict=True))
    assert not np.array_equal(flat(base[1])["text.layers.q"], flat(merged)["text.layers.q"])


# ---- settings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"lora": {"targets": ["q_proj", "v_prj"]}},
         "a list of q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj, qkv, proj, fc1, fc2, linear_fc1, linear_fc2."),
        ({"lora": {"rank": 4, "targets": []}}, "nothing is adapted"),
        ({"lora": {"rank": -1}}, "lora.rank is -1; it must be at least 0."),
        ({"lora": {"alpha": 0.0}}, "lora.alpha is 0.0; it must be above 0."),
        ({"lora": {"rank": 4}, "model": {"freeze_vision": False}}, "set lora.tower or lora.merger to adapt"),
    ],
)  # fmt: skip
def test_settings_that_make_no_sense_are_refused(values, words):
    with pytest.raises(ValueError) as refused:
        Config.from_dict(values)
    assert words in str(refused.value)
