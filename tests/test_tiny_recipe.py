"""The recipe of a base: built by one command, continued where it was stopped, to the same result, with measured skills."""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from itertools import combinations
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imagent_jax.model import checkpoint
from imagent_jax.model.processor import Processor
from imagent_jax.tiny import build as tiny_build
from imagent_jax.tiny import corpus_tools, skills_tools, vision_tools, world
from imagent_jax.tiny import recipe as module
from imagent_jax.tiny.base import tools_folder
from imagent_jax.tiny.build import Shape
from imagent_jax.tiny.corpus_style import GIVEN
from imagent_jax.tiny.corpus_tools import FORMS, make_group
from imagent_jax.tiny.prints import LOSSES, SIDE, TURNS
from imagent_jax.tiny.recipe import RECIPES, batches, build, load_state, packs, produce, save_state, state_facts
from imagent_jax.tiny.skills_tools import measure, skills_of
from imagent_jax.tiny.tokenizer import build_tokenizer
from imagent_jax.tiny.vision_tools import SHOWN, TOOL_HEADS, crowded_print, digits_pack, sheet, sizes_pack, tool_pack


@pytest.fixture(scope="module")
def recipe():
    """The recipe of the tool worlds with a few updates of small batches of one form."""
    shapes = {"print": (Shape(2, 1, 160, 40, 6),)}
    steps = {"digits": 1, "sizes": 1, "vision": 2, "text": 4, "last": 1}
    return replace(RECIPES["tools"], shapes=shapes, steps=steps, chunk=1, texts=200, vocabulary=900)


@pytest.fixture(scope="module")
def tokens(recipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokens")
    build_tokenizer(folder, corpus_tools.corpus_texts(recipe.texts, recipe.seed), recipe.vocabulary, recipe.values)
    return folder


@pytest.fixture
def small(monkeypatch, tokens):
    """A corpus of single prints, packs of a few views, a narrow model, data in this process, and skills that are counted."""
    monkeypatch.setattr(corpus_tools, "FORMS", {"print": 1.0})
    monkeypatch.setattr(corpus_tools, "FIRST_FORMS", {"print": 1.0})
    monkeypatch.setattr(corpus_tools, "LATER_FORMS", {"last": {"print": 1.0}})
    few, more = {"scenes": 2, "repaired": 2, "marks": 1, "blocks": 12}, {"sheets": 1, "large": 1, "given": 2, "spoilt": 3}
    shown = {"digits": few | {"crowded": 1}, "sizes": few | {"sheets": 1}, "vision": few | more}
    monkeypatch.setattr(vision_tools, "SHOWN", shown)
    whole = tiny_build.architecture

    def narrow(processor, vocab):
        cfg = whole(processor, vocab)
        text = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
        vision = {"depth": 1, "embed_dim": 64, "hidden_size": 64, "mlp_ratio": 1, "num_heads": 2}
        return cfg | {"text_config": cfg["text_config"] | text, "vision_config": cfg["vision_config"] | vision}

    monkeypatch.setattr(module, "architecture", narrow)
    monkeypatch.setattr(
        module, "chunks", lambda recipe, out, stage, first: (
            (chunk, (packs if stage in recipe.packs else batches)(recipe, Processor.from_pretrained(out), stage, chunk))
            for chunk in range(first, recipe.steps[stage] // recipe.chunk)
        ),
    )  # fmt: skip
    monkeypatch.setattr(skills_tools, "measure", lambda folder: {"read": 0.5})

    def folder(path):
        path.mkdir()
        for file in tokens.iterdir():
            (path / file.name).write_bytes(file.read_bytes())
        return path

    return folder


@pytest.mark.slow(60)
def test_a_build_that_is_stopped_after_every_chunk_ends_with_the_same_base(recipe, small, tmp_path, capsys):
    whole, parts = small(tmp_path / "whole"), small(tmp_path / "parts")
    assert build(recipe, whole, "command") is True
    asked = Counter()
    while not build(recipe, parts, "command", lambda: True):
        asked["stops"] += 1
        assert not (parts / "built.json").exists() and state_facts(parts / "state.safetensors", recipe)["seconds"] > 0
    assert asked["stops"] == 9  # one, one and two chunks of the tower, four and one of the decoder
    assert (whole / "model.safetensors").read_bytes() == (parts / "model.safetensors").read_bytes()
    one, two = (json.loads((folder / "built.json").read_text()) for folder in (whole, parts))
    assert one.pop("seconds") >= 0 and two.pop("seconds") >= 0 and one == two
    assert one["skills"] == {"read": 0.5} and set(one["text"]) == {"loss"}
    assert set(one["digits"]) == set(one["sizes"]) == set(one["vision"]) == set(TOOL_HEADS)
    assert not (parts / "state.safetensors").exists()
    capsys.readouterr()
    assert build(recipe, parts, "command") is True and "is complete" in capsys.readouterr().out
    (parts / "built.json").unlink()
    with pytest.raises(SystemExit, match="has weights, and no state to continue from; name another --out"):
        build(recipe, parts, "command")
    assert (whole / "model.safetensors").read_bytes() == (parts / "model.safetensors").read_bytes()


def test_a_build_that_another_recipe_began_is_not_continued(recipe, tmp_path):
    save_state(tmp_path / "state.safetensors", {}, {"stage": "vision", "chunk": 1, "seconds": 1.0, "last": {}})
    with pytest.raises(SystemExit, match=r"another recipe began.*remove it or name another --out"):
        state_facts(tmp_path / "state.safetensors", recipe)


def test_a_state_is_read_back_as_it_was_and_names_its_stage(recipe, tmp_path):
    tree = {"a": jnp.arange(3), "b": [jnp.ones((2, 2), jnp.float32), jnp.zeros((), jnp.int32)]}
    path = tmp_path / "state.safetensors"
    assert state_facts(path, recipe) == {"stage": "digits", "chunk": 0, "seconds": 0.0, "last": {}, "steps": recipe.steps}
    save_state(path, tree, {"stage": "text", "chunk": 3, "seconds": 1.5, "last": {}, "steps": recipe.steps})
    back = load_state(path, jax.tree.map(jnp.zeros_like, tree))
    assert all(np.array_equal(a, b) and a.dtype == b.dtype for a, b in zip(*map(jax.tree.leaves, (tree, back)), strict=True))
    assert state_facts(path, recipe)["chunk"] == 3 and not list(tmp_path.glob("*.part"))
    with pytest.raises(AssertionError, match="another recipe"):
        load_state(path, {"a": jnp.arange(3)})


def test_a_chunk_is_a_function_of_seed_stage_and_number(recipe, small, tmp_path):
    processor = Processor.from_pretrained(small(tmp_path / "one"))

    def drawn(chunk, **changes):
        changed = replace(recipe, **changes)
        (batch, _), (pack,) = next(batches(changed, processor, "text", chunk)), packs(changed, processor, "vision", chunk)
        (digits,) = packs(changed, processor, "digits", chunk)
        return batch["response_ids"], pack.patches, digits.patches

    first, again, other = drawn(0), drawn(0), drawn(1)
    same = replace(recipe, packs=dict.fromkeys(recipe.packs, recipe.packs["vision"]))
    one, two, three = (next(packs(same, processor, stage, 0)).patches for stage in same.packs)
    assert not np.array_equal(one, two) and not np.array_equal(two, three)  # one kind of pack, and other images in each stage
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(np.array_equal(a, b) for a, b in zip(first, other, strict=True))
    assert not any(np.array_equal(a, b) for a, b in zip(first, drawn(0, seed=1), strict=True))
    items = []
    produce(recipe, str(tmp_path / "one"), "text", 0, 2, SimpleNamespace(put=items.append))
    assert len(items) == 2 * recipe.chunk and np.array_equal(items[0][0]["response_ids"], first[0])


def test_the_forms_of_the_decoder_are_first_then_all_then_last(recipe, monkeypatch, tokens):
    """By stage and by the updates that are done."""
    drawn = Counter()
    for name in ("FIRST_FORMS", "FORMS"):
        monkeypatch.setattr(corpus_tools, name, {name: 1.0})
    monkeypatch.setattr(corpus_tools, "LATER_FORMS", {"last": {"later": 1.0}})
    monkeypatch.setattr(
        corpus_tools, "make_group", lambda rng, size, form: drawn.update([form]) or make_group(rng, size, "print")
    )
    whole = replace(recipe, shapes=dict.fromkeys(("FIRST_FORMS", "FORMS", "later"), recipe.shapes["print"]))
    whole, processor = replace(whole, steps=whole.steps | {"text": 20}), Processor.from_pretrained(tokens)
    for stage, chunk, name in (
        ("text", 0, "FIRST_FORMS"),
        ("text", 2, "FIRST_FORMS"),
        ("text", 3, "FORMS"),
        ("last", 0, "later"),
    ):
        next(batches(whole, processor, stage, chunk))
        assert set(drawn) == {name}
        drawn.clear()


def test_recipes_are_whole_chunks_and_trials_are_shorter():
    for recipe in RECIPES.values():
        assert (
            all(count % recipe.chunk == 0 for count in recipe.steps.values()) and (*recipe.packs, "text") == (*recipe.steps,)[:4]
        )
        corpus = importlib.import_module(recipe.corpus)
        assert set(corpus.FORMS) == set(recipe.shapes) and {*recipe.steps} - {*recipe.packs, "text"} <= {
            *getattr(corpus, "LATER_FORMS", {})
        }
        trial = recipe.scaled(0.01)
        assert all(trial.steps[s] % trial.chunk == 0 and trial.steps[s] < recipe.steps[s] / 50 for s in recipe.steps)
        assert recipe.scaled(1.0) == recipe


def test_a_base_that_was_never_built_is_named_with_its_command(tmp_path, monkeypatch):
    monkeypatch.setattr("imagent_jax.tiny.base.__file__", str(tmp_path / "base.py"))
    with pytest.raises(ValueError, match="no model; build it with `python -m imagent_jax.tiny.recipe tools`"):
        tools_folder()
    assert set(checkpoint.EMBEDDED) == {"tiny", "tiny_tools"}


# ---- the tower ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow(6)
def test_features_of_prints_say_what_is_wrong_and_only_readable_ones_show_digits(tokens):
    processor, rng = Processor.from_pretrained(tokens), np.random.default_rng(0)
    pack, shown = tool_pack(rng, processor, 144), SHOWN["vision"]
    known = {name: labels >= 0 for name, labels in pack.labels.items()}
    assert set(known) == set(TOOL_HEADS) and (known["turn"] == known["loss"]).all()
    repaired = shown["repaired"] + shown["marks"]
    assert known["turn"].sum() == (shown["spoilt"] + repaired) * 9  # prints as drawn, repaired and marked, of 3 x 3 features
    spoilt = known["turn"] & ((pack.labels["turn"] < len(TURNS)) | (pack.labels["loss"] < len(LOSSES)))
    assert 0.6 < spoilt.sum() / (shown["spoilt"] * 9) <= 1 and not known["colour"][spoilt].any()
    assert not known["digit"][spoilt].any()
    sound = known["turn"] & ~spoilt
    assert known["digit"][sound].sum() == sound.sum() // 9 + shown["marks"] > 30  # a digit a print, two where there are marks
    assert known["row"].sum() == known["column"].sum()
    labels = [one.labels["loss"] for one in (pack, *(tool_pack(rng, processor, 144) for _ in range(2)))]
    assert GIVEN == (3136, 7056) and {*np.concatenate(labels).tolist()} == {-1, *range(len(LOSSES) + 1)}  # every loss, and none


def test_packs_of_digits_are_full_of_digits_and_leave_the_rest_to_the_last_stage(tokens):
    processor = Processor.from_pretrained(tokens)
    digits, sizes, whole = (pack(np.random.default_rng(0), processor, 144) for pack in (digits_pack, sizes_pack, tool_pack))
    for pack in (digits, sizes):
        assert (pack.labels["digit"] >= 0).sum() / (pack.image[::4] >= 0).sum() > 0.25
        assert (pack.labels["x"] == -1).all() and {*pack.labels["turn"]} == {-1, len(TURNS)}
    assert (whole.labels["x"] >= 0).sum() > 2 * SHOWN["vision"]["given"] and (whole.labels["digit"] >= 0).sum() > 150
    pages = (whole.labels["x"] >= 0) & (whole.labels["digit"] >= 0)  # given pages and scenes: no digit can be read
    assert not pages.any()


def test_tags_of_sheets_are_of_all_sizes_in_all_places_and_those_of_a_full_print_of_one():
    rng, sizes, places = np.random.default_rng(0), set(), set()
    for _ in range(30):
        shown = sheet(rng)
        assert shown.pixels.shape == (168, 168, 3) and 5 <= len(shown.tags) <= 36
        apart = [max(abs(a.x - b.x), abs(a.y - b.y)) for a, b in combinations(shown.tags, 2)]
        sizes.add(min(apart) * 168 > 24)
        places |= {int(tag.x * 168) % 28 // 4 for tag in shown.tags}
        view = crowded_print(rng)
        assert view.pixels.shape == (SIDE, SIDE, 3) and len({(x > 0.5, y > 0.5) for x, y, _ in view.tags}) == len(view.tags) <= 4
    assert sizes == {True, False} and places == {*range(7)}


def test_the_centre_of_a_tag_of_a_sheet_is_where_its_label_says(monkeypatch):
    """On a black photograph only tags are lit: around every labelled centre, and as much as tags of that size are."""
    monkeypatch.setattr(world, "background", lambda rng, split, h, w: (np.zeros((h, w, 3), np.uint8), "black"))
    monkeypatch.setattr(world, "vary", lambda rng, split, pixels: pixels)
    monkeypatch.setattr(vision_tools, "SHEETS", (112, 112))
    shown = sheet(np.random.default_rng(3))
    lit = shown.pixels.max(-1) > 0
    for tag in shown.tags:
        x, y = tag.x * 168, tag.y * 168
        assert lit[round(y - 16) : round(y + 16), round(x - 16) : round(x + 16)].mean() > 0.97  # 24 x 168 / 112 = 36 pixels
    assert lit.sum() == pytest.approx(len(shown.tags) * 36**2, rel=0.1)


# ---- skills -----------------------------------------------------------------------------------------------------------------


def test_skills_are_named_by_the_question_that_they_follow():
    rng, found = np.random.default_rng(1), set()
    for form in FORMS:
        for _ in range(12):
            for response in make_group(rng, 3, form).responses:
                named = skills_of(response)
                assert len(named) == sum(segment.trained for segment in response)
                found |= set(named)
    assert {
        "see what is wrong", "read a mark", "read", "program on command", "repair on command", "search on command",
        "search again", "look on command", "answer after: search on command", "answer after: look on command", "locate",
    } <= found  # fmt: skip


@pytest.mark.slow(30)
def test_a_skill_is_the_share_of_pieces_whose_tokens_are_all_the_likeliest(monkeypatch, tokens, tmp_path):
    """With a model that finds every second token of the trained ones unlikely, or none."""
    monkeypatch.setattr(skills_tools, "TOOL_SHAPES", {"print": (Shape(2, 1, 160, 40, 6),)})
    monkeypatch.setattr(skills_tools.checkpoint, "load", lambda *_, **__: (None, {}))
    monkeypatch.setattr(skills_tools, "encode_images", lambda *_: jnp.zeros((1, 4)))
    monkeypatch.setattr(skills_tools, "at_tokens", lambda *_: None)
    for worst, expected in ((0.0, 1.0), (-1.0, 0.0)):
        monkeypatch.setattr(
            skills_tools, "response_logprobs",
            lambda *_, response_ids, worst=worst, **__: (jnp.full(response_ids.shape, worst), None),
        )  # fmt: skip
        assert set(measure(tokens, groups=2, forms=("print",)).values()) == {expected}


WORKER = """
import multiprocessing, os, sys, time
from imagent_jax.tiny.recipe import end_with_parent

def work(queue):
    end_with_parent()
    queue.put(os.getpid())
    time.sleep(120)

if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    context.Process(target=work, args=(queue,), daemon=True).start()
    print(queue.get(), flush=True)
    time.sleep(120)
"""


@pytest.mark.slow(10)
def test_the_process_that_draws_the_data_ends_with_a_build_that_is_killed(tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(WORKER)
    parent = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    worker = int(parent.stdout.readline())
    os.kill(worker, 0)  # it runs
    parent.kill()
    parent.wait()
    for _ in range(200):
        time.sleep(0.1)
        try:
            os.kill(worker, 0)
        except ProcessLookupError:
            return
    os.kill(worker, signal.SIGKILL)
    raise AssertionError("the worker outlived the build")
