"""A checkpoint over a mesh: every device gets its slice only, the model computes the same, bad meshes are one sentence."""

import json
import tracemalloc
from pathlib import Path

import jax
import pytest
from hf_oracle import config_json, save_checkpoint, tiny_model
from safetensors.numpy import load_file
from simulated import TOGETHER, start

from imagent_jax.model import checkpoint
from imagent_jax.model.config import Qwen2VLConfig
from imagent_jax.model.qwen2_vl import Qwen2VL, abstract, create
from imagent_jax.model.sharding import check_heads, make_mesh, shardings

SCRIPT = Path(__file__).parent / "sharded_loading.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_checkpoint(tiny_model(heads=4, kv_heads=2, tied=False), tmp_path_factory.mktemp("hf") / "model", older=True)


@pytest.fixture(scope="module")
def report(folder):
    """What `sharded_loading.py` found on eight simulated devices."""
    process = start(8, SCRIPT, folder)
    out, error = process.communicate(timeout=TOGETHER)
    assert process.returncode == 0, error[-3000:]
    found = json.loads(out.splitlines()[-1])
    assert found["devices"] == 8
    return found


def test_no_device_ever_holds_a_whole_matrix(report):
    for found in report["meshes"]:
        for name, (axes, held, split) in found["shares"].items():
            assert held == pytest.approx(1 / split), (found["mesh"], name)
            assert axes < 2 or held < 1, (found["mesh"], name)


def test_a_sharded_model_computes_the_same_logits(report):
    assert report["spread"] > 0.3
    for found in report["meshes"]:
        assert found["difference"] < 1e-5, found["mesh"]


def test_a_sharded_model_is_saved_to_the_same_bits(report, folder):
    for i in range(len(report["meshes"])):
        saved = load_file(Path(f"{folder}-{i}") / "model.safetensors")
        given = load_file(folder / "model.safetensors")
        assert len(saved) == len(given)
        for name, tensor in saved.items():
            assert (tensor == given[checkpoint.older_name(name)]).all(), name


def test_the_host_holds_one_parameter_at_a_time_and_a_tenth_more(tmp_path, monkeypatch):
    hf = config_json(tiny_model(tied=True))
    text = hf["text_config"] | {"vocab_size": 20_000, "num_hidden_layers": 16, "intermediate_size": 1024}
    checkpoint.save(tmp_path, *create(Qwen2VLConfig.from_hf(hf | {"text_config": text})))
    read, held = checkpoint._read, {}

    def measured(key, *args):
        tracemalloc.start()
        out = read(key, *args)
        held[key] = tracemalloc.get_traced_memory()[1], out.nbytes
        tracemalloc.stop()
        return out

    monkeypatch.setattr(checkpoint, "_read", measured)
    checkpoint.load(tmp_path)
    assert max(size for _, size in held.values()) > 4_000_000
    assert {key: sizes for key, sizes in held.items() if sizes[0] > 1.1 * sizes[1] + 100_000} == {}


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


class Mesh2:
    """The shape of a mesh, without its devices."""

    def __init__(self, **sizes):
        self.shape = {"data": 1, "fsdp": 1, "tensor": 1} | sizes


def test_a_mesh_axis_that_does_not_divide_the_heads_is_refused():
    cfg = Qwen2VLConfig.from_hf(config_json(tiny_model(heads=4, kv_heads=2)))
    check_heads(cfg, Mesh2(tensor=2))
    for size, what in ((4, "2 key heads of the decoder"), (3, "4 query heads of the decoder")):
        with pytest.raises(ValueError, match=f"mesh.tensor={size} does not divide the {what}; choose mesh.tensor from 1, 2"):
            check_heads(cfg, Mesh2(tensor=size))


def test_a_mesh_axis_that_does_not_divide_a_matrix_is_refused():
    _, shapes = abstract(Qwen2VLConfig.from_hf(config_json(tiny_model())))
    with pytest.raises(ValueError, match="axis 'embed' of size 64 does not divide by mesh.fsdp=7; choose a mesh.fsdp"):
        shardings(shapes, Mesh2(fsdp=7))


def test_a_mesh_of_one_device_is_a_mesh(folder):
    model, params = Qwen2VL.from_pretrained(folder, mesh=make_mesh(), progress=False).split()
    assert model.dtype == "float32"
    assert all(leaf.sharding.mesh.shape == {"data": 1, "fsdp": 1, "tensor": 1} for leaf in jax.tree.leaves(params))
