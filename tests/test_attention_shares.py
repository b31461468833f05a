"""Where attention goes: the shares equal a plain softmax and transformers' own, and cost nothing where nobody asks."""

import json
from dataclasses import replace
from types import SimpleNamespace

import hf_oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conftest import tiny_config
from flax import nnx
from hf_oracle import IMAGE, ODD_SIZES, interleave, pixel_values, random_image, tiny_model
from rounding import assert_rounded
from test_model_parity import BLOCK, batch, pack

from imagent_jax.chat import QWEN
from imagent_jax.distributed.mesh import GROUPS, constrain
from imagent_jax.evals import attention as job
from imagent_jax.model import checkpoint, text
from imagent_jax.model.attention import Causal, attention, attention_shares, cached
from imagent_jax.model.params import gathered, weights
from imagent_jax.model.vlm import at_tokens, attention_by_source, encode_images
from imagent_jax.runs.folder import RunFolder

pytestmark = pytest.mark.slow(2)


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
        expected, scale = np.zeros((s, 4)), 1.0
        for head in range(4):
            scores = q[n, :s, head].astype(np.float64) @ k[n, :s, head // 2].T / 4
            scores[np.triu_indices(s, 1)] = -np.inf
            scale = max(scale, np.abs(scores[np.isfinite(scores)]).max())  # an error of a score is one of its weight
            likely = np.exp(scores - scores.max(-1, keepdims=True))
            expected += likely / likely.sum(-1, keepdims=True) @ source[n, :s] / 4
        assert_rounded(found[n, :s], expected, 16 + s, scale=scale)
        assert_rounded(found[n, :s].sum(-1), np.ones(s), s)
        assert not found[n, s:].any()


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """transformers' tiny random model, and ours loaded from its checkpoint."""
    reference = tiny_model(seed=5)
    folder = hf_oracle.save_checkpoint(reference, tmp_path_factory.mktemp("checkpoint"))
    return hf_oracle.exact(reference), *checkpoint.load(folder, vision_block=BLOCK)


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
    ours = np.asarray(
        shares(model, params, b.ids, b.positions, b.vision, b.length, jax.jit(at_tokens)(features, b.vision), source)
    )
    assert ours.shape == (len(theirs), 1, 96, 4) == (3, 1, 96, 4)
    for layer, weight in zip(ours, theirs, strict=True):
        assert_rounded(layer[0, :s], weight[0].mean(0).numpy() @ source[0, :s], hf_oracle.terms(reference))
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
            return method(model.bind(params).text, x, positions, length, *more)

        return jax.jit(prefill).lower(params, x, positions, length).compile()

    ours, plain = program(text.Decoder.prefill), program(plain_prefill)
    assert ours.cost_analysis()["flops"] == plain.cost_analysis()["flops"]

    def instructions(compiled):  # without the places in the source that they come from
        return [line.partition(", metadata=")[0] for line in compiled.as_text().splitlines() if " = " in line]

    assert instructions(ours) == instructions(plain) and len(instructions(plain)) > 50
    measured = program(text.Decoder.attention_by_source, jnp.ones((2, 24, 1), bool))
    assert measured.cost_analysis()["flops"] > plain.cost_analysis()["flops"]


def test_every_token_has_its_source(parts, rollout):
    im_start = parts.processor.encode(QWEN.turn_open)[0]
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


def test_one_image_is_what_a_question_names_however_often(tasks):
    task = replace(tasks[0], images=tasks[0].images[:2] * 6)

    def alone(question):
        return job.about_one_image(replace(task, question=question))

    for question in ("Which is larger?", "Image 1 or Image 2?", "In Image 0?", "In Image 13?"):
        assert alone(question) is None
    found = alone("Is Image 12 like Image 12?")
    assert found.question == "Is Image 1 like Image 1?" and found.images == (task.images[11],)
    assert alone("In Image 1?").images == task.images[:1] and found.uid == f"{task.uid}, one image"


def test_shares_of_more_rollouts_than_a_call_takes_are_those_of_each_alone(parts, rollout, config):
    user = [np.flatnonzero(prompt.ids == parts.processor.encode(QWEN.turn_open)[0])[1] for prompt in rollout.prompts]
    width = config.rollout.prompt_tokens + config.rollout.response_tokens
    found = job.shares_of(parts.model, parts.params, rollout, width, user)
    done = [(n, t) for n, group in enumerate(rollout.trajectories) for t in group]
    assert len(found) == len(done) == 16 > job.ROWS
    for shares, (n, t) in zip(found, done, strict=True):
        action = job.IS_ACTION[t.kind]
        assert shares.shape == (action.sum(), 6)
        assert_rounded(shares.sum(-1), np.ones(len(shares)), width)
        seen, names = rollout.prompt_vision[n] >= 0, list(job.SOURCES)
        assert (shares[:, names.index("given images")] > 0).all() == seen.any()
        shown = np.maximum.accumulate(t.vision >= 0)[action]  # something was shown before this token
        assert ((shares[:, names.index("observation images")] > 0) == shown).all()
        heard = np.maximum.accumulate(~action & (t.vision < 0))[action]
        assert ((shares[:, names.index("observation text")] > 0) == heard).all()
        assert (shares[:, names.index("earlier output")] > 0).all()  # a token sees itself
    one = replace(rollout, trajectories=[[], [], [], rollout.trajectories[3][2:3]])
    (alone,) = job.shares_of(parts.model, parts.params, one, width, user)
    assert_rounded(alone, found[14], width)


@pytest.mark.parametrize(("count", "positions", "turns"), [(2, 3, 2), (11, 2, 1)])
def test_shares_are_averaged_over_tokens_by_source_by_position_and_by_turn(parts, tasks, monkeypatch, count, positions, turns):
    """Two rollouts, of 2 + 1 and of 2 tokens, that look at one source a token; a tenth of 11 tasks is more than one of them."""

    def turn(start, stop):
        return SimpleNamespace(start=start, stop=stop)

    ids, asked = np.array([parts.processor.encode(QWEN.turn_open)[0], 7, 8, parts.processor.encode(QWEN.turn_open)[0], 9]), []
    done = [SimpleNamespace(executed_calls=2, turns=[turn(0, 2), turn(5, 6)]),
            SimpleNamespace(executed_calls=1, turns=[turn(0, 2)])]  # fmt: skip

    class Engine:
        def __init__(self, model, processor, tools, cfg):
            asked.append(([tool.name for tool in tools], cfg.tools.names))

        def collect(self, params, tasks, **options):
            asked.append(options)
            return SimpleNamespace(trajectories=[[t] for t in done], prompts=[SimpleNamespace(ids=ids)] * 2)

    def shares_of(model, params, rollout, width, user):
        asked.append((width, user))
        return [np.eye(6)[[0, 1, 2]], np.eye(6)[[0, 3]]]

    monkeypatch.setattr(job, "Collector", Engine)
    monkeypatch.setattr(job, "shares_of", shares_of)
    found = job.measure(parts, tasks[:1] * count, True, 5)
    names, r = parts.cfg.tools.names, parts.cfg.rollout
    slots = min(count, parts.cfg.eval.groups)
    assert asked == [
        (list(names), names), {"group_size": 1, "seed": 5, "temperature": r.temperature, "slots": slots},
        (r.prompt_tokens + r.response_tokens, [3, 3]),
    ]  # fmt: skip
    assert found["calls"] == 1.5 and list(found["all"].values()) == [0.4, 0.2, 0.2, 0.2, 0, 0]
    assert found["position"] == {
        **dict(zip(job.SOURCES, np.array([[1, 0, 0, 0, 0, 0], [0, 0.5, 0, 0.5, 0, 0], [0, 0, 1, 0, 0, 0]])[:positions].T.tolist(),
                   strict=True)),
        "rollouts": [2, 2, 1][:positions],
    }  # fmt: skip
    assert found["turn"] == {
        **dict(zip(job.SOURCES, np.array([[0.5, 0.25, 0, 0.25, 0, 0], [0, 0, 1, 0, 0, 0]])[:turns].T.tolist(), strict=True)),
        "rollouts": [2, 1][:turns],
    }  # fmt: skip
    asked.clear()
    job.measure(parts, tasks[:1] * count, False, 5)
    assert asked[0] == ([], ())


def test_the_command_passes_its_options_on(parts, monkeypatch, tmp_path, capsys):
    asked, shares = [], dict.fromkeys(job.SOURCES, 0.25) | {"given images": 0.5}

    def measure(parts, tasks, tools, seed):
        asked.append((len(tasks), {len(task.images) > 1 for task in tasks}, tools, seed))
        position = {name: [x] for name, x in shares.items()} | {"rollouts": [1]}
        return {"calls": 1.0, "all": shares, "turn": {}, "position": position}

    monkeypatch.setattr(job, "load_policy", {"a base": (parts, None)}.get)
    monkeypatch.setattr(job, "measure", measure)
    options = ["--tasks", "3", "--seed", "5", "--out", str(tmp_path / "a.png"), "--json", str(tmp_path / "b.json")]
    assert job.main(["a base", *options]) == 0
    assert asked == [(3, {True}, True, 5), (3, {True}, False, 5), (3, {False}, True, 5), (3, {False}, False, 5)]
    record = json.loads((tmp_path / "b.json").read_text())
    assert record["tasks"] == 3 and record["command"] == " ".join(["python -m imagent_jax.attention a base", *options])
    assert record["conditions"]["one image, no tools"]["all"] == shares and (tmp_path / "a.png").is_file()
    assert "one image, no tools: 50.0 % to given images, 25.0 % to observation images" in capsys.readouterr().out


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
            np.testing.assert_allclose(columns.sum(0), 1, atol=len(job.SOURCES) * 0.5e-5 + 1e-6)  # written to 5 digits
        assert found["position"]["rollouts"][0] == 4 and found["position"]["earlier output"][0] < 0.5
        if name.endswith("no tools"):
            assert found["calls"] == 0 == found["all"]["observation images"]
    assert record["conditions"]["several images, tools"]["all"]["observation images"] > 0


def test_a_run_is_measured_at_its_newest_checkpoint(parts, tmp_path):
    runs = RunFolder(tiny_config({"run": {"dir": str(tmp_path), "name": "one"}}))
    for step in (2, 5):
        trained = nnx.State({"text": jax.tree.map(lambda x, step=step: x + step, parts.params["text"])})
        runs.save(step, trained, {"count": jnp.zeros(3)}, {"step": step})
    runs.close()
    loaded = job.load_policy(str(tmp_path / "one"))[0].params
    np.testing.assert_array_equal(loaded["text"]["norm"][...], parts.params["text"]["norm"][...] + 5)
    np.testing.assert_array_equal(loaded["vision"]["patch_embed"][...], parts.params["vision"]["patch_embed"][...])


def test_bad_input_is_one_sentence(capsys, tmp_path):
    assert job.main([str(tmp_path / "nowhere")]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and "nowhere" in error and len(error.splitlines()) == 1
