"""Encoded images of one rollout, kept by content: showing an image again costs no vision compute."""

import hashlib
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from imagent_jax.model.images import PreparedImage, pack_images
from imagent_jax.model.qwen2_vl import Model, encode_images


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def _encode_into(model: Model, params: nnx.State, buffer, row, patches, coords, image):
    features = encode_images(model, params, patches, coords, image)
    return jax.lax.dynamic_update_slice(buffer, features, (row, 0))


@partial(jax.jit, static_argnums=(0, 1))
def _pull_back(model: Model, trained, params: nnx.State, patches, coords, image, cotangent):
    """Gradient of the tower's `trained` parameters (a filter), given the gradient of one pack's features."""
    vision, frozen = nnx.split_state(params["vision"], trained, ...)

    def encode(vision):
        whole = nnx.State({**params, "vision": nnx.merge_state(vision, frozen)})
        return encode_images(model, whole, patches, coords, image)

    return jax.vjp(encode, vision)[1](cotangent)[0]


COUNTS = ("encoded", "shown", "patches", "packed")
"""What a `FeatureStore` counts."""


class FeatureStore:
    """Feature rows of every distinct image shown during a rollout, on the device.

    Images are packed into blocks of `model.vision_block` patches, first fit with the largest first, and blocks into packs of
    `pack_blocks`, one compiled shape. There is room for `packs` packs at first. The rows of the packs follow each other, so
    the packs can be encoded anew, or differentiated, with the same row numbers.

    Args:
        remainders: what does not fill a pack (seven eighths of it) goes into packs of a quarter of its blocks, and of one.

    Attributes:
        features: Float[Array, "F D"], F grows by doubling.
        encoded: distinct images encoded so far; shown: images asked for so far; patches, packed: patches of images, and
            places for patches, encoded so far (also metrics).
    """

    def __init__(self, model: Model, params: nnx.State, pack_blocks: int, packs: int = 4, remainders: bool = False):
        self.model, self.params = model, params
        self.sizes = sorted({1, -(-pack_blocks // 4), pack_blocks}) if remainders else [pack_blocks]
        self.pack = pack_blocks * model.vision_block
        self.packs: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        self.features = jnp.zeros((packs * self._rows(self.pack), model.cfg.text.hidden_size), model.dtype)
        self.encoded = self.shown = self.patches = self.packed = 0
        self._first: dict[tuple, int] = {}

    def _rows(self, patches: int) -> int:
        return patches // self.model.cfg.vision.merge_unit

    def compile(self) -> None:
        """Compiles every shape; nothing is in the store yet."""
        for size in self.sizes:
            blank = PreparedImage(np.zeros((0, self.model.cfg.vision.patch_dim), np.float32), (0, 0), (0, 0))
            *pack, _ = pack_images([blank], self.model.vision_block, size)
            self.features = _encode_into(self.model, self.params, self.features, 0, *pack)

    def add(self, images: Sequence[PreparedImage]) -> list[int]:
        """Encodes what is new among `images`; returns the first feature row of each.

        Raises:
            ValueError: an image has more patches than a block holds.
        """
        block = self.model.vision_block
        keys = [(image.grid, hashlib.blake2b(image.patches.tobytes(), digest_size=16).digest()) for image in images]
        fresh = {key: image for key, image in zip(keys, images, strict=True) if key not in self._first}
        self.shown, self.encoded = self.shown + len(images), self.encoded + len(fresh)
        blocks, room = [], []
        for key, image in sorted(fresh.items(), key=lambda item: -len(item[1].patches)):  # equal sizes keep their order
            count = len(image.patches)
            if count > block:
                raise ValueError(
                    f"An image of {count} patches does not fit images.vision_block={block}; raise it, or lower max_pixels."
                )
            at = next((i for i, free in enumerate(room) if free >= count), len(blocks))
            if at == len(blocks):
                blocks.append([])
                room.append(block)
            blocks[at].append((key, image))
            room[at] -= count
        while blocks:
            size = max((size for size in self.sizes if 8 * len(blocks) >= 7 * size), default=self.sizes[0])
            self._encode([pair for pairs in blocks[:size] for pair in pairs], size)
            blocks = blocks[size:]
        return [self._first[key] for key in keys]

    def _encode(self, pairs: Sequence[tuple], size: int) -> None:
        """A pack of `size` blocks."""
        cfg, images = self.model.cfg.vision, [image for _, image in pairs]
        *pack, first = pack_images(images, self.model.vision_block, size, cfg.spatial_merge_size)
        row, end = self._rows(self.packed), self._rows(self.packed + len(pack[0]))
        while end > self.features.shape[0]:
            self.features = jnp.concatenate([self.features, jnp.zeros_like(self.features)])
        self.features = _encode_into(self.model, self.params, self.features, row, *pack)
        self._first |= {key: row + self._rows(at) for (key, _), at in zip(pairs, first, strict=True)}
        self.packs.append(pack)
        self.packed += len(pack[0])
        self.patches += sum(len(image.patches) for image in images)

    def encode_again(self, params: nnx.State) -> jax.Array:
        """The features of every pack under other parameters, same rows."""
        features, row = jnp.zeros_like(self.features), 0
        for pack in self.packs:
            features = _encode_into(self.model, params, features, row, *pack)
            row += self._rows(len(pack[0]))
        return features

    def gradient(self, params: nnx.State, cotangent: jax.Array, trained=...) -> nnx.State:
        """Gradient of the tower's parameters, given that of the features ([F D]); each image once.

        Args:
            trained: an nnx filter, which of the parameters.
        """
        total, row = jax.tree.map(jnp.zeros_like, nnx.split_state(params["vision"], trained, ...)[0]), 0
        for pack in self.packs:
            part, row = cotangent[row : row + self._rows(len(pack[0]))], row + self._rows(len(pack[0]))
            total = jax.tree.map(jnp.add, total, _pull_back(self.model, trained, params, *pack, part))
        return total
