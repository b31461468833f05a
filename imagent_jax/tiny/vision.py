"""Stage 1 of the tiny base: train the vision tower with a label at every merged feature.

A linear head on each feature predicts the tag whose centre lies in it (colour, digit, corner of the surrounding box) and the
feature's own row and column. The head is discarded.
"""

from collections.abc import Iterable, Mapping
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from PIL import Image

from imagent_jax.images.prepare import PreparedImage, pack_images
from imagent_jax.model.config import VisionConfig
from imagent_jax.model.processor import Processor
from imagent_jax.model.vision import normalise
from imagent_jax.model.vlm import Model, encode_images
from imagent_jax.tiny.corpus import BOX, SETTINGS, STEP, THUMBNAIL, box_near, box_of
from imagent_jax.tiny.world import COLOURS, SIZES, Scene, Tag, make_crowded_scene, make_scene

HEADS = {"colour": len(COLOURS) + 1, "digit": 10, "x": 1000 // STEP + 1, "y": 1000 // STEP + 1, "row": 8, "column": 8}
"""Number of classes per label; label -1 is ignored. "digit" is trained on crops only."""
BLOCKS = 52
SCENES = 60
"""Scenes per pack; each gives its thumbnail and crops around two of its tags."""


class Labelled(NamedTuple):
    """A pack of images and the labels int32 [F] of its merged features, by head."""

    patches: np.ndarray
    coords: np.ndarray
    image: np.ndarray
    labels: dict[str, np.ndarray]


def in_blocks(images: Iterable[PreparedImage], block: int) -> list[list[PreparedImage]]:
    """Return images by block of `block` patches, in their order."""
    blocks, room = [], 0
    for image in images:
        if len(image.patches) > room:
            blocks, room = [*blocks, []], block
        blocks[-1].append(image)
        room -= len(image.patches)
    return blocks


class View(NamedTuple):
    """What a pack shows of a scene: pixels, their budget, the tags in them, and which labels are known.

    Attributes:
        tags: (x, y, tag) by fractions of the view's sides.
        digits: digits can be read.
        corners: the view is a whole scene, so that the box around a tag can be told.
        more: labels of all features, by head.
    """

    pixels: np.ndarray
    budget: tuple[int, int]
    tags: list[tuple[float, float, Tag]]
    digits: bool
    corners: bool = False
    more: dict[str, int] = {}


def labelled_pack(rng: np.random.Generator, processor: Processor, block: int, crowded: int = 0) -> Labelled:
    """Return thumbnails and crops of `SCENES` scenes of the train split, with labels.

    The crops of the first `crowded` scenes are replaced by equally large images full of tags, with about three times as many
    digits.
    """
    scenes = [make_scene(rng, "train", varied=True) for _ in range(SCENES)]
    return pack_views(scene_views(rng, scenes, crowded, THUMBNAIL), processor, block, BLOCKS, HEADS)


crowded_pack = partial(labelled_pack, crowded=40)
"""What the recipe of the tiny base trains on."""


def scene_views(rng: np.random.Generator, scenes: list[Scene], crowded: int, given: tuple[int, int]) -> list[View]:
    """Return crops around two tags of every scene, see `labelled_pack`, then the scenes as they are given."""
    parts = [(scene, box_near(rng, scene, tag)) for scene in scenes for tag in scene.tags[:2]]
    side = round(BOX / 1000 * SIZES[0][0])
    for i in range(2 * crowded):
        parts[i] = (make_crowded_scene(rng, "train", side, side), (0, 0, side, side))
    views = []
    for scene, box in parts + [(scene, None) for scene in scenes]:
        height, width = scene.pixels.shape[:2]
        left, top, right, bottom = box or (0, 0, width, height)
        spots = [((t.x * width - left) / (right - left), (t.y * height - top) / (bottom - top), t) for t in scene.tags]
        spots = [(x, y, tag) for x, y, tag in spots if 0 <= x < 1 and 0 <= y < 1]
        budget = (SETTINGS.confirm_min_pixels, SETTINGS.confirm_max_pixels) if box else given
        views.append(View(scene.pixels[top:bottom, left:right], budget, spots, digits=bool(box), corners=not box))
    return views


def pack_views(views: list[View], processor: Processor, block: int, blocks: int, heads: Mapping[str, int]) -> Labelled:
    """Return a pack of views and the labels of their merged features; -1 where a label of `heads` is not known."""
    images = [processor.prepare(Image.fromarray(view.pixels), *view.budget) for view in views]
    merge, patch_bytes = processor.merge_size, images[0].patches.shape[1]
    patches, coords, image, first = pack_images(in_blocks(images, block), block, blocks, merge=merge, patch_bytes=patch_bytes)
    labels = {name: np.full(len(patches) // merge**2, -1, np.int32) for name in heads}
    for prepared, start, view in zip(images, first, views, strict=True):
        rows, columns = prepared.grid[0] // merge, prepared.grid[1] // merge
        own = slice(start // merge**2, start // merge**2 + rows * columns)
        labels["row"][own] = np.repeat(np.arange(rows), columns)
        labels["column"][own] = np.tile(np.arange(columns), rows)
        labels["colour"][own] = len(COLOURS)
        for name, value in view.more.items():
            labels[name][own] = value
        for x, y, tag in view.tags:
            at = own.start + int(y * rows) * columns + int(x * columns)
            labels["colour"][at] = COLOURS.index(tag.colour)
            if view.digits:
                labels["digit"][at] = tag.digit
            if view.corners:
                corner = box_of(tag)
                labels["x"][at], labels["y"][at] = corner[0] // STEP, corner[1] // STEP
    return Labelled(patches, coords, image, labels)


def whitening(cfg: VisionConfig, packs: list[Labelled]) -> np.ndarray:
    """Return a patch embedding, float32 [C, D], whose outputs on these patches are uncorrelated with unit variance.

    It holds the leading principal components, each divided by its standard deviation, so that fine strokes weigh as much as
    brightness.
    """
    patches = np.concatenate([normalise(cfg, pack.patches[pack.image >= 0]) for pack in packs]).astype(np.float64)
    values, vectors = np.linalg.eigh(np.cov(patches, rowvar=False))
    return (vectors[:, -cfg.embed_dim :] / np.sqrt(values[-cfg.embed_dim :] + 1e-2)).astype(np.float32)


def new_head(width: int, seed: int, heads: Mapping[str, int] = HEADS) -> dict[str, jax.Array]:
    """Return the weights of a linear layer to all classes."""
    keys = jax.random.split(jax.random.key(seed), len(heads))
    return {n: jax.random.normal(k, (width, c)) * width**-0.5 for k, (n, c) in zip(keys, heads.items(), strict=True)}


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=4)
def vision_step(model: Model, optimizer, params, trained, opt_state, pack: Labelled):
    """Update (tower, head) on a pack; return them, the optimizer state, and the accuracy of each head."""

    def loss(trained):
        tower, head = trained
        whole = nnx.State({**params, "vision": tower})
        features = encode_images(model, whole, *pack[:3])  # ty: ignore[invalid-argument-type] - JAX's inside of jit
        total, right = 0.0, {}
        for name, weights in head.items():
            labels, logits = pack.labels[name], features @ weights
            known = labels >= 0
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(labels, 0))
            count = jnp.maximum(known.sum(), 1)
            total += jnp.sum(jnp.where(known, losses, 0)) / count
            right[name] = jnp.sum(known & (logits.argmax(-1) == labels)) / count
        return total, right

    (_, right), gradients = jax.value_and_grad(loss, has_aux=True)(trained)
    updates, opt_state = optimizer.update(gradients, opt_state, trained)
    return optax.apply_updates(trained, updates), opt_state, right
