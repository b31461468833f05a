"""A run's checkpoint becomes a complete Hugging Face model, bit for bit; bad input is one sentence and writes nothing."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import tiny_config
from flax import nnx
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer

from imagent_jax.model import checkpoint
from imagent_jax.runs import export as job
from imagent_jax.runs.folder import RunFolder
from imagent_jax.tiny.base import base_folder


def same(a, b) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of the tiny base on several devices, its checkpoints 2 and 5 on another disk, of the base plus the step."""
    folder = tmp_path_factory.mktemp("runs")
    _, params = checkpoint.load(base_folder())
    frozen = {"vision": params["vision"]}  # a run's checkpoints hold what it trains
    states = {step: jax.tree.map(lambda x, step=step: x + step, params["text"]) for step in (2, 5)}
    elsewhere = {"dir": str(folder), "name": "one", "checkpoint_dir": str(folder / "disk")}
    runs = RunFolder(tiny_config({"run": elsewhere, "mesh": {"data": 4}}))  # more devices than there are here
    for step, state in states.items():
        runs.save(step, nnx.State({"text": state}), {"count": jnp.zeros(3)}, {"step": step})
    runs.close()
    return folder / "one", {step: nnx.State({"text": state, **frozen}) for step, state in states.items()}


@pytest.mark.parametrize("step", [None, 2])
def test_the_exported_model_is_the_checkpoint(run, tmp_path, capsys, step):
    path, states = run
    assert job.main([str(path), str(tmp_path / "out"), *([] if step is None else ["--step", str(step)])]) == 0
    assert same(checkpoint.load(tmp_path / "out")[1], states[step or 5])
    shown = " ".join(capsys.readouterr().out.split())
    named = "the newest checkpoint" if step is None else f"checkpoint {step}"
    assert shown.startswith(f"Exports {named} of {path} (tiny).") and f"Wrote step {step or 5}: " in shown
    files = sorted((tmp_path / "out").iterdir())
    weights = [file for file in files if file.suffix == ".safetensors"]
    gigabytes = sum(file.stat().st_size for file in weights) / 1e9
    assert f"{gigabytes:.3f} GB in 1 weight file(s), {len(files) - 1} others, float32, " in shown and len(weights) == 1


def test_transformers_loads_what_is_exported(run, tmp_path):
    out = tmp_path / "out"
    assert job.main([str(run[0]), str(out), "--dtype", "bfloat16", "--max-shard-size", "500KB"]) == 0
    assert len(list(out.glob("*.safetensors"))) > 2 and (out / "generation_config.json").is_file()
    model = AutoModelForImageTextToText.from_pretrained(out)
    assert str(model.dtype) == "torch.bfloat16" and model.generation_config.eos_token_id == 1027
    ours = np.asarray(run[1][5]["text"]["embed"][...].astype("bfloat16").astype("float32"))
    assert np.array_equal(model.get_input_embeddings().weight.detach().float().numpy(), ours)
    assert AutoConfig.from_pretrained(out).text_config.to_dict() | {"dtype": None} == (
        AutoConfig.from_pretrained(base_folder()).text_config.to_dict() | {"dtype": None}
    )
    assert AutoTokenizer.from_pretrained(out).get_vocab() == AutoTokenizer.from_pretrained(base_folder()).get_vocab()
    assert "chat_template" in (out / "tokenizer_config.json").read_text() or list(out.glob("chat_template*"))
    assert json.loads((out / "preprocessor_config.json").read_text())["patch_size"] == 14


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["{run}", "{out}", "--step", "3"], "holds no finished checkpoint 3; there are 2, 5"),
        (["{out}", "{out}2"], "is not a run, it holds no config.yaml"),
        (["{run}", "{run}"], "is not an empty folder; name a new one"),
        (["{run}", "{run}/config.yaml"], "is there already and is not an empty folder"),
    ],
)
def test_bad_input_is_one_sentence_and_writes_nothing(run, tmp_path, capsys, flags, sentence):
    out = tmp_path / "out"
    assert job.main([flag.format(run=run[0], out=out) for flag in flags]) == 2
    error = capsys.readouterr().err.strip()
    assert sentence in error and len(error.splitlines()) == 1
    assert not out.exists()
