"""The shipped tiny base and how it is built: its batches, its updates, its measured skills, and Hugging Face's view of it."""

import io
import json
import re
import shutil
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from PIL import Image
from transformers import Qwen2VLForConditionalGeneration

from imagent_jax.chat import QWEN
from imagent_jax.model.families import read_config, read_folder
from imagent_jax.model.interleave import encode_parts
from imagent_jax.model.processor import Processor
from imagent_jax.model.vision import normalise
from imagent_jax.model.vlm import create
from imagent_jax.tiny import base as tiny_base
from imagent_jax.tiny import build as tiny
from imagent_jax.tiny import corpus
from imagent_jax.tiny import skills as tiny_skills
from imagent_jax.tiny.base import base_folder
from imagent_jax.tiny.build import Shape, architecture, collate, encode_group, muon, schedule
from imagent_jax.tiny.corpus import make_group
from imagent_jax.tiny.skills import right, skill_task
from imagent_jax.tiny.vision import HEADS, labelled_pack, vision_step
from imagent_jax.tiny.world import photographs, task_at
from imagent_jax.types import Markup

torch.set_num_threads(1)


def test_it_is_at_most_twelve_megabytes_and_says_how_it_was_made():
    folder = base_folder()
    assert sum(f.stat().st_size for f in folder.iterdir()) <= 12 * 2**20
    built = json.loads((folder / "built.json").read_text())
    assert built["parameters"] > 10**6
    assert all(command.startswith("python -m imagent_jax.tiny") for command in built["commands"])


@pytest.mark.slow(7)
def test_hugging_face_loads_it_and_writes_the_same_greedy_text(parts):
    reference = Qwen2VLForConditionalGeneration.from_pretrained(base_folder(), dtype=torch.float32).eval()
    tasks = [task_at(5, "test", i) for i in range(4)]
    ours = parts.collector.collect(parts.params, tasks, group_size=1, seed=0, temperature=0.0)
    stops = {*parts.processor.encode(QWEN.turn_close), *parts.processor.encode(Markup("</tool_call>"))}
    for task, [trajectory] in zip(tasks, ours.trajectories, strict=True):
        prompt = parts.collector.open_task(task).prompt
        ids = [int(i) for i in prompt.ids]
        first = trajectory.turns[0]
        for expected in trajectory.ids[: first.stop]:
            row, pixels = torch.tensor([ids]), np.concatenate([image.patches for image in prompt.images])
            with torch.no_grad():
                reference.model.rope_deltas = None
                logits = reference(
                    input_ids=row,
                    attention_mask=torch.ones_like(row),
                    pixel_values=torch.tensor(np.asarray(normalise(parts.model.cfg.vision, pixels))),
                    image_grid_thw=torch.tensor([[1, *image.grid] for image in prompt.images]),
                    mm_token_type_ids=(row == parts.processor.image_token_id).int(),
                    use_cache=False,
                ).logits[0, -1]
            assert int(logits.argmax()) == int(expected), (task.question, parts.processor.decode(ids[-20:]))
            ids.append(int(expected))
        assert ids[-1] in stops or len(ids) == len(prompt.ids) + parts.cfg.rollout.response_tokens


def test_a_checkout_without_a_model_says_how_to_build_it(tmp_path, monkeypatch):
    monkeypatch.setattr(tiny_base, "__file__", str(tmp_path / "base.py"))
    with pytest.raises(ValueError, match="assets/base holds no model; build it with `python -m imagent_jax.tiny`"):
        base_folder()


# ---- batches ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def processor():
    return Processor.from_pretrained(base_folder())


def interleaved(text, images, processor):
    """Text and prepared images in the order of the conversation."""
    pieces, parts = map(Markup, text.split("<image>")), []
    for piece, image in zip(pieces, [*images, None], strict=True):
        parts += [piece, *([processor.prepare(image.pixels, image.min_pixels, image.max_pixels)] if image else [])]
    return parts


@pytest.mark.parametrize(("form", "blocks"), [("calls", 12), ("calls", 40), ("thumbnails", 10), ("crop", 4)])
def test_a_batch_holds_every_conversation_its_images_and_what_of_it_is_trained(processor, form, blocks):
    """Ids and positions are those of the whole conversation; every image token points at a feature of its own image."""
    rng = np.random.default_rng(5)
    groups = [make_group(rng, 3, form) for _ in range(4)]
    shape = Shape(4, 3, 110, 300, blocks)
    batch, (patches, coords, image_id) = collate([encode_group(group, processor) for group in groups], shape, 2)
    assert len(patches) in (144 * blocks, 2 * 144 * blocks) and len(patches) == len(coords) == len(image_id)
    at, trained_tokens = 0, 0
    for n, group in enumerate(groups):
        prompt = interleaved(group.prompt, group.images, processor)
        length = int(batch["prompt_len"][n])
        given = encode_parts(prompt, processor)
        assert np.array_equal(batch["prompt_ids"][n, :length], given.ids) and not batch["prompt_ids"][n, length:].any()
        mine = [(batch["prompt_vision"][n], batch["prompt_ids"][n], given.images)]
        for g, segments in enumerate(group.responses):
            pieces = [interleaved(segment.text, segment.images, processor) for segment in segments]
            whole = encode_parts([*prompt, *(part for piece in pieces for part in piece)], processor)
            end = len(whole.ids) - length
            row = {name: batch[f"response_{name}"][..., n, g, :] for name in ("ids", "positions", "vision")}
            assert np.array_equal(row["ids"][:end], whole.ids[length:]) and not row["ids"][end:].any()
            assert np.array_equal(batch["prompt_positions"][:, n, :length], whole.positions[:, :length])
            assert np.array_equal(row["positions"][:, :end], whole.positions[:, length:])
            counts = [len(encode_parts(piece, processor).ids) for piece in pieces]
            marks = np.repeat([segment.trained for segment in segments], counts)
            assert np.array_equal(batch["trained"][n, g], np.pad(marks, (0, 300 - end)))
            trained_tokens += sum(marks)
            mine.append((row["vision"], row["ids"], whole.images[len(given.images) :]))
        for vision, ids, images in mine:
            assert np.array_equal(vision >= 0, ids == processor.image_token_id)
            rows = vision[vision >= 0]
            for image in images:
                count = len(image.patches) // 4
                own, rows = rows[:count], rows[count:]
                assert np.array_equal(own, own[0] + np.arange(count))
                assert (image_id[4 * own] == at).all() and np.array_equal(patches[4 * own[0] : 4 * (own[-1] + 1)], image.patches)
                at += 1
            assert not len(rows)
    assert image_id.max() == at - 1 and trained_tokens > 0


def test_a_producer_makes_packs_then_batches_from_its_arguments_alone(processor, monkeypatch):
    """Seeing first: the first part of the batches is of the first forms; the narrowest shape that holds a group is taken."""
    shapes = {
        "crop": (Shape(2, 1, 72, 16, 2),),
        "thumbnails": (Shape(2, 2, 40, 8, 4), Shape(3, 2, 104, 20, 4), Shape(2, 2, 104, 40, 4)),  # nothing fits the first
    }
    monkeypatch.setattr(tiny, "SHAPES", shapes)
    monkeypatch.setattr(tiny, "FIRST", 0.25)
    monkeypatch.setattr(corpus, "FIRST_FORMS", {"crop": 1.0})
    monkeypatch.setattr(corpus, "FORMS", {"thumbnails": 1.0})

    def produced(seed, crowded=1):
        items = []
        tiny.produce(str(base_folder()), seed, 1, crowded, 8, SimpleNamespace(put=items.append))
        return items

    pack, *batches = produced(3)
    rng = np.random.default_rng(3)
    expected = labelled_pack(rng, processor, 144, crowded=1)
    assert np.array_equal(pack.patches, expected.patches) and np.array_equal(pack.labels["digit"], expected.labels["digit"])
    assert [batch["prompt_ids"].shape[1] for batch, _ in batches] == [72] * 2 + [104] * 6
    for batch, _ in batches[2:]:
        longest = int((batch["response_ids"] != 0).sum(-1).max())
        groups, _, width = batch["response_ids"].shape
        assert (groups, width) in ((3, 20), (2, 40)) and longest <= width
        assert width == 20 or ((batch["response_ids"] != 0).sum(-1).max(-1) > 20).all()
    assert {batch["response_ids"].shape[2] for batch, _ in batches[2:]} == {20, 40}
    again, other = produced(3), produced(4)
    assert all(np.array_equal(a["prompt_ids"], b["prompt_ids"]) for (a, _), (b, _) in zip(batches, again[1:], strict=True))
    assert not np.array_equal(other[0].patches, pack.patches)


def test_shapes_hold_the_groups_of_the_corpus(processor):
    rng = np.random.default_rng(6)
    for form, shapes in tiny.SHAPES.items():
        assert [s.width for s in shapes] == sorted(s.width for s in shapes)
        for _ in range(8):
            prompt, responses = encode_group(make_group(rng, shapes[0].size, form), processor)
            longest = max(sum(len(one.ids) for one, _ in response) for response in responses)
            assert len(prompt.ids) <= shapes[-1].prompt and longest <= shapes[-1].width


# ---- updates ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("steps", "warm"), [(1000, 100), (101, 100), (41, 40)])
def test_the_rate_warms_up_and_falls_along_a_cosine_to_two_hundredths(steps, warm):
    rate = schedule(0.5, steps)
    assert rate(0) == 0 and float(rate(warm // 2)) == pytest.approx(0.25) and float(rate(warm)) == pytest.approx(0.5)
    assert float(rate(steps)) == pytest.approx(0.01, rel=1e-4)
    if steps > 200:
        assert float(rate((steps + warm) // 2)) == pytest.approx((0.5 + 0.01) / 2, rel=1e-4)


def test_muon_is_for_the_matrices_of_layers_and_adam_for_the_rest():
    """A muon update has equal singular values; an Adam update has entries of one size."""
    rng = np.random.default_rng(8)
    params = {
        "text": {"layers": {"wq": jnp.ones((2, 8, 12)), "norm": jnp.ones((2, 8))}, "embed": jnp.ones((16, 8))},
        "vision": {"blocks": {"qkv": jnp.ones((2, 8, 12))}, "merge_fc1": jnp.ones((8, 12)), "patch_embed": jnp.ones((9, 8))},
    }
    gradients = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) ** 3, jnp.float32), params)
    optimizer = muon(0.1, 1000)
    state = optimizer.init(params)
    _, state = optimizer.update(gradients, state, params)  # at rate 0
    updates, _ = optimizer.update(gradients, state, params)  # at a hundredth of the rate
    shrunk = 0.1 / 100 * 0.02  # weight decay, of ones
    for matrix in (updates["text"]["layers"]["wq"][1], updates["vision"]["blocks"]["qkv"][0], updates["vision"]["merge_fc1"]):
        values = np.linalg.svd(np.asarray(matrix) + shrunk, compute_uv=False)
        assert values.min() > 0.5 * values.max()
        assert np.sqrt(np.mean(values**2)) == pytest.approx(0.1 / 100 * 0.2 * 12**0.5, rel=0.25)  # root mean square 0.2
    for other in (updates["text"]["embed"], updates["text"]["layers"]["norm"], updates["vision"]["patch_embed"]):
        sizes = np.abs(np.asarray(other) + shrunk)
        assert np.median(sizes) == pytest.approx(0.1 / 100 * (0.9 * 0.19 / 0.271 + 0.1 / 0.19), rel=1e-3)  # Nesterov's
        assert np.mean(np.abs(sizes - np.median(sizes)) < 0.1 * np.median(sizes)) > 0.8  # but for the smallest gradients


@pytest.fixture(scope="module")
def small(processor):
    """A model of the base's architecture with one narrow layer, and its parameters."""
    whole = architecture(processor, 1152)
    text = whole["text_config"] | {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = whole["vision_config"] | {"depth": 1, "embed_dim": 64, "hidden_size": 64, "mlp_ratio": 1, "num_heads": 2}
    return create(read_config(whole | {"text_config": text, "vision_config": vision}), 0, vision_block=144)


def test_the_architecture_is_the_shipped_bases(processor):
    shipped = read_folder(base_folder())
    assert read_config(architecture(processor, shipped.text.vocab_size)) == shipped
    config = architecture(processor, 64)
    tokens = {name: config[f"{name}_token_id"] for name in ("image", "video", "vision_start", "vision_end")}
    names = {"image": "image_pad", "video": "video_pad"}
    ids = {name: processor.tokenizer.convert_tokens_to_ids(f"<|{names.get(name, name)}|>") for name in tokens}
    assert tokens == ids and config["text_config"]["eos_token_id"] == processor.encode(QWEN.turn_close)[0]


@pytest.mark.slow(15)
def test_an_update_of_the_decoder_is_of_the_mean_loss_over_trained_tokens(processor, small):
    model, params = small
    rng, optimizer = np.random.default_rng(9), optax.sgd(0.5)
    groups = [encode_group(make_group(rng, 2, "crop"), processor) for _ in range(2)]
    batch, pack = collate(groups, Shape(2, 2, 72, 16, 2), 2)
    text = params["text"]

    def loss(trained, text=text):
        own = jax.tree.map(jnp.copy, text)
        new, _, value = tiny.train_step(model, optimizer, params, own, optimizer.init(own), batch | {"trained": trained}, pack)
        return float(value["loss"]), new

    first, second = batch["trained"].copy(), batch["trained"].copy()
    first[1], second[0] = False, False
    (both, new), (one, _), (two, _) = (loss(trained) for trained in (batch["trained"], first, second))
    counts = first.sum(), second.sum()
    assert both * sum(counts) == pytest.approx(one * counts[0] + two * counts[1], rel=1e-4)
    assert both == pytest.approx(np.log(1152), rel=0.15)  # knows nothing yet
    assert loss(batch["trained"], new)[0] < both
    assert jax.tree.structure(new) == jax.tree.structure(text)


@pytest.mark.slow(15)
def test_an_update_of_the_tower_counts_labelled_features_alone(processor, small):
    """With a head of zeros every feature is taken for class 0, and the head moves by the mean gradient."""
    model, params = small
    pack = labelled_pack(np.random.default_rng(10), processor, 144)
    tower = jax.tree.map(jnp.copy, params["vision"])
    head = {name: jnp.zeros((64, classes)) for name, classes in HEADS.items()}
    optimizer = optax.sgd(1.0)
    (new, moved), _, accuracy = vision_step(model, optimizer, params, (tower, head), optimizer.init((tower, head)), pack)
    for name, labels in pack.labels.items():
        known = labels[labels >= 0]
        assert float(accuracy[name]) == pytest.approx(np.mean(known == 0), abs=1e-6)
        assert np.abs(np.asarray(moved[name]).sum(1)).max() < 1e-3 and np.abs(np.asarray(moved[name])).max() > 1e-4
    for _ in range(2):
        (new, moved), _, later = vision_step(model, optimizer, params, (new, moved), optimizer.init((new, moved)), pack)
    assert later["colour"] > accuracy["colour"] + 0.5


# ---- skills -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("expected", "text", "verdict"),
    [
        ("Image 1 red 7.\n", "Image 1 red 7.\n<|im_end|>", True),
        ("Image 1 red 7.\n", "Image 1 red 1.\n<|im_end|>", False),
        ("red blue", "blue red", False),
        ("Image 1 no tag.\n<answer>Image 2</answer>", "Image 1 red.\n<answer>Image 2</answer><|im_end|>", True),
        ("<answer>3</answer>", "<answer>4</answer>", False),
        ("<answer>3</answer>", "3", False),
        ("[100, 200, 300, 400]", "[125, 175, 325, 375]<|im_end|>", True),
        ("[100, 200, 300, 400]", "[100, 200, 300, 426]", False),
        ("[100, 200, 300, 400]", "[74, 200, 300, 400]", False),
        ("[100, 200, 300, 400]", "[100, 200, 300]", False),
        ("[100, 200, 300, 400]", "there", False),
    ],
)
def test_an_answer_is_right_to_the_letter_and_a_box_within_a_step(expected, text, verdict):
    assert right(expected, text) is verdict


def test_skills_are_asked_of_the_held_out_split_and_named_with_their_form():
    rng, kinds = np.random.default_rng(11), {}
    held_out = [scale for _, scales in photographs("test") for scale in scales]
    for form in tiny_skills.FORMS:
        for i in range(12):
            task = skill_task(rng, form, f"{form}-{i}")
            kinds.setdefault(form, set()).add(task.kind)
            assert task.uid == f"{form}-{i}" and "<|im_end|>" not in task.answer and "<|im_start|>" not in task.question
            assert (len(task.images) == 1) == (form in ("crop", "thumbnail"))
            if task.kind.startswith("read"):
                assert re.fullmatch(r"What does Image \d show\?", task.question)
                assert re.match(r"Image \d (\w+ \d|no tag)\.", task.answer)
            if task.kind.startswith("locate"):
                assert task.question.startswith("Where is") and len(json.loads(task.answer)) == 4
        image = Image.open(io.BytesIO(task.images[0]))
        assert image.format == "PNG"  # without loss
        grey = np.where(np.ptp(np.asarray(image), axis=-1) == 0, np.asarray(image)[..., 0], -1)
        assert (grey >= 0).mean() > 0.5  # a photograph in black and white, but for its tags
        assert any(
            np.all([scale[:, at : scale.shape[1] - 12 + at, 0] == grey[0, at] for at in range(12)], 0).any() for scale in held_out
        )
    assert kinds["crop"] == {"read (crop)"} and kinds["crops"] == {"read (crops)"}
    assert kinds["thumbnail"] == {"locate (thumbnail)", "name (thumbnail)"}
    assert {"answer (thumbnails)"} < kinds["thumbnails"] <= {f"{s} (thumbnails)" for s in ("answer", "locate", "name")}


@pytest.mark.slow(5)
def test_skills_are_shares_of_greedy_answers_at_the_budget_of_their_form(monkeypatch):
    """With an engine that answers every other question right."""
    seen = []

    class Half:
        def __init__(self, model, processor, tools, cfg):
            assert (model, tools) == ("model", corpus.TOOLS) and processor.encode("a")
            self.budget = cfg.images.min_pixels, cfg.images.max_pixels

        def collect(self, params, tasks, **how):
            seen.append((self.budget, len(tasks), params, how))
            count = iter(range(len(tasks)))
            texts = [task.answer if next(count) % 2 else "wrong" for task in tasks]
            return SimpleNamespace(trajectories=[
                [SimpleNamespace(task=task, turns=[SimpleNamespace(text=text), SimpleNamespace(text=task.answer)])]
                for task, text in zip(tasks, texts, strict=True)
            ])  # fmt: skip

    monkeypatch.setattr(tiny_skills, "Collector", Half)
    monkeypatch.setattr(tiny_skills.checkpoint, "load", lambda folder, vision_block: ("model", "params"))
    skills = tiny_skills.measure(base_folder(), count=64, seed=5)
    budgets = {"crop": (7056, 9408), "crops": (7056, 9408), "thumbnail": (3136, 4704), "thumbnails": (3136, 4704)}
    how = {"group_size": 1, "seed": 5, "temperature": 0.0}
    assert seen == [(budgets[form], 64, "params", how) for form in tiny_skills.FORMS]
    assert (skills["read (crop)"], skills["read (crops)"]) == (0.5, 0.5)
    assert list(skills) == sorted(skills) and {skill.split()[0] for skill in skills} == {"answer", "locate", "name", "read"}
    monkeypatch.setattr(tiny_skills, "FORMS", ("crop",))
    assert tiny_skills.measure(base_folder(), count=128, seed=6) == {"read (crop)": 0.5}
    assert [count for _, count, *_ in seen[4:]] == [64, 64]


@pytest.mark.slow(15)
def test_a_base_that_takes_no_steps_is_only_measured_anew(tmp_path, monkeypatch, capsys):
    for file in base_folder().iterdir():
        shutil.copy(file, tmp_path / file.name)
    (tmp_path / "generation_config.json").unlink()
    monkeypatch.setattr(tiny, "measure", lambda folder: {"read (crop)": float(folder == tmp_path)})
    tiny.build(tmp_path, 0, 40, 0, 5, 2e-3)
    before, after = (json.loads((folder / "built.json").read_text()) for folder in (base_folder(), tmp_path))
    assert after == before | {"skills": {"read (crop)": 1.0}}
    ends = json.loads((tmp_path / "generation_config.json").read_text())
    assert ends == json.loads((base_folder() / "generation_config.json").read_text())
    assert (tmp_path / "model.safetensors").read_bytes() == (base_folder() / "model.safetensors").read_bytes()
    assert capsys.readouterr().out.startswith(f"{before['parameters']:,} parameters; 0 steps of the tower and 0 of the decoder")
