"""Checkpoints in Hugging Face's form: both name styles, one file or shards, in and out; faults in one sentence."""

import json
from fnmatch import fnmatch

import hf_oracle
import jax
import numpy as np
import pytest
import torch
from hf_oracle import save_checkpoint, tiny_model
from safetensors.numpy import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText

from imagent_jax.model import checkpoint
from imagent_jax.model.families import family_of, read_config
from imagent_jax.model.vlm import Model

REFERENCES = {
    "tied": tiny_model(tied=True),
    "untied": tiny_model(tied=False),
    "2.5-tied": tiny_model(tied=True, family="qwen2_5_vl"),
    "2.5-untied": tiny_model(tied=False, family="qwen2_5_vl"),
    "3-tied": tiny_model(tied=True, family="qwen3_vl"),
    "3-untied": tiny_model(tied=False, family="qwen3_vl"),
}


@pytest.fixture(params=REFERENCES)
def reference(request):
    return REFERENCES[request.param]


def arrays(params) -> dict[str, np.ndarray]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def assert_same(a, b):
    a, b = arrays(a), arrays(b)
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def assert_holds_the_weights_of(model: hf_oracle.Reference, folder):
    loaded = type(model).from_pretrained(folder, dtype=torch.float32)
    theirs, ours = model.state_dict(), loaded.state_dict()
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)


@pytest.mark.parametrize("shards", [1, 3])
def test_both_name_styles_load_to_the_same_parameters(reference, tmp_path, shards):
    newer = checkpoint.load(save_checkpoint(reference, tmp_path / "newer", shards=shards))
    older = checkpoint.load(save_checkpoint(reference, tmp_path / "older", older=True, shards=shards))
    own = tmp_path / "own"
    reference.save_pretrained(own)
    assert_same(newer[1], older[1])
    assert_same(newer[1], checkpoint.load(own)[1])
    assert newer[0].cfg == older[0].cfg
    total = sum(array.size for array in arrays(newer[1]).values())
    assert total == sum(p.numel() for p in reference.parameters())


@pytest.mark.parametrize("shard_bytes", [2**30, 60_000])
def test_what_is_saved_loads_in_transformers_and_here_bit_for_bit(reference, tmp_path, shard_bytes):
    model, params = checkpoint.load(save_checkpoint(reference, tmp_path / "in", older=True))
    checkpoint.save(tmp_path / "out", model, params, max_shard_size=shard_bytes)
    assert (tmp_path / "out/model.safetensors.index.json").is_file() == (shard_bytes < 2**30)
    assert (len(list((tmp_path / "out").glob("*.safetensors"))) > 3) == (shard_bytes < 2**30)
    names = {name for file in (tmp_path / "out").glob("*.safetensors") for name in load_file(file)}
    assert names == set(hf_oracle.tensors(reference, older=reference.config.model_type != "qwen3_vl"))
    saved, given = (AutoConfig.from_pretrained(tmp_path / name).to_dict() | {"_name_or_path": ""} for name in ("out", "in"))
    assert saved == given and saved["model_type"] == reference.config.model_type
    assert_holds_the_weights_of(reference, tmp_path / "out")
    again, reloaded = checkpoint.load(tmp_path / "out")
    assert again.cfg == model.cfg
    assert_same(params, reloaded)


def test_the_round_trip_keeps_tensors_names_and_config(reference, tmp_path):
    reference.save_pretrained(tmp_path / "in")
    policy = checkpoint.from_pretrained(tmp_path / "in", progress=False)
    checkpoint.save_pretrained(policy, tmp_path / "out", max_shard_size="100KB")
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    assert type(loaded) is type(reference)
    theirs, ours = reference.state_dict(), loaded.state_dict()
    assert theirs.keys() == ours.keys()
    assert all(theirs[name].dtype == ours[name].dtype and torch.equal(theirs[name], ours[name]) for name in theirs)
    stored = [{name for file in (tmp_path / side).glob("*.safetensors") for name in load_file(file)} for side in ("in", "out")]
    assert stored[0] == stored[1]
    configs = [json.loads((tmp_path / side / "config.json").read_text()) for side in ("in", "out")]
    assert configs[0] == configs[1]
    assert (tmp_path / "out/generation_config.json").read_text() == (tmp_path / "in/generation_config.json").read_text()


def test_a_save_that_fails_leaves_the_earlier_one(tmp_path, monkeypatch):
    model, params = checkpoint.load(save_checkpoint(REFERENCES["tied"], tmp_path))

    def full(path, tensors):
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(checkpoint, "write_tensors", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(tmp_path, model, jax.tree.map(lambda x: x + 1, params))
    assert_same(params, checkpoint.load(tmp_path)[1])
    assert not list(tmp_path.glob("*.partial"))


def test_saving_again_with_other_sharding_leaves_no_stale_file(tmp_path):
    model, params = checkpoint.load(save_checkpoint(REFERENCES["tied"], tmp_path / "in"))
    changed = jax.tree.map(lambda x: x + 1, params)
    for first, second in ((60_000, 2**30), (2**30, 60_000)):
        folder = tmp_path / str(first)
        checkpoint.save(folder, model, params, max_shard_size=first)
        checkpoint.save(folder, model, changed, max_shard_size=second)
        assert_same(changed, checkpoint.load(folder)[1])


def test_bfloat16_files_load_exactly_and_can_be_written(tmp_path):
    reference = tiny_model(seed=3).to(torch.bfloat16)
    folder = save_checkpoint(reference, tmp_path / "in", dtype=torch.bfloat16)
    model, params = checkpoint.load(folder)
    assert {array.dtype for array in arrays(params).values()} == {np.dtype("float32")}
    assert_same(params, jax.tree.map(lambda x: x.astype("float32"), checkpoint.load(folder, param_dtype="bfloat16")[1]))
    checkpoint.save(tmp_path / "out", model, params, dtype="bfloat16")
    assert_holds_the_weights_of(reference.float(), tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize("kind", ["bfloat16", "float16"])
def test_a_model_keeps_the_dtype_of_its_files_and_computes_in_it(tmp_path, kind):
    folder = save_checkpoint(tiny_model(seed=3), tmp_path / "in", dtype=getattr(torch, kind), older=True)
    policy = checkpoint.from_pretrained(folder, progress=False)
    model, params = policy.split(remat="full", logprob_chunk=7)
    assert {array.dtype.name for array in arrays(params).values()} == {kind}
    assert model == Model(model.graphdef, policy.cfg, kind, "full", 144, 7, "xla")
    assert policy.split(dtype="float32")[0].dtype == "float32"
    whole = checkpoint.from_pretrained(folder, dtype="float32", progress=False).split()
    assert whole[0].dtype == "float32"
    widened = jax.tree.map(lambda x: np.asarray(x).astype("float32"), params)  # by NumPy: XLA converts no half under SSE4.2
    assert_same(whole[1], widened)
    checkpoint.save_pretrained(policy, tmp_path / "out")
    assert {t.dtype.name for t in load_file(tmp_path / "out/model.safetensors").values()} == {kind}
    saved = json.loads((tmp_path / "out/config.json").read_text())
    assert saved["dtype"] == saved["torch_dtype"] == kind


def test_matrices_are_copied_alike_in_blocks_of_any_number_of_rows(tmp_path, monkeypatch):
    folder = save_checkpoint(REFERENCES["untied"], tmp_path)
    _, params = checkpoint.load(folder)
    monkeypatch.setattr(checkpoint, "_ROWS", 7)
    assert_same(params, checkpoint.load(folder)[1])


def test_a_config_without_architectures_is_saved_with_its_own(tmp_path):
    folder = save_checkpoint(REFERENCES["2.5-tied"], tmp_path / "in")
    edit_config(folder, architectures=None)
    checkpoint.save(tmp_path / "out", *checkpoint.load(folder))
    saved = json.loads((tmp_path / "out/config.json").read_text())
    assert saved["architectures"] == ["Qwen2_5_VLForConditionalGeneration"]


def test_a_tied_checkpoint_that_also_stores_its_head_is_accepted(tmp_path):
    folder = save_checkpoint(REFERENCES["tied"], tmp_path)
    _, params = checkpoint.load(folder)
    edit(folder, lambda t: t | {"lm_head.weight": t["model.language_model.embed_tokens.weight"].copy()})
    assert_same(params, checkpoint.load(folder)[1])


@pytest.mark.parametrize("name", ["tied", "2.5-tied", "3-tied"])
def test_a_stored_head_that_differs_is_used_though_the_config_says_tied(name, tmp_path, monkeypatch):
    """As transformers reads it; what is saved then says untied, and is read alike by both. The last of many blocks differs."""
    monkeypatch.setattr(checkpoint, "_ROWS", 7)
    folder = save_checkpoint(REFERENCES[name], tmp_path / "in", older=name != "3-tied")
    head = REFERENCES[name].state_dict()["lm_head.weight"].numpy().copy()
    head[-1, -1] += 1
    edit(folder, lambda t: t | {"lm_head.weight": head})
    theirs = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).state_dict()["lm_head.weight"].numpy()
    np.testing.assert_array_equal(theirs, head)
    model, params = checkpoint.load(folder)
    np.testing.assert_array_equal(params["text"]["lm_head"][...], head.T)
    checkpoint.save(tmp_path / "out", model, params)
    assert_same(params, checkpoint.load(tmp_path / "out")[1])
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", dtype=torch.float32)
    np.testing.assert_array_equal(again.state_dict()["lm_head.weight"].numpy(), head)
    assert not again.config.tie_word_embeddings


def test_a_stored_head_of_another_shape_is_a_fault(tmp_path):
    folder = save_checkpoint(REFERENCES["tied"], tmp_path)
    edit(folder, lambda t: t | {"lm_head.weight": t["model.language_model.embed_tokens.weight"][1:].copy()})
    with pytest.raises(ValueError, match="lm_head.weight has shape"):
        checkpoint.load(folder)


def test_tokenizer_and_preprocessor_files_travel_with_the_weights(tmp_path):
    source = save_checkpoint(REFERENCES["tied"], tmp_path / "in")
    for name in (
        "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json",
        "chat_template.jinja", "chat_template.json", "preprocessor_config.json", "processor_config.json",
        "video_preprocessor_config.json", "generation_config.json",
    ):  # fmt: skip
        (source / name).write_text(json.dumps({"name": name}))
    model, params = checkpoint.load(source)
    checkpoint.save(tmp_path / "out", model, params, source=source)
    assert json.loads((tmp_path / "out/tokenizer.json").read_text()) == {"name": "tokenizer.json"}
    assert {p.name for p in source.iterdir()} == {p.name for p in (tmp_path / "out").iterdir()}


# ---- bad input ------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    return save_checkpoint(REFERENCES["untied"], tmp_path / "checkpoint")


def edit(folder, change):
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors")


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_missing_extra_and_misshaped_tensors_are_named_together(folder):
    down, norm = "model.language_model.layers.1.mlp.down_proj.weight", "model.visual.blocks.1.norm2.bias"
    extra = "model.adapter.weight"

    def change(tensors):
        del tensors[norm]
        return tensors | {extra: np.zeros(3, np.float32), down: tensors[down][:, :-1].copy()}

    edit(folder, change)
    with pytest.raises(ValueError, match="the weights do not fit config.json") as error:
        checkpoint.load(folder)
    for fault in (f"missing {norm}", f"unexpected {extra}", f"{down} has shape [64, 79], expected [64, 80]"):
        assert fault in str(error.value)


def test_many_faults_are_counted_not_all_listed(folder):
    missing = sum("visual" in name for name in load_file(folder / "model.safetensors"))
    edit(folder, lambda tensors: {k: v for k, v in tensors.items() if "visual" not in k})
    with pytest.raises(ValueError, match=f"; and {missing - 8} more") as error:
        checkpoint.load(folder)
    assert str(error.value).count("missing") == 8


@pytest.mark.parametrize("count", [8, 9])
def test_eight_faults_are_all_listed_and_a_ninth_is_counted(folder, count):
    edit(folder, lambda tensors: {k: v for i, (k, v) in enumerate(tensors.items()) if i >= count})
    with pytest.raises(ValueError, match="weights do not fit") as error:
        checkpoint.load(folder)
    assert str(error.value).count("missing") == 8 and ("; and 1 more" in str(error.value)) == (count == 9)


def test_weights_of_whole_numbers_are_refused(folder):
    norm = "model.language_model.norm.weight"
    edit(folder, lambda tensors: tensors | {norm: tensors[norm].astype(np.int32)})
    with pytest.raises(ValueError, match=f"{norm} is stored as I32, expected one of F32, F16, BF16"):
        checkpoint.load(folder)


def test_weights_of_another_size_than_the_config_are_refused(folder):
    edit_config(folder, text_config=json.loads((folder / "config.json").read_text())["text_config"] | {"vocab_size": 121})
    with pytest.raises(ValueError, match=r"embed_tokens.weight has shape \[120, 64\], expected \[121, 64\]"):
        checkpoint.load(folder)


@pytest.mark.parametrize(
    ("kind", "architecture"),
    [
        ("llama", "LlamaForCausalLM"),
        ("qwen3_vl_moe", "Qwen3VLMoeForConditionalGeneration"),
        ("qwen2_vl", "Qwen2VLForSequenceClassification"),
        ("qwen2_5_vl", "Qwen2VLForConditionalGeneration"),
        (None, None),
    ],
)
def test_another_architecture_is_named(folder, kind, architecture):
    edit_config(folder, model_type=kind, architectures=architecture and [architecture])
    with pytest.raises(ValueError, match=rf"config.json: model_type is {kind!r}.*'qwen2_5_vl'.*'qwen2_vl'") as error:
        checkpoint.load(folder)
    assert (architecture or "None") in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
def test_features_of_another_width_than_the_decoders_are_refused(family):
    hf = hf_oracle.config_json(tiny_model(family=family))
    hf["vision_config"]["hidden_size" if family == "qwen2_vl" else "out_hidden_size"] = 48
    with pytest.raises(ValueError, match="features of width 48; the decoder's is 64"):
        read_config(hf)


def test_windows_that_hold_no_merged_patch_are_refused():
    hf = hf_oracle.config_json(REFERENCES["2.5-tied"])
    hf["vision_config"]["window_size"] = 7
    with pytest.raises(ValueError, match="window_size 7 holds no 2 patches of 4"):
        read_config(hf)


def test_a_config_without_a_needed_setting_is_refused_with_its_name(folder):
    path = folder / "config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "vision_config"}))
    with pytest.raises(ValueError, match="has no 'vision_config'; name a complete checkpoint"):
        checkpoint.load(folder)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"use_sliding_window": True}, "sliding-window attention is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act of the decoder is 'gelu'; only 'silu'"),
        ({"rope_parameters": {"rope_type": "yarn", "mrope_section": [2, 3, 3]}}, "rope type 'yarn' is not supported"),
        ({"rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 4]}}, r"mrope_section \[2, 3, 4\] must sum"),
    ],
)
def test_a_setting_that_would_not_be_honoured_is_refused(changes, sentence):
    hf = hf_oracle.config_json(REFERENCES["tied"])
    with pytest.raises(ValueError, match=sentence):
        read_config(hf | {"text_config": hf["text_config"] | changes})


def test_both_config_forms_mean_the_same(reference):
    newer, older = (read_config(hf_oracle.config_json(reference, older)) for older in (False, True))
    assert newer == older


@pytest.mark.parametrize("family", hf_oracle.FAMILIES)
def test_what_a_config_leaves_out_has_the_default_of_transformers(family):
    config, _ = hf_oracle.FAMILIES[family]
    text, vision = config().text_config, config().vision_config
    sizes = {"vocab_size": 50, "hidden_size": 3584, "intermediate_size": 9, "num_hidden_layers": 1, "num_attention_heads": 28}
    markers = {"image_token_id": 1, "vision_start_token_id": 2, "vision_end_token_id": 3}
    cfg = read_config({"model_type": family, **sizes, **markers, "vision_config": {}})
    third = family == "qwen3_vl"
    assert (cfg.text.rms_norm_eps, cfg.text.rope_theta) == (text.rms_norm_eps, 5e5 if third else 1e6)
    assert cfg.text.mrope_section == ((24, 20, 20) if third else (16, 24, 24)) and cfg.text.head_dim == 128
    assert cfg.text.num_kv_heads == 28 and not cfg.text.tie_word_embeddings
    assert family_of(cfg).architecture == hf_oracle.FAMILIES[family][1].__name__
    ours = cfg.vision
    assert (ours.depth, ours.num_heads, ours.in_channels) == (vision.depth, vision.num_heads, vision.in_channels)
    assert (ours.patch_size, ours.temporal_patch_size) == (vision.patch_size, vision.temporal_patch_size)
    assert ours.spatial_merge_size == vision.spatial_merge_size and ours.rope_theta == 1e4
    if family == "qwen2_5_vl":
        assert (ours.embed_dim, ours.hidden_size, ours.intermediate_size) == (3584, 3584, vision.intermediate_size)
        assert (ours.window_size, ours.full_attention_blocks) == (vision.window_size, tuple(vision.fullatt_block_indexes))
    elif third:
        assert (ours.embed_dim, ours.intermediate_size) == (vision.hidden_size, vision.intermediate_size)
        assert (ours.hidden_size, ours.deepstack) == (vision.out_hidden_size, tuple(vision.deepstack_visual_indexes))
        assert ours.position_side**2 == vision.num_position_embeddings
    else:
        assert (ours.embed_dim, ours.hidden_size, ours.intermediate_size) == (vision.embed_dim, 3584, 4 * vision.embed_dim)


@pytest.mark.parametrize(
    ("section", "changes", "sentence"),
    [
        ("text_config", {"attention_bias": True}, "attention_bias is true"),
        ("vision_config", {"num_position_embeddings": 24}, "num_position_embeddings 24 is no square number"),
        ("vision_config", {"hidden_act": "silu"}, "hidden_act of the vision tower is 'silu'; Qwen3-VL has 'gelu_pytorch_tanh'"),
    ],
)
def test_what_qwen3_vl_does_not_support_is_refused(section, changes, sentence):
    hf = hf_oracle.config_json(REFERENCES["3-tied"])
    with pytest.raises(ValueError, match=sentence):
        read_config(hf | {section: hf[section] | changes})


def test_settings_of_a_config_are_read_wherever_they_may_stand():
    hf = hf_oracle.config_json(REFERENCES["untied"], older=True)

    def read(**changes):
        return read_config(hf | changes).text

    rope = {"type": "default", "mrope_section": [2, 3, 3]}
    assert read(rope_theta=5.0).rope_theta == 5 and read(rope_scaling=rope | {"rope_theta": 7}).rope_theta == 7
    assert read(rms_norm_eps=0.5).rms_norm_eps == 0.5 and read(num_key_value_heads=None).num_kv_heads == 4
    assert not read().tie_word_embeddings and read(tie_word_embeddings=True).tie_word_embeddings
    newer = hf_oracle.config_json(REFERENCES["untied"])
    newer = {name: value for name, value in newer.items() if name != "tie_word_embeddings"}
    newer["text_config"]["tie_word_embeddings"] = True
    assert read_config(newer).text.tie_word_embeddings
    hf["vision_config"]["hidden_act"] = "gelu"
    with pytest.raises(ValueError, match="hidden_act of the vision tower is 'gelu'; Qwen2-VL has 'quick_gelu'"):
        read_config(hf)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("config.json", "holds no config.json"),
        ("model.safetensors", "neither model.safetensors nor model.safetensors.index.json"),
    ],
)
def test_a_missing_file_is_named(folder, name, sentence):
    (folder / name).unlink()
    with pytest.raises(ValueError, match=sentence):
        checkpoint.load(folder)


def test_a_missing_shard_is_named(tmp_path):
    folder = save_checkpoint(REFERENCES["untied"], tmp_path, shards=3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(ValueError, match="the index names model-00002-of-00003.safetensors, which is not there"):
        checkpoint.load(folder)


def test_a_truncated_weight_file_is_named(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ValueError, match="model.safetensors is not a readable safetensors file"):
        checkpoint.load(folder)


def test_a_path_that_is_neither_folder_nor_hub_id_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is neither a folder nor a hub id"):
        checkpoint.resolve(str(tmp_path / "nothing here"))
    assert checkpoint.resolve(str(tmp_path)) == tmp_path


def test_of_a_hub_id_only_what_is_needed_is_downloaded(monkeypatch, tmp_path):
    asked = []

    def download(name, allow_patterns, ignore_patterns):
        asked.append((name, [file for file in files if any(fnmatch(file, pattern) for pattern in allow_patterns)]))
        assert ignore_patterns == ["*/*"]
        return str(tmp_path)

    kept = ["config.json", "tokenizer.json", "vocab.json", "preprocessor_config.json", "generation_config.json"]
    weights = ["model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json"]
    files = [*kept, *weights, "pytorch_model.bin", "README.md", "consolidated.safetensors"]
    monkeypatch.setattr(checkpoint, "snapshot_download", download)
    assert checkpoint.resolve("Qwen/Qwen2-VL-2B") == checkpoint.resolve("Qwen/Qwen2-VL-2B", weights=False) == tmp_path
    assert asked == [("Qwen/Qwen2-VL-2B", kept + weights), ("Qwen/Qwen2-VL-2B", kept)]
