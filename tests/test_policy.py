"""A policy is made as the settings say."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest
from conftest import small_config
from flax import nnx

from imagent_jax.data.pipeline import open_tasks
from imagent_jax.model import lora
from imagent_jax.model.config import VisionConfig
from imagent_jax.rollout import policy
from imagent_jax.rollout.policy import Policy, check_images, model_settings, training_mesh
from imagent_jax.tiny.base import base_folder


@pytest.mark.slow(4)
def test_parts_are_made_as_the_settings_say(tmp_path):
    cfg = small_config(
        run={"seed": 5}, lora={"rank": 3, "alpha": 6.0, "targets": ["q_proj"], "merger": True},
        tools={"names": ["visual_confirmation"]},
        model={"param_dtype": "bfloat16", "remat": "dots", "logprob_chunk": 123}, images={"vision_block": 100},
        data={"train_size": 64, "test_size": 32, "cache_dir": str(tmp_path / "data"), "seed": 3}, eval={"seed": 1},
    )  # fmt: skip
    made = Policy(cfg)
    assert (made.model.remat, made.model.logprob_chunk, made.model.vision_block) == ("dots", 123, 100)
    assert made.tools.names == ("visual_confirmation",) or list(made.tools.names) == ["visual_confirmation"]
    assert made.params["text"]["embed"][...].dtype == "bfloat16" and made.folder == base_folder()
    adapters = adapters_of(made)
    assert {path.removesuffix("_lora_a").removesuffix("_lora_b") for path in adapters} == {
        "text/layers/q", "vision/merge_fc1", "vision/merge_fc2"}  # fmt: skip
    assert all(3 in x.shape and x.dtype == "float32" for x in adapters.values())
    lora.save(tmp_path / "adapter", made.model, made.params)
    written = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (written["r"], written["lora_alpha"]) == (3, 6.0)
    other = adapters_of(Policy(replace(cfg, run=replace(cfg.run, seed=6))))
    assert not np.array_equal(other["text/layers/q_lora_a"], adapters["text/layers/q_lora_a"])
    again = Policy(replace(cfg, lora=replace(cfg.lora, path=str(tmp_path / "adapter"), rank=9)))  # what is there counts
    assert all(np.array_equal(x, adapters[path]) for path, x in adapters_of(again).items())
    assert [task.uid for task in made.test_tasks(40)] == [task.uid for task in open_tasks(cfg.data, "test")]


@pytest.mark.slow(3)
def test_rollouts_may_not_overlap_with_adapters_of_the_tower_from_files(tmp_path):
    made = Policy(small_config(lora={"rank": 2, "targets": ["q_proj"], "merger": True}))
    lora.save(tmp_path, made.model, made.params)
    with pytest.raises(ValueError, match="rollout.overlap is for a tower that stays as it is, but its adapters are trained"):
        Policy(small_config(lora={"path": str(tmp_path)}, rollout={"overlap": True}))
    store = Policy(small_config(lora={"path": str(tmp_path)})).collector._engine(made.params, 1, 1).store
    assert not store.frozen  # the trainer encodes its packs again, in one size


def refused(vision: VisionConfig, **changes) -> str:
    with pytest.raises(ValueError) as error:
        check_images(changed(changes), vision)
    return str(error.value)


def changed(changes: dict[str, int]):
    """A configuration whose images may be small, but for the changes."""
    least = {"images__min_pixels": 1, "tools__low_pixels": 1, "tools__confirm_min_pixels": 1}
    return small_config().changed({name.replace("__", "."): value for name, value in (least | changes).items()})


HIGHEST = ("images__max_pixels", "tools__high_pixels", "tools__confirm_max_pixels")


@pytest.mark.parametrize("high", HIGHEST)
@pytest.mark.parametrize(("patch", "merge"), [(14, 2), (16, 2), (8, 3)])
def test_images_fit_a_block_of_the_models_patches(high, patch, merge):
    vision = VisionConfig(1, 8, 8, 8, 1, patch_size=patch, spatial_merge_size=merge)
    whole, name = 108 * patch**2, high.replace("__", ".")  # the pixels of a block
    fits = {"images__vision_block": 108} | dict.fromkeys(HIGHEST, whole)
    check_images(changed(fits | {high: whole + patch**2 - 1}), vision)
    sentence = refused(vision, **fits | {high: whole + patch**2})
    assert sentence.startswith(f"{name} {whole + patch**2} allows 109 patches but images.vision_block holds 108; raise")
    assert refused(vision, **fits | {"images__vision_block": 109}) == (
        f"images.vision_block is 109; it must be a multiple of {merge**2}, the patches of one token."
    )


def adapters_of(parts) -> dict[str, np.ndarray]:
    found = nnx.split_state(parts.params, nnx.LoRAParam, ...)[0]
    return {"/".join(map(str, path)): np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(found)}


def test_the_model_takes_its_settings_and_the_platform_those_that_are_automatic():
    cfg = small_config(model={"remat": "full", "logprob_chunk": 77}, images={"vision_block": 128})
    expected = {"remat": "full", "logprob_chunk": 77, "vision_block": 128}
    for platform, dtype, attention in (("cpu", "float32", "xla"), ("gpu", "bfloat16", "cudnn"), ("tpu", "bfloat16", "splash")):
        assert model_settings(cfg, platform) == expected | {"dtype": dtype, "attention": attention}
    told = small_config(model={"dtype": "float32", "attention": "xla"})
    assert model_settings(told, "tpu").items() >= {"dtype": "float32", "attention": "xla"}.items()


def test_overlap_is_for_one_device_and_the_mesh_is_what_was_asked_for(monkeypatch):
    two, checked = [jax.devices()[0]] * 2, []
    monkeypatch.setattr(policy.processes, "check_mesh", checked.append)
    mesh = training_mesh(small_config(mesh={"data": -1}), two)
    assert dict(mesh.shape) == {"data": 2, "fsdp": 1, "tensor": 1} and checked == [mesh]
    assert dict(training_mesh(small_config(mesh={"fsdp": 2}), two).shape)["fsdp"] == 2
    training_mesh(small_config(rollout={"overlap": True}))
    with pytest.raises(ValueError, match="rollout.overlap is for one device"):
        training_mesh(small_config(mesh={"data": 2}, rollout={"overlap": True}), two)
