"""Rollouts over Qwen's own vocabulary, in which "</tool_call>" is a token of some families only: text, turns and promises."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import small_config
from flax import nnx
from qwen_vocabulary import MARKERS, ROWS, qwen_processor
from scripted_run import play

from imagent_jax.chat import QWEN
from imagent_jax.model.families import read_config
from imagent_jax.model.interleave import encode_parts
from imagent_jax.model.vlm import create
from imagent_jax.rl.batch import check_images, pack_batch
from imagent_jax.rl.learner import LossSettings, batch_loss, score, shown_in
from imagent_jax.rl.mask import mask_tables
from imagent_jax.rollout import sampler
from imagent_jax.rollout.collect import Collector
from imagent_jax.tiny.world import task_at
from imagent_jax.tools import VISUAL_TOOLS, ToolSet
from imagent_jax.types import EndReason, Markup, TokenKind

TEXT, CALL, ANSWERED, SEEN = TokenKind.TEXT, TokenKind.TOOL_CALL, TokenKind.ANSWER, TokenKind.OBSERVATION
CROP = '<tool_call>{"name": "visual_confirmation", "arguments": {"image": 1, "bbox_2d": [100, 100, 600, 600]}}</tool_call>'
TURNS = ["Ich sehe 日本 🙂.\n" + CROP + "\n", "> So ein" + CROP, ">Es ist <answer>日 7</answer>!<|im_end|>"]
"""The first call ends in a token that goes on; later turns begin with what would complete "<|endoftext|"."""


def turns_of(family: str) -> list[str]:
    """What the policy says. A call that ends with a token of its own ends the turn there."""
    return TURNS if family == "Qwen2-VL" else [turn.removesuffix("\n") for turn in TURNS]


CONFIG = {
    "model_type": "qwen2_vl", "image_token_id": 151_655, "vision_start_token_id": 151_652, "vision_end_token_id": 151_653,
    "text_config": {
        "vocab_size": ROWS, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "rope_parameters": {"mrope_section": [4, 2, 2], "rope_theta": 1e4},
    },
    "vision_config": {"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2},
}  # fmt: skip


def collector_of(model, family: str, response_tokens: int) -> Collector:
    rollout = {"prompt_tokens": 768, "response_tokens": response_tokens, "groups": 1, "group_size": 2}
    cfg = small_config(rollout=rollout, images={"pages": 2}, tools={"system": "Be brief."})
    return Collector(model, qwen_processor(family), ToolSet([*VISUAL_TOOLS.values()]), cfg)


@pytest.fixture(scope="module", params=["Qwen2-VL", "Qwen3-VL"])
def world(request):
    """A family, a small random model of its vocabulary, the parameters, and a task."""
    model, params = create(read_config(CONFIG), seed=3, vision_block=144, logprob_chunk=448 + [*MARKERS].index(request.param))
    return request.param, model, params, task_at(3, "train", 0)


@pytest.fixture
def recited(monkeypatch):
    """Make the sampler draw the tokens of a script, by their index in the response; log-probabilities are the model's."""

    def recite(ids):
        script = jnp.asarray(ids)

        def draw(logits, uniform, greedy):
            token = script[jnp.minimum(uniform[:, 0].astype(int), len(script) - 1)]
            return token, jnp.take_along_axis(jax.nn.log_softmax(logits), token[:, None], 1)[:, 0]

        monkeypatch.setattr(sampler, "_uniform", lambda key, index: jnp.full(2, index, jnp.float32))
        monkeypatch.setattr(sampler, "draw", draw)

    return recite


@pytest.mark.slow(24)
def test_turns_calls_answers_and_logprobs_are_those_of_the_text(world, recited):
    """Promises 1, 2 and 5: the engine stops where the text does, the trainer finds the same log-probabilities, images fit."""
    family, model, params, task = world
    collector = collector_of(model, family, 224)
    expected = play(collector, task, 0, turns_of(family))
    assert expected.end == EndReason.ANSWERED and expected.answer == "日 7" and expected.executed_calls == 2
    recited(expected.ids)
    batch = collector.collect(params, [task], group_size=2, seed=0)
    for t in sum(batch.trajectories, []):
        assert t.ids.tolist() == expected.ids.tolist() and t.kind.tolist() == expected.kind.tolist()
        assert [turn.text for turn in t.turns] == turns_of(family) and (t.end, t.answer) == (EndReason.ANSWERED, "日 7")
        assert (t.vision >= 0).sum() == (t.ids == 151_655).sum() > 0
    check_images(sum(batch.trajectories, []), 151_655)
    advantages = np.asarray([[1, -1]], np.float32)
    packed = pack_batch(batch, advantages, advantages, 768, 224)
    shown, packed = shown_in(batch.store, packed), jax.tree.map(jnp.asarray, packed)
    ours = jax.jit(score, static_argnums=(0, 4))(model, params, packed, shown, 1.0)[0]
    sampled = (packed.kind != SEEN) & (packed.kind != TokenKind.PAD)
    assert np.abs(ours - packed.logprobs)[sampled].max() <= 1e-4

    tables, cfg = mask_tables(collector.cfg.mask), collector.cfg

    @jax.jit
    def gradient(text, vision, logprobs):
        def loss(trained):
            changed = dataclasses.replace(packed, logprobs=logprobs)
            return batch_loss(model, LossSettings.of(cfg), trained, vision, shown, changed, tables, jnp.ones(()), None, None)[0]

        return jax.tree.leaves(jax.grad(loss)(text))

    text, vision = (nnx.State({name: params[name]}) for name in ("text", "vision"))
    plain = gradient(text, vision, packed.logprobs)
    other = gradient(text, vision, jnp.where(sampled, packed.logprobs, 5.0))
    assert all(np.array_equal(a, b) for a, b in zip(plain, other, strict=True)) and max(np.abs(x).max() for x in plain) > 0


def test_a_slot_forgets_how_the_rollout_before_it_ended(world, recited):
    """Cut off within a stop string; the next begins with the end of one."""
    family, model, params, task = world
    processor = qwen_processor(family)
    ids = processor.encode(">") + processor.encode(" so") * 12 + processor.encode("<|endoftext|")
    recited(ids)
    collector = collector_of(model, family, len(ids))
    batch = collector.collect(params, [task] * 2, group_size=2, seed=0, slots=1)
    assert [t.ids.tolist() for t in sum(batch.trajectories, [])] == [ids] * 4
    assert {t.end for t in sum(batch.trajectories, [])} == {EndReason.TRUNCATED}


def test_every_token_has_the_kind_of_its_text(world):
    family, model, *_, task = world
    processor = qwen_processor(family)
    t = play(collector_of(model, family, 224), task, 0, turns_of(family))
    kinds = [t.kind[turn.start : turn.stop] for turn in t.turns]
    inside = [
        processor.decode(t.ids[turn.start : turn.stop][kind == wanted])
        for turn, kind, wanted in zip(t.turns, kinds, (CALL, CALL, ANSWERED), strict=True)
    ]
    assert inside[0].strip("\n") == CROP and inside[1] == CROP
    assert inside[2].strip(" !") == "<answer>日 7</answer>" and {*kinds[2]} == {TEXT, ANSWERED}
    assert [turn.call.arguments["bbox_2d"] for turn in t.turns[:2]] == [[100, 100, 600, 600]] * 2


# ---- text -----------------------------------------------------------------------------------------------------------

WORDS = [
    "\n", "\n\n", " ", "  ", ".", "Image", " 3:", "don't", "日本", "é", "e\u0301", "🙂", "12345", "<", "|", "</", "tool", "_call",
    ">", "\r\n", "\t", "...", '{"a": [1]}', "<answer>", "im_end", " the", "Ω",
]  # fmt: skip


@pytest.mark.parametrize("family", MARKERS)
def test_text_without_markers_has_the_ids_of_the_whole_conversation(family):
    """However the conversation is divided into template and content."""
    processor, rng = qwen_processor(family), np.random.default_rng(0)
    markers = [Markup(marker) for marker in ("<|im_start|>", "<|im_end|>", "<|vision_start|>", *MARKERS[family])]
    for _ in range(300):
        texts = []
        for _ in range(rng.integers(1, 7)):
            text = "".join(rng.choice(WORDS, rng.integers(0, 6)))
            texts.append(markers[rng.integers(len(markers))] if rng.random() < 0.3 else text)
        if any(
            marker in text
            for text in texts
            if not isinstance(text, Markup)
            for marker in processor.tokenizer.added_tokens_encoder
        ):
            continue
        apart = "".join(text if not isinstance(text, Markup) else "\0" for text in texts)
        if any(marker in apart for marker in processor.tokenizer.added_tokens_encoder):
            continue  # a marker that content makes up of two pieces is content
        assert processor.encode(*texts) == processor.tokenizer.encode("".join(texts), add_special_tokens=False)
        assert processor.encode(Markup("".join(texts))) == processor.encode(*texts)


@pytest.mark.parametrize("family", MARKERS)
def test_no_content_becomes_a_marker(family):
    """All of a vocabulary's markers, whole and in two pieces, in questions and in what tools return."""
    processor = qwen_processor(family)
    added = processor.tokenizer.added_tokens_decoder
    template = [i for i in processor.encode(*QWEN.render_task(QWEN.system("Look."), ("?",), [])[0]) if i in added]
    template += [i for i in encode_parts(QWEN.render_task(QWEN.system("Look."), ("?",), [])[1:], processor).ids if i in added]
    response = encode_parts(QWEN.render_observation(["?"]), processor).ids
    for marker in map(str, added.values()):
        for text in (marker, f"a{marker}{marker}\n", f"{marker[:3]}{marker}{marker[3:]}"):
            ids = encode_parts(QWEN.render_task(QWEN.system("Look."), (text,), []), processor).ids
            assert [i for i in ids if i in added] == template and text in processor.decode(ids)
            seen = encode_parts(QWEN.render_observation([text, text]), processor).ids
            assert [i for i in seen if i in added] == [i for i in response if i in added]
            assert processor.decode(seen).count("</tool_response>") == 1
            assert processor.encode(marker[:4], marker[4:]) == processor.encode(marker)


def test_a_tool_schema_is_content_and_the_template_is_qwens():
    """The call format of the system turn has the marker tokens where the vocabulary has them; a description never."""
    schema = {"type": "function", "function": {"name": "f", "description": "</tool_call><|im_end|>", "parameters": {}}}
    for family, count in (("Qwen2-VL", 0), ("Qwen2.5-VL", 4)):
        processor = qwen_processor(family)
        added = processor.tokenizer.added_tokens_decoder
        ids = processor.encode(*QWEN.system("Look.", [schema]))
        assert sum(i in added for i in ids) == count and "</tool_call><|im_end|>" in processor.decode(ids)
