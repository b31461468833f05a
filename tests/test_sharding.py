"""A checkpoint over a mesh: every device gets its slice only, the model computes the same, bad meshes are one sentence."""

import json
import tracemalloc
from pathlib import Path

import hf_oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hf_oracle import ODD_SIZES, config_json, interleave, random_image, save_checkpoint, tiny_model
from jax.sharding import AbstractMesh, PartitionSpec
from rounding import assert_rounded
from safetensors.numpy import load_file
from simulated import TOGETHER, start
from test_model_parity import BLOCK, batch, pack

from imagent_jax.distributed.mesh import fitting, make_mesh, shard_count
from imagent_jax.model import checkpoint
from imagent_jax.model.families import read_config
from imagent_jax.model.sharding import check_heads, rollout_params, shardings
from imagent_jax.model.vlm import abstract, create

SCRIPT = Path(__file__).parent / "sharded_loading.py"
WITH_DEVICES = pytest.mark.slow(6)  # a fifth of what `report` takes


REFERENCES = {family: tiny_model(heads=4, kv_heads=2, tied=False, family=family) for family in ("qwen2_vl", "qwen3_vl")}


@pytest.fixture(scope="module", params=REFERENCES)
def reference(request):
    return REFERENCES[request.param]


@pytest.fixture(scope="module")
def folder(reference, tmp_path_factory):
    """A checkpoint with the tensor names of the hub's files."""
    older = reference.config.model_type == "qwen2_vl"
    return save_checkpoint(reference, tmp_path_factory.mktemp("hf") / "model", older=older)


@pytest.fixture(scope="module")
def prompts(folder):
    """Three prompts with two images each, saved for `sharded_loading.py`."""
    rng = np.random.default_rng(0)
    images = [random_image(rng, size) for size in ODD_SIZES[:2]]
    texts = [rng.integers(1, 100, n).tolist() for n in (5, 30, 11)]
    samples = [(interleave([text[:2], images[0], text[2:4], images[1], text[4:]]), images) for text in texts]
    (patches, coords, image_id), first = pack(images)
    b = batch(samples, first * 3)
    np.savez(folder / "prompts.npz", patches=patches, coords=coords, image_id=image_id, block=BLOCK, ids=b.ids,
             positions=b.positions, vision=b.vision, length=b.length)  # fmt: skip
    return samples


@pytest.fixture(scope="module")
def report(folder, prompts):
    """What `sharded_loading.py` found on eight simulated devices."""
    process = start(8, SCRIPT, folder)
    out, error = process.communicate(timeout=TOGETHER)
    assert process.returncode == 0, error[-3000:]
    found = json.loads(out.splitlines()[-1])
    assert found["devices"] == 8
    return found


@WITH_DEVICES
def test_no_device_ever_holds_a_whole_matrix(report):
    for found in report["meshes"]:
        for name, (axes, held, split) in found["shares"].items():
            assert held == pytest.approx(1 / split), (found["mesh"], name)
            assert axes < 2 or held < 1, (found["mesh"], name)


@WITH_DEVICES
def test_a_sharded_model_computes_the_same_logits(report, reference, folder, prompts):
    exact, mask = hf_oracle.logits(hf_oracle.exact(reference), prompts)
    exact = exact[np.arange(3), mask.sum(1) - 1]
    found = np.load(folder / "logits.npy")
    assert exact.std() > 0.3 and len(found) == 1 + len(report["meshes"])
    for ours, mesh in zip(found, [None, *(found["mesh"] for found in report["meshes"])], strict=True):
        assert_rounded(ours, exact, hf_oracle.terms(reference), note=mesh)


@WITH_DEVICES
def test_every_slice_of_a_parameter_is_read_once_however_many_devices_keep_it(report):
    for found in report["meshes"]:
        assert found["reads"] == {name: split for name, (_, _, split) in found["shares"].items()}, found["mesh"]


@WITH_DEVICES
def test_a_sharded_model_is_saved_to_the_same_bits(report, folder):
    for i in range(len(report["meshes"])):
        saved = load_file(Path(f"{folder}-{i}") / "model.safetensors")
        given = load_file(folder / "model.safetensors")
        assert len(saved) == len(given)
        for name, tensor in saved.items():
            assert (tensor == given[name]).all(), name


@pytest.mark.slow(8)
def test_the_host_holds_one_parameter_at_a_time_and_a_tenth_more(tmp_path, monkeypatch):
    hf = config_json(tiny_model(tied=True))
    text = hf["text_config"] | {"vocab_size": 20_000, "num_hidden_layers": 16, "intermediate_size": 1024}
    model, params = create(read_config(hf | {"text_config": text}))
    checkpoint.save(tmp_path, model, params)
    read, held = checkpoint._read, {}

    def measured(key, *args):
        tracemalloc.start()
        out = read(key, *args)
        held[key] = tracemalloc.get_traced_memory()[1], out.nbytes
        tracemalloc.stop()
        return out

    monkeypatch.setattr(checkpoint, "_read", measured)
    _, loaded = checkpoint.load(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    assert max(size for _, size in held.values()) > 4_000_000
    assert {key: sizes for key, sizes in held.items() if sizes[0] > 1.1 * sizes[1] + 100_000} == {}


# ---- the table of axes -------------------------------------------------------------------------------------------------

SPLIT = {  # the mesh axis of each axis of a parameter, after that of the layers
    "text": {
        "embed": ("tensor", "fsdp"), "lm_head": ("fsdp", "tensor"), "norm": (None,), "input_norm": (None,), "post_norm": (None,),
        **dict.fromkeys(("q", "k", "v", "gate", "up"), ("fsdp", "tensor")), **dict.fromkeys(("o", "down"), ("tensor", "fsdp")),
        **dict.fromkeys(("q_bias", "k_bias", "v_bias"), ("tensor",)), **dict.fromkeys(("q_norm", "k_norm"), (None,)),
    },
    "vision": {
        "patch_embed": (None, "fsdp"), **dict.fromkeys(("norm1", "norm2", "norm1_bias", "norm2_bias"), (None,)),
        **dict.fromkeys(("qkv", "fc1", "gate", "up", "merge_fc1"), ("fsdp", "tensor")),
        **dict.fromkeys(("proj", "fc2", "down", "merge_fc2"), ("tensor", "fsdp")),
        **dict.fromkeys(("qkv_bias", "fc1_bias", "gate_bias", "up_bias", "merge_fc1_bias"), ("tensor",)),
        **dict.fromkeys(("proj_bias", "fc2_bias", "down_bias", "merge_fc2_bias", "merge_norm", "merge_norm_bias"), (None,)),
        "position": (None, "fsdp"), **dict.fromkeys(("patch_embed_bias", "norm", "norm_bias"), (None,)),
    },
}  # fmt: skip


@pytest.mark.parametrize("family", hf_oracle.FAMILIES)
def test_every_parameter_is_split_as_the_table_says(family):
    cfg, mesh = read_config(config_json(tiny_model(family=family))), described(2, 2, 2)
    _, shapes = abstract(cfg)
    copied = jax.eval_shape(lambda params: rollout_params("bfloat16", params), shapes)
    for tree, whole in ((shapes, ()), (shapes, ("fsdp",)), (copied, ("fsdp",))):
        for path, place in shardings(tree, mesh, whole).flat_state():
            expected = tuple(None if axis in whole else axis for axis in SPLIT[path[0]][path[-1]])
            value, stacked = place.get_value(), (None,) * (path[1] in ("layers", "blocks", "deep"))
            if tree is copied and path[1] == "layers":
                assert [one.spec for one in value] == [PartitionSpec(*expected)] * cfg.text.num_layers
            else:
                assert value.spec == PartitionSpec(*stacked, *expected), path
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(copied))


def test_what_does_not_divide_stays_whole():
    with jax.sharding.use_abstract_mesh(described(2, 3, 4)):
        assert [shard_count(axes) for axes in (None, "fsdp", ("data", "fsdp"), ("data", "tensor"), "other")] == [1, 3, 6, 8, 1]
        x = jnp.zeros((12, 9, 8))
        assert fitting(x, ("data", "fsdp"), "tensor", "tensor") == PartitionSpec(("data", "fsdp"), None, "tensor")
        assert fitting(x, "fsdp") == PartitionSpec("fsdp") and fitting(x, "other") == PartitionSpec("other")


@WITH_DEVICES
def test_a_mesh_takes_what_is_left_or_just_the_first_devices(report):
    assert report["shapes"] == [
        {"data": 4, "fsdp": 1, "tensor": 2}, {"data": 2, "fsdp": 1, "tensor": 4}, {"data": 1, "fsdp": 1, "tensor": 2},
    ]  # fmt: skip


# ---- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "sentence"),
    [
        ({"fsdp": 3}, r"mesh.data=1, mesh.fsdp=3, mesh.tensor=1 needs 3 devices a copy, .* the 8 there are; choose sizes"),
        ({"data": -1, "tensor": 16}, "needs 16 devices a copy, which does not divide the 8 there are"),
        ({"data": -1, "fsdp": -1}, "at most one may be -1"),
        ({"data": 0}, "every axis must be at least 1"),
    ],
)
def test_a_mesh_that_does_not_divide_the_devices_is_refused(sizes, sentence):
    with pytest.raises(ValueError, match=sentence) as error:
        make_mesh(**sizes, devices=jax.devices() * 8)
    assert len(str(error.value).splitlines()) == 1


def described(data: int = 1, fsdp: int = 1, tensor: int = 1) -> AbstractMesh:
    """The shape of a mesh, without its devices."""
    return AbstractMesh((data, fsdp, tensor), ("data", "fsdp", "tensor"))


def test_a_mesh_axis_that_does_not_divide_the_heads_is_refused():
    cfg = read_config(config_json(tiny_model(heads=4, kv_heads=2)))
    check_heads(cfg, described(tensor=2))
    for size, what in ((4, "2 key heads of the decoder"), (3, "4 query heads of the decoder")):
        with pytest.raises(ValueError, match=f"mesh.tensor={size} does not divide the {what}; choose mesh.tensor from 1, 2"):
            check_heads(cfg, described(tensor=size))
    cfg = read_config(config_json(tiny_model(heads=4, kv_heads=4)))
    with pytest.raises(ValueError, match="mesh.tensor=4 does not divide the 2 heads of the vision tower; choose .* from 1, 2"):
        check_heads(cfg, described(tensor=4))


def test_a_mesh_axis_that_does_not_divide_a_matrix_is_refused():
    _, shapes = abstract(read_config(config_json(tiny_model())))
    with pytest.raises(ValueError, match="axis 'embed' of size 64 does not divide by mesh.fsdp=7; choose a mesh.fsdp"):
        shardings(shapes, described(fsdp=7))


def test_a_mesh_of_one_device_is_a_mesh(folder):
    model, params = checkpoint.from_pretrained(folder, mesh=make_mesh(), progress=False).split()
    assert model.dtype == "float32"
    assert all(leaf.sharding.mesh.shape == {"data": 1, "fsdp": 1, "tensor": 1} for leaf in jax.tree.leaves(params))
