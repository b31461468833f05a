"""Encoded images of one rollout, kept by content: showing an image again costs no vision compute."""

import hashlib
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from imagent_jax.model.images import PreparedImage, patch_coords
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


class FeatureStore:
    """Feature rows of every distinct image shown during a rollout, on the device.

    Images are packed into packs of `pack_blocks` blocks of `model.vision_block` patches, one compiled shape; an image
    lies within one block. There is room for `packs` packs at first. Pack p owns the rows from p * pack_rows on, so the
    packs can be encoded anew, or differentiated, with the same row numbers.

    Attributes:
        features: Float[Array, "F D"], F grows by doubling.
        encoded: distinct images encoded so far; shown: images asked for so far (also metrics).
    """

    def __init__(self, model: Model, params: nnx.State, pack_blocks: int, packs: int = 4):
        self.model, self.params = model, params
        self.pack = pack_blocks * model.vision_block
        self.rows = self.pack // model.cfg.vision.merge_unit
        self.packs: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        self.features = jnp.zeros((packs * self.rows, model.cfg.text.hidden_size), model.dtype)
        self.encoded = self.shown = self.patches = 0
        self._first: dict[tuple, int] = {}

    def add(self, images: Sequence[PreparedImage]) -> list[int]:
        """Encodes what is new among `images`; returns the first feature row of each.

        Raises:
            ValueError: an image has more patches than a block holds.
        """
        block, unit = self.model.vision_block, self.model.cfg.vision.merge_unit
        keys = [(image.grid, hashlib.blake2b(image.patches.tobytes(), digest_size=16).digest()) for image in images]
        fresh = {key: image for key, image in zip(keys, images, strict=True) if key not in self._first}
        self.shown, self.encoded = self.shown + len(images), self.encoded + len(fresh)
        current, at = None, self.pack
        # first fit decreasing keeps waste small; equal sizes keep their order
        for key, image in sorted(fresh.items(), key=lambda item: -len(item[1].patches)):
            count = len(image.patches)
            if count > block:
                raise ValueError(
                    f"An image of {count} patches does not fit images.vision_block={block}; raise it, or lower max_pixels."
                )
            if at % block + count > block:
                at += -at % block
            if at + count > self.pack:
                self._encode(current)
                current, at = self._new_pack(), 0
            patches, coords, image_id = current
            patches[at : at + count] = image.patches
            coords[at : at + count] = patch_coords(image.grid, self.model.cfg.vision.spatial_merge_size)
            image_id[at : at + count] = len(self._first)
            self._first[key] = len(self.packs) * self.rows + at // unit
            at, self.patches = at + count, self.patches + count
        self._encode(current)
        return [self._first[key] for key in keys]

    def _new_pack(self):
        c = self.model.cfg.vision.patch_dim
        return np.zeros((self.pack, c), np.float32), np.zeros((self.pack, 2), np.int32), np.full(self.pack, -1, np.int32)

    def _encode(self, pack) -> None:
        if pack is None:
            return
        row = len(self.packs) * self.rows
        if row + self.rows > self.features.shape[0]:
            self.features = jnp.concatenate([self.features, jnp.zeros_like(self.features)])
        self.features = _encode_into(self.model, self.params, self.features, row, *pack)
        self.packs.append(pack)

    def encode_again(self, params: nnx.State) -> jax.Array:
        """The features of every pack under other parameters, same rows."""
        features = jnp.zeros_like(self.features)
        for i, pack in enumerate(self.packs):
            features = _encode_into(self.model, params, features, i * self.rows, *pack)
        return features

    def gradient(self, params: nnx.State, cotangent: jax.Array, trained=...) -> nnx.State:
        """Gradient of the tower's parameters, given that of the features ([F D]); each image once.

        Args:
            trained: an nnx filter, which of the parameters.
        """
        total = jax.tree.map(jnp.zeros_like, nnx.split_state(params["vision"], trained, ...)[0])
        for i, pack in enumerate(self.packs):
            part = cotangent[i * self.rows : (i + 1) * self.rows]
            total = jax.tree.map(jnp.add, total, _pull_back(self.model, trained, params, *pack, part))
        return total
