"""Features of the images of one rollout, cached by image content: an image shown again is not encoded again."""

import hashlib
from collections.abc import Iterator, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from imagent_jax.distributed.mesh import constrain
from imagent_jax.images.prepare import PreparedImage, first_fit, pack_images
from imagent_jax.model.vlm import Model, encode_images


@partial(jax.jit, static_argnums=0, static_argnames=("lanes", "rows"), donate_argnums=2)
def _encode_into(model: Model, params: nnx.State, buffer, row, patches, coords, image, lanes=1, rows=0):
    """Encode a pack and write its features at `row` of `buffer`, lane by lane.

    Args:
        lanes: number of equal parts of the pack and of the buffer, stored one after another.
        rows: rows to write per lane; 0: all.
    """
    features = encode_images(model, params, patches, coords, image)
    features = features.reshape(lanes, -1, features.shape[-1])[:, : rows or None]
    by_lane = jax.lax.dynamic_update_slice(buffer.reshape(lanes, -1, buffer.shape[-1]), features, (0, row, 0))
    return constrain(by_lane.reshape(buffer.shape))


@partial(jax.jit, static_argnums=(0, 1))
def _pull_back(model: Model, trained, params: nnx.State, patches, coords, image, cotangent):
    """Return the gradient of the tower's `trained` parameters (an nnx filter), given the gradient of one pack's features."""
    vision, frozen = nnx.split_state(params["vision"], trained, ...)

    def encode(vision):
        whole = nnx.State({**params, "vision": nnx.merge_state(vision, frozen)})
        return encode_images(model, whole, patches, coords, image)

    return jax.vjp(encode, vision)[1](cotangent)[0]


@partial(jax.jit, static_argnames=("lanes", "rows", "size"))
def _rows_of(features, row, lanes, rows, size):
    """Return what `_encode_into` wrote at `row`, zero-padded to the shape of a pack's features (`size` rows per lane)."""
    part = jax.lax.dynamic_slice_in_dim(features.reshape(lanes, -1, features.shape[-1]), row, rows, axis=1)
    return jnp.pad(part, ((0, 0), (0, size - rows), (0, 0))).reshape(lanes * size, -1)


COUNTS = ("encoded", "shown", "patches", "packed")
"""Names of the counters of a `FeatureStore`."""


class EncodedPacks:
    """Packs of images that can be encoded again with other parameters, and differentiated, with unchanged feature rows.

    Args:
        features: Float[Array, "F D"].
        pack: patches per lane of a pack.
        lanes: number of equal parts of each pack and of `features`, stored one after another.
    """

    def __init__(self, model: Model, features: jax.Array, pack: int, lanes: int = 1):
        self.model, self.features, self.pack, self.lanes = model, features, pack, lanes
        self.packs: list[tuple] = []  # patches, coordinates, image ids

    def _rows(self, patches: int) -> int:
        return patches // self.model.cfg.vision.merge_unit

    def _again(self) -> Iterator[tuple[int, int, int, tuple]]:
        """Yield for every pack: its first row in a lane, used rows, total rows, and its arrays."""
        row = 0
        for pack in self.packs:
            size = self._rows(len(pack[0])) // self.lanes
            rows = min(size, self._rows(self.pack))
            yield row, rows, size, pack
            row += rows

    def encode_again(self, params: nnx.State) -> jax.Array:
        """Return the features of every pack under other parameters, in the same rows."""
        features = jnp.zeros_like(self.features)
        for row, rows, size, pack in self._again():
            features = _encode_into(self.model, params, features, row, *pack, lanes=self.lanes, rows=rows % size)
        return features

    def gradient(self, params: nnx.State, cotangent: jax.Array, trained=...) -> nnx.State:
        """Return the gradient of the vision tower's parameters. Every image is differentiated once.

        Args:
            cotangent: gradient of the features, [F D].
            trained: nnx filter that selects the parameters.
        """
        total = jax.tree.map(jnp.zeros_like, nnx.split_state(params["vision"], trained, ...)[0])
        for row, rows, size, pack in self._again():
            part = _rows_of(cotangent, row, lanes=self.lanes, rows=rows, size=size)
            total = jax.tree.map(jnp.add, total, _pull_back(self.model, trained, params, *pack, part))
        return total


class FeatureStore(EncodedPacks):
    """Features of all distinct images shown during a rollout, on the device.

    Images are packed, largest first, into the first block of `model.vision_block` patches with room. `pack_blocks` blocks form a
    pack, the unit of encoding with one compiled shape. The rows of successive packs follow each other.

    Args:
        packs: initial capacity in packs.
        frozen: the vision tower is not trained. Remaining blocks that fill less than 7/8 of a pack then go into smaller packs, of
            a quarter of `pack_blocks` and of one block.

    Attributes:
        features: Float[Array, "F D"]; F doubles when the rows are exhausted.
        encoded: distinct images encoded; shown: images requested; patches: patches of encoded images; packed: patch slots of
            encoded packs, padding included. All four are also metrics.
    """

    def __init__(self, model: Model, params: nnx.State, pack_blocks: int, packs: int = 4, frozen: bool = False):
        size, width = pack_blocks * model.vision_block, model.cfg.vision.feature_dim
        place = jax.tree.leaves(params)[0].sharding  # the sharding `_encode_into` returns, so that it compiles once
        whole = NamedSharding(place.mesh, PartitionSpec()) if isinstance(place, NamedSharding) else None
        features = jnp.zeros((packs * size // model.cfg.vision.merge_unit, width), model.dtype, device=whole)
        super().__init__(model, features, size)
        self.params, self.frozen = params, frozen
        self.sizes = sorted({1, -(-pack_blocks // 4), pack_blocks}) if frozen else [pack_blocks]
        self.encoded = self.shown = self.patches = self.packed = 0
        self._first: dict[tuple, int] = {}

    def compile(self) -> None:
        """Compile every pack shape. Call it on an empty store."""
        for size in self.sizes:
            self.features = _encode_into(self.model, self.params, self.features, 0, *self.blank(size))

    def blank(self, blocks: int) -> tuple[np.ndarray, ...]:
        """Return a pack without images."""
        return self._pack([], blocks)[0]

    def add(self, images: Sequence[PreparedImage]) -> list[int]:
        """Encode the images that are not yet stored; return the first feature row of each image.

        Raises:
            ValueError: an image has more patches than a block.
        """
        keys = [(image.grid, hashlib.blake2b(image.patches.tobytes(), digest_size=16).digest()) for image in images]
        fresh = {key: image for key, image in zip(keys, images, strict=True) if key not in self._first}
        blocks = first_fit([len(image.patches) for image in fresh.values()], self.model.vision_block)
        self.shown, self.encoded = self.shown + len(images), self.encoded + len(fresh)
        pairs = list(fresh.items())
        while blocks:
            size = max((size for size in self.sizes if 8 * len(blocks) >= 7 * size), default=self.sizes[0])
            self._encode([[pairs[i] for i in block] for block in blocks[:size]], size)
            blocks = blocks[size:]
        return [self._first[key] for key in keys]

    def _pack(self, blocks: Sequence[Sequence[PreparedImage]], size: int) -> tuple[tuple[np.ndarray, ...], list[int]]:
        """Return a pack of `size` blocks, and the first patch row of each image."""
        cfg = self.model.cfg.vision
        *pack, first = pack_images(
            blocks, self.model.vision_block, size, merge=cfg.spatial_merge_size, patch_bytes=cfg.patch_bytes
        )
        return tuple(pack), first

    def _encode(self, blocks: Sequence[Sequence[tuple]], size: int) -> None:
        """Encode a pack of `size` blocks, given (key, image) pairs by block."""
        pack, first = self._pack([[image for _, image in pairs] for pairs in blocks], size)
        pairs = [pair for pairs in blocks for pair in pairs]
        row, end = self._rows(self.packed), self._rows(self.packed + len(pack[0]))
        while end > self.features.shape[0]:
            self.features = jnp.concatenate([self.features, jnp.zeros_like(self.features)])
        self.features = _encode_into(self.model, self.params, self.features, row, *pack)
        self._first |= {key: row + self._rows(at) for (key, _), at in zip(pairs, first, strict=True)}
        self.packs.append(pack)
        self.packed += len(pack[0])
        self.patches += sum(len(image.patches) for _, image in pairs)
