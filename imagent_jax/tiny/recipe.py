"""Builds a base from nothing by one command: `python -m imagent_jax.tiny.recipe NAME [--out FOLDER] [--seconds N] [--scale X]`.

A recipe trains a tokenizer, then the vision tower in one stage or several, then the decoder with the tower frozen, in stages too,
and measures the skills. It works chunk by chunk. A chunk's data is a function of the seed, the stage and its number; after each
chunk weights, optimizer state and progress are written. The same command continues a build that was stopped, to the same result.
`built.json` records the command, the seconds, the last losses and the skills.
"""

import argparse
import importlib
import json
import multiprocessing
import os
import queue as queues
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax import nnx

from imagent_jax.config import import_path
from imagent_jax.model import checkpoint
from imagent_jax.model.families import read_config
from imagent_jax.model.processor import Processor
from imagent_jax.model.vlm import Model, create
from imagent_jax.tiny.build import (
    BLOCK,
    FIRST,
    SHAPES,
    TOOL_SHAPES,
    Shape,
    architecture,
    collate,
    encode_group,
    ids_of_ends,
    muon,
    train_step,
)
from imagent_jax.tiny.tokenizer import NAMED_VALUES, VALUES, build_tokenizer
from imagent_jax.tiny.vision import new_head, vision_step, whitening


@dataclass(frozen=True)
class Recipe:
    """How a base is made. Functions are named by import path, so that a worker process can find them.

    Attributes:
        folder: below `assets/`.
        corpus: module with `make_group`, `corpus_texts`, `FORMS` and `FIRST_FORMS`, and `LATER_FORMS` where stages need them.
        packs: by stage of the tower, the function that draws its packs; `heads` are their labels.
        skills: function of the folder that returns the skills.
        steps: updates of each stage, in order: those of the tower, then the decoder's: "text", and those that have a mixture of
            forms in `LATER_FORMS` of the corpus.
        texts: conversations that the tokenizer is trained on, for a vocabulary of `vocabulary` pieces.
        rate: peak learning rate.
        chunk: updates between two states on disk.
    """

    folder: str
    corpus: str
    packs: Mapping[str, str]
    heads: str
    skills: str
    shapes: Mapping[str, tuple[Shape, ...]]
    values: str
    vocabulary: int
    steps: Mapping[str, int]
    texts: int = 6000
    rate: float = 2e-3
    chunk: int = 250
    seed: int = 0

    def scaled(self, factor: float) -> "Recipe":
        """Return the recipe with so many times the updates, in chunks of about so many times the size."""
        chunk = max(round(self.chunk * min(4 * factor, 1.0)), 1)
        steps = {stage: max(round(factor * count / chunk), 1) * chunk for stage, count in self.steps.items()}
        return replace(self, steps=steps, chunk=chunk)


DIGITS = {"digits": "imagent_jax.tiny.vision_tools:digits_pack", "sizes": "imagent_jax.tiny.vision_tools:sizes_pack"}
"""Stages that every tower begins with."""
RECIPES = {
    "tools": Recipe(
        folder="tools", corpus="imagent_jax.tiny.corpus_tools",
        packs=DIGITS | {"vision": "imagent_jax.tiny.vision_tools:tool_pack"},
        heads="imagent_jax.tiny.vision_tools:TOOL_HEADS", skills="imagent_jax.tiny.skills_tools:measure", shapes=TOOL_SHAPES,
        values=NAMED_VALUES, vocabulary=1408,
        steps={"digits": 1000, "sizes": 2500, "vision": 1750, "text": 4500, "last": 1500, "copies": 1000},
    ),
    "tiny": Recipe(
        folder="base", corpus="imagent_jax.tiny.corpus",
        packs=DIGITS | {"vision": "imagent_jax.tiny.vision:crowded_pack"},
        heads="imagent_jax.tiny.vision:HEADS", skills="imagent_jax.tiny.skills:measure", shapes=SHAPES,
        values=VALUES, vocabulary=1024, steps={"digits": 1000, "sizes": 2000, "vision": 1500, "text": 6000},
    ),
}  # fmt: skip
"""By name of the base as `model.path` has it without "tiny_" (`model.checkpoint.EMBEDDED`)."""


def found(path: str):
    """Return what `package.module:name` names."""
    return import_path(path, "recipe")


# ---- data ---------------------------------------------------------------------------------------------------------------


def generator(recipe: Recipe, stage: str, chunk: int) -> np.random.Generator:
    """Return the generator that a chunk's data is drawn with."""
    return np.random.default_rng((recipe.seed, list(recipe.steps).index(stage), chunk))


def packs(recipe: Recipe, processor: Processor, stage: str, chunk: int) -> Iterator:
    """Yield the packs of a chunk of the tower's updates."""
    rng, pack = generator(recipe, stage, chunk), found(recipe.packs[stage])
    for _ in range(recipe.chunk):
        yield pack(rng, processor, BLOCK)


def batches(recipe: Recipe, processor: Processor, stage: str, chunk: int) -> Iterator:
    """Yield the batches of a chunk of the decoder's updates: groups are collected by shape, and a full shape is a batch."""
    rng, corpus = generator(recipe, stage, chunk), importlib.import_module(recipe.corpus)
    first = (chunk + 0.5) * recipe.chunk < FIRST * recipe.steps["text"]
    forms = (corpus.FIRST_FORMS if first else corpus.FORMS) if stage == "text" else corpus.LATER_FORMS[stage]
    waiting, done = {shape: [] for shapes in recipe.shapes.values() for shape in shapes}, 0
    while done < recipe.chunk:
        form = str(rng.choice(list(forms), p=list(forms.values())))
        prompt, responses = encode_group(corpus.make_group(rng, recipe.shapes[form][0].size, form), processor)
        longest = max(sum(len(one.ids) for one, _ in response) for response in responses)
        shape = next((s for s in recipe.shapes[form] if s.width >= longest and s.prompt >= len(prompt.ids)), None)
        if shape is None:
            continue
        waiting[shape].append((prompt, responses))
        if len(waiting[shape]) == shape.groups:
            yield collate(waiting.pop(shape), shape, processor.merge_size)
            waiting[shape] = []
            done += 1


def produce(recipe: Recipe, folder: str, stage: str, first: int, last: int, out) -> None:
    """Worker process: put the items of chunks `first` to `last` (exclusive) of a stage."""
    end_with_parent()
    processor = Processor.from_pretrained(folder)
    for chunk in range(first, last):
        for item in (packs if stage in recipe.packs else batches)(recipe, processor, stage, chunk):
            out.put(item)


def end_with_parent() -> None:
    """Have this process end when the one that started it has ended, however that was."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


# ---- state --------------------------------------------------------------------------------------------------------------


def save_state(path: Path, tree, facts: dict) -> None:
    """Write the leaves of a tree and facts about them as one file; an older file stays until the new one is whole."""
    leaves = {f"{i:04d}": np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(tree))}
    part = path.with_suffix(".part")
    part.write_bytes(safetensors.numpy.save(leaves, {"facts": json.dumps(facts)}))
    os.replace(part, path)


def load_state(path: Path, tree):
    """Return a tree of the structure of `tree` with the leaves of the file."""
    stored = safetensors.numpy.load_file(path)
    leaves, structure = jax.tree.flatten(tree)
    assert len(stored) == len(leaves), "the state is of another recipe"
    return jax.tree.unflatten(structure, [jnp.asarray(stored[f"{i:04d}"], leaf.dtype) for i, leaf in enumerate(leaves)])


def state_facts(path: Path, recipe: Recipe) -> dict:
    """Return the facts of a state; of none, those of a build that has not begun.

    Raises:
        SystemExit: the state has other stages or other numbers of updates.
    """
    steps = dict(recipe.steps)
    if not path.exists():
        return {"stage": next(iter(steps)), "chunk": 0, "seconds": 0.0, "last": {}, "steps": steps}
    with safetensors.safe_open(path, framework="numpy") as file:
        facts = json.loads(file.metadata()["facts"])
    if facts.get("steps") != steps:
        raise SystemExit(f"{path} is of a build that another recipe began; remove it or name another --out.")
    return facts


# ---- building -----------------------------------------------------------------------------------------------------------


def start(recipe: Recipe, out: Path) -> tuple[Processor, Model, nnx.State]:
    """Return processor, model and new parameters; the tokenizer is trained where there is none."""
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "tokenizer.json").exists():
        build_tokenizer(
            out, importlib.import_module(recipe.corpus).corpus_texts(recipe.texts, recipe.seed), recipe.vocabulary, recipe.values
        )
    processor = Processor.from_pretrained(out)
    end_of_text, turn_close = ids_of_ends(processor)
    ends = {"eos_token_id": turn_close, "pad_token_id": end_of_text, "do_sample": False}
    (out / "generation_config.json").write_text(json.dumps(ends, indent=2))
    vocab = len(processor.tokenizer)
    model, params = create(read_config(architecture(processor, vocab + -vocab % 64)), recipe.seed, vision_block=BLOCK)
    rng, first = np.random.default_rng((recipe.seed, len(recipe.packs) + 1)), next(iter(recipe.packs))
    patch_embed = whitening(model.cfg.vision, [found(recipe.packs[first])(rng, processor, BLOCK) for _ in range(6)])
    held = params["vision"]
    held["patch_embed"] = held["patch_embed"].replace(jnp.asarray(patch_embed))  # ty: ignore[not-callable] - a parameter
    return processor, model, params


def trained_of(stage: str, recipe: Recipe, model, params: nnx.State):
    """Return what a stage trains: the tower with a new head, or the decoder."""
    if stage not in recipe.packs:
        return jax.tree.map(jnp.copy, params["text"])
    return jax.tree.map(jnp.copy, params["vision"]), new_head(model.cfg.text.hidden_size, recipe.seed, found(recipe.heads))


def build(recipe: Recipe, out: Path, command: str, enough: Callable[[], bool] = lambda: False) -> bool:
    """Build a base in `out`, or continue to. Return whether it is complete: `enough`, asked after every chunk, ends it early.

    Raises:
        SystemExit: `out` has weights that no state continues, or a state of another recipe.
    """
    if (out / "built.json").exists():
        print(f"{out} is complete; name another --out to build it anew.")
        return True
    if (out / "model.safetensors").exists() and not (out / "state.safetensors").exists():
        raise SystemExit(f"{out} has weights, and no state to continue from; name another --out.")
    processor, model, params = start(recipe, out)
    path, began = out / "state.safetensors", time.time()
    done, stages = state_facts(path, recipe), list(recipe.steps)
    last, before = done["last"], done["seconds"]
    for stage in stages[stages.index(done["stage"]) :]:
        seeing = stage in recipe.packs
        optimizer, trained = muon(recipe.rate, recipe.steps[stage]), trained_of(stage, recipe, model, params)
        opt_state, first = optimizer.init(trained), done["chunk"] if stage == done["stage"] else 0
        if first:
            trained, opt_state, params = load_state(path, (trained, opt_state, params))
        step = vision_step if seeing else train_step
        for chunk, items in chunks(recipe, out, stage, first):
            record = []
            for item in items:
                item = (item,) if seeing else item
                trained, opt_state, value = step(model, optimizer, params, trained, opt_state, *item)
                record.append(value)
            params = nnx.State({**params, **({"vision": trained[0]} if seeing else {"text": trained})})
            recent = jax.device_get(record[-100:])
            last = last | {stage: {k: round(float(np.mean([r[k] for r in recent])), 4) for k in recent[0]}}
            seconds = before + time.time() - began
            print(f"{stage} {(chunk + 1) * recipe.chunk}/{recipe.steps[stage]}  {last[stage]}  {seconds:.0f} s", flush=True)
            facts = done | {"stage": stage, "chunk": chunk + 1, "seconds": seconds, "last": last}
            save_state(path, (trained, opt_state, params), facts)
            checkpoint.save(out, model, params, dtype=jnp.bfloat16)
            if enough():
                return False
    size = sum(x.size for x in jax.tree.leaves(params))
    facts = {
        "parameters": size,
        "command": command,
        "steps": dict(recipe.steps),
        "seconds": round(before + time.time() - began),
        **last,
    }
    (out / "built.json").write_text(json.dumps(facts | {"skills": found(recipe.skills)(out)}, indent=2))
    path.unlink(missing_ok=True)
    print((out / "built.json").read_text())
    return True


def chunks(recipe: Recipe, out: Path, stage: str, first: int) -> Iterator[tuple[int, Iterator]]:
    """Yield the number and the items of every chunk of a stage from `first` on; a process of its own makes them."""
    total = recipe.steps[stage] // recipe.chunk
    if first == total:
        return
    context = multiprocessing.get_context("spawn")
    queue = context.Queue(6)
    worker = context.Process(target=produce, args=(recipe, str(out), stage, first, total, queue), daemon=True)
    worker.start()

    def next_item():
        while True:
            try:
                return queue.get(timeout=60)
            except queues.Empty:
                if not worker.is_alive():
                    raise RuntimeError("the process that draws the data ended; its message stands above") from None

    try:
        for chunk in range(first, total):
            yield chunk, (next_item() for _ in range(recipe.chunk))
    finally:
        worker.terminate()


def main(argv=None) -> int:
    """Run the command: exit code 0; 3 where `--seconds` ended it before it was complete."""
    parser = argparse.ArgumentParser(prog="imagent_jax.tiny.recipe", description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=RECIPES, help="the base")
    parser.add_argument("--out", type=Path, help="its folder (default: in the package)")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after the chunk in which so many have passed")
    parser.add_argument("--scale", type=float, default=1.0, help="times the updates of the recipe, for trials")
    args = parser.parse_args(argv)
    recipe, began = RECIPES[args.name], time.time()
    recipe = recipe if args.scale == 1 else recipe.scaled(args.scale)
    out = args.out or Path(__file__).parent / "assets" / recipe.folder
    command = f"python -m imagent_jax.tiny.recipe {args.name}" + (f" --scale {args.scale:g}" if args.scale != 1 else "")
    return 0 if build(recipe, out, command, lambda: time.time() - began > args.seconds) else 3


if __name__ == "__main__":
    sys.exit(main())
