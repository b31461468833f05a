"""Where attention goes: the shares equal a plain softmax and transformers' own, and cost nothing where nobody asks."""

import json

import hf_oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from hf_oracle import IMAGE, ODD_SIZES, interleave, pixel_values, random_image, tiny_model
from test_model_parity import BLOCK, batch, pack

from imagent_jax import attention as job
from imagent_jax.config import Config
from imagent_jax.model import checkpoint, text
from imagent_jax.model.attention import Causal, attention, attention_shares, cached
from imagent_jax.model.params import gathered, weights
from imagent_jax.model.qwen2_vl import attention_by_source, encode_images
from imagent_jax.model.sharding import GROUPS, constrain
from imagent_jax.runs import RunFolder


def divided(rng, rows, tokens, sources=4):
    """Every token of one source, at random: bool[N S C]."""
    return np.eye(sources, dtype=bool)[rng.integers(0, sources, (rows, tokens))]


@pytest.mark.parametrize("tokens", [37, 256, 300])  # within one block of queries, just one, and over its edge
def test_shares_equal_a_plain_softmax_and_sum_to_one(tokens):
    rng = np.random.default_rng(tokens)
    q, k = (rng.normal(size=(2, tokens, heads, 16)).astype(np.float32) * 2 for heads in (4, 2))
    length, source = np.array([tokens, tokens - 9], np.int32), divided(rng, 2, tokens)
    found = np.asarray(attention_shares(jnp.asarray(q), jnp.asarray(k), jnp.asarray(length), jnp.asarray(source)))
    for n in range(2):
        s = length[n]
        expected = np.zeros((s, 4))
        for head in range(4):
            scores = q[n, :s, head].astype(np.float64) @ k[n, :s, head // 2].T / 4
            scores[np.triu_indices(s, 1)] = -np.inf
            likely = np.exp(scores - scores.max(-1, keepdims=True))
            expected += likely / likely.sum(-1, keepdims=True) @ source[n, :s] / 4
        np.testing.assert_allclose(found[n, :s], expected, atol=1e-5)
        np.testing.assert_allclose(found[n, :s].sum(-1), 1, atol=1e-5)
        assert not found[n, s:].any()


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """transformers' tiny random model, and ours loaded from its checkpoint."""
    reference = tiny_model(seed=5)
    folder = hf_oracle.save_checkpoint(reference, tmp_path_factory.mktemp("checkpoint"))
    return reference, *checkpoint.load(folder, vision_block=BLOCK)


def test_shares_equal_those_of_transformers_eager_attention(pair):
    reference, model, params = pair
    rng = np.random.default_rng(0)
    images = [random_image(rng, size) for size in ODD_SIZES]
    ids = interleave([rng.integers(1, 100, 5).tolist(), *images, rng.integers(1, 100, 12).tolist()])
    patches, grid = pixel_values(images)
    row, source = torch.tensor([ids]), divided(rng, 1, 96)
    reference.set_attn_implementation("eager")
    with torch.no_grad():
        theirs = reference(input_ids=row, pixel_values=patches, image_grid_thw=grid, use_cache=False,
                           mm_token_type_ids=(row == IMAGE).int(), output_attentions=True).attentions  # fmt: skip
    packed, first = pack(images)
    b, s = batch([(ids, images)], first), len(ids)
    features = jax.jit(encode_images, static_argnums=0)(model, params, *packed)
    shares = jax.jit(attention_by_source, static_argnums=0)
    ours = np.asarray(shares(model, params, b.ids, b.positions, b.vision, b.length, features, source))
    assert ours.shape == (len(theirs), 1, 96, 4) == (3, 1, 96, 4)
    for layer, weight in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(layer[0, :s], weight[0].mean(0).numpy() @ source[0, :s], atol=1e-5)
    assert np.ptp(ours[:, 0, s // 2 : s], axis=1).min() > 0.05  # no flat attention, which any code would match


def plain_prefill(self, x, positions, prompt_len=None, backend="xla"):
    """`Decoder.prefill` with nothing to measure in it."""
    rope, dtype = self._rope(positions), x.dtype

    def layer(x, w):
        w = gathered(self.layers, w)
        q, k, v = self._qkv(w, x, rope)
        x = self._finish(w, x, attention(q, k, v, Causal(prompt_len), backend=backend))
        return constrain(x, GROUPS), cached(k, v)

    x, layers, kept = constrain(x, GROUPS), weights(self.layers, dtype), []
    for i in range(self.cfg.num_layers):
        x, one = layer(x, text.layer_of(layers, i))
        kept.append(one)
    hidden = text.rms_norm(x, weights(self, dtype)["norm"], self.cfg.rms_norm_eps)
    return hidden, text.PromptCache(*zip(*kept, strict=True))


def test_the_compiled_program_without_the_hook_is_unchanged(pair):
    _, model, params = pair
    x, positions, length = jnp.zeros((2, 24, 64)), jnp.zeros((3, 2, 24), jnp.int32), jnp.array([24, 20])

    def program(method, *more):
        def prefill(params, x, positions, length):
            return method(model.bind(params).text, x, positions, length, "xla", *more)

        return jax.jit(prefill).lower(params, x, positions, length).compile()

    ours, plain = program(text.Decoder.prefill), program(plain_prefill)
    assert ours.cost_analysis()["flops"] == plain.cost_analysis()["flops"]

    def instructions(compiled):  # without the places in the source that they come from
        return [line.partition(", metadata=")[0] for line in compiled.as_text().splitlines() if " = " in line]

    assert instructions(ours) == instructions(plain) and len(instructions(plain)) > 50
    measured = program(text.Decoder.prefill, jnp.ones((2, 24, 1), bool))
    assert measured.cost_analysis()["flops"] > plain.cost_analysis()["flops"]


def test_every_token_has_its_source(parts, rollout):
    im_start = parts.processor.im_start_id
    n, g = next((n, g) for n, group in enumerate(rollout.trajectories) for g, t in enumerate(group) if t.executed_calls)
    prompt, t = rollout.prompts[n], rollout.trajectories[n][g]
    source = job.sources_of(rollout, n, g, np.flatnonzero(prompt.ids == im_start)[1])
    own, names = np.concatenate([prompt.ids, t.ids]), np.array(job.SOURCES)[source]
    said = {name: parts.processor.decode(own[names == name]) for name in job.SOURCES}
    assert said["instructions"].startswith("<|im_start|>system") and said["instructions"].endswith("<|im_end|>\n")
    assert rollout.tasks[n].question in said["question"] and "<|im_start|>user" in said["question"]
    assert set(own[names == "given images"]) == set(own[names == "observation images"]) == {rollout.image_token_id}
    assert "<tool_response>" in said["observation text"] and "tool_call" not in said["observation text"]
    assert said["earlier output"] == "".join(turn.text for turn in t.turns)


def test_a_question_about_one_image_is_asked_of_it_alone(tasks):
    task = next(t for t in map(job.about_one_image, tasks) if t)
    whole = next(t for t in tasks if task.uid.startswith(t.uid))
    assert len(task.images) == 1 < len(whole.images) and "Image 1" in task.question
    named = int(whole.question.partition("Image ")[2][0])
    assert task.images[0] == whole.images[named - 1] and task.answer == whole.answer


def test_the_command_measures_the_tiny_base_with_and_without_tools(tmp_path):
    out = tmp_path / "attention.png"
    assert job.main(["tiny", "--tasks", "4", "--out", str(out)]) == 0
    record = json.loads(out.with_suffix(".json").read_text())
    assert out.read_bytes().startswith(b"\x89PNG") and record["tasks"] == 4
    assert list(record["conditions"]) == ["several images, tools", "several images, no tools", "one image, tools",
                                          "one image, no tools"]  # fmt: skip
    for name, found in record["conditions"].items():
        for part in ("turn", "position"):
            columns = np.array([found[part][source] for source in job.SOURCES])
            np.testing.assert_allclose(columns.sum(0), 1, atol=1e-4)
        assert found["position"]["rollouts"][0] == 4 and found["position"]["earlier output"][0] < 0.5
        if name.endswith("no tools"):
            assert found["calls"] == 0 == found["all"]["observation images"]
    assert record["conditions"]["several images, tools"]["all"]["observation images"] > 0


def test_a_run_is_measured_at_its_newest_checkpoint(parts, tmp_path):
    runs = RunFolder(Config.from_dict({"run": {"dir": str(tmp_path), "name": "one"}}))
    for step in (2, 5):
        trained = nnx.State({"text": jax.tree.map(lambda x, step=step: x + step, parts.params["text"])})
        runs.save(step, trained, {"count": jnp.zeros(3)}, {"step": step})
    runs.close()
    loaded = job.load(str(tmp_path / "one")).params
    np.testing.assert_array_equal(loaded["text"]["norm"][...], parts.params["text"]["norm"][...] + 5)
    np.testing.assert_array_equal(loaded["vision"]["patch_embed"][...], parts.params["vision"]["patch_embed"][...])


def test_bad_input_is_one_sentence(capsys, tmp_path):
    assert job.main([str(tmp_path / "nowhere")]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and "nowhere" in error and len(error.splitlines()) == 1
