"""What a tower shows of digits: `python benchmarks/tower_digits.py [FOLDER ...]`, by default the embedded bases.

A linear layer is trained on frozen features of the train split, of all kinds of views at once, and reads held-out ones: crops,
prints as they are, prints repaired, prints with two marks, pages in their large view. Ten classes: chance is 10 %. A minute.
Writes benchmarks/results/tower_digits.json.
"""

import argparse
import json
from pathlib import Path

import common
import jax
import jax.numpy as jnp
import numpy as np
import optax

from imagent_jax.model import checkpoint
from imagent_jax.model.processor import Processor
from imagent_jax.model.vlm import encode_images
from imagent_jax.tiny import total_world
from imagent_jax.tiny.base import base_folder, tools_folder
from imagent_jax.tiny.build import BLOCK
from imagent_jax.tiny.code_world import draw_problems
from imagent_jax.tiny.corpus_code import Shown
from imagent_jax.tiny.corpus_style import GIVEN
from imagent_jax.tiny.vision import View, pack_views, scene_views
from imagent_jax.tiny.vision_tools import TOOL_HEADS, large_view, print_view
from imagent_jax.tiny.world import make_scene

KINDS = ("crops", "prints", "repaired", "marks", "pages")
VIEWS = 40
"""Scenes, prints or pages of a pack."""


def views(rng: np.random.Generator, kind: str, split: str) -> list[View]:
    """Return views of a kind, all of whose digits can be read."""
    varied = split == "train"
    if kind == "crops":
        scenes = [make_scene(rng, split, varied=varied) for _ in range(VIEWS)]
        return [view for view in scene_views(rng, scenes, 0, GIVEN) if view.digits]
    if kind == "pages":
        return [large_view(total_world.make_page(rng, split, varied=varied)) for _ in range(VIEWS)]
    repaired = kind == "repaired"
    return [
        print_view(Shown(rng, split, draw_problems(rng) if repaired else (), repaired, marks=2 if kind == "marks" else 1))
        for _ in range(2 * VIEWS)
    ]


def read(folder: Path, packs: int) -> dict[str, float]:
    """Return the share of held-out digits that the layer reads, by kind."""
    model, params = checkpoint.load(folder, vision_block=BLOCK)
    processor, encode = Processor.from_pretrained(folder), jax.jit(lambda *pack: encode_images(model, params, *pack))

    def examples(kind: str, split: str, seed: int):
        rng, shown, digits = np.random.default_rng(seed), [], []
        for _ in range(packs):
            pack = pack_views(views(rng, kind, split), processor, BLOCK, VIEWS, TOOL_HEADS)
            known = pack.labels["digit"] >= 0
            shown.append(np.asarray(encode(*pack[:3]))[known])
            digits.append(pack.labels["digit"][known])
        return np.concatenate(shown), np.concatenate(digits)

    train = [examples(kind, "train", 1) for kind in KINDS]
    x, y = (np.concatenate(part) for part in zip(*train, strict=True))
    middle, spread = x.mean(0), x.std(0) + 1e-6
    layer, optimizer = {"w": jnp.zeros((x.shape[1], 10)), "b": jnp.zeros(10)}, optax.adam(1e-2)

    @jax.jit
    def update(layer, state):
        def loss(layer):
            logits = jnp.asarray((x - middle) / spread) @ layer["w"] + layer["b"]
            return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean() + 1e-4 * (layer["w"] ** 2).sum()

        updates, state = optimizer.update(jax.grad(loss)(layer), state)
        return optax.apply_updates(layer, updates), state

    state = optimizer.init(layer)
    for _ in range(600):
        layer, state = update(layer, state)
    right = {}
    for kind in KINDS:
        features, digits = examples(kind, "test", 2)
        said = ((features - middle) / spread @ layer["w"] + layer["b"]).argmax(-1)
        right[kind] = round(float((np.asarray(said) == digits).mean()), 3)
    return right


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="*", type=Path, help="of bases")
    parser.add_argument("--packs", type=int, default=10, help="packs of a kind and split")
    args = parser.parse_args()
    path = common.RESULTS / "tower_digits.json"
    result = json.loads(path.read_text()) if path.exists() else {}
    for folder in args.folders or (base_folder(), tools_folder()):
        built = json.loads((folder / "built.json").read_text())
        result[folder.name] = read(folder, args.packs) | {"steps": built.get("steps"), "seconds": built.get("seconds")}
        print(folder.name, result[folder.name], flush=True)
        path.write_text(json.dumps(result | {"machine": common.machine()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
