"""Features of the images of one rollout, cached by image content: an image shown again is not encoded again.

Features lie in pages of equally many rows: row r is row `r % rows` of page `r // rows`. A bounded number of pages is on the
device, older ones are in host memory. No compiled program depends on how many images or pages there are: one program puts the
features of a page at the tokens of a batch, and runs once for every page that the batch needs.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, Shaped

from imagent_jax.distributed.mesh import GROUPS, constrain, fitting, several_devices, shard_count
from imagent_jax.images.prepare import PreparedImage, first_fit, pack_images
from imagent_jax.model.vlm import Model, at_tokens, encode_images


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def _encode_into(model: Model, params: nnx.State, page: Float[Array, "F E"], row, patches, coords, image) -> Float[Array, "F E"]:
    """Encode a pack and write its features at `row` of a page."""
    features = encode_images(model, params, patches, coords, image)
    return constrain(jax.lax.dynamic_update_slice(page, features.astype(page.dtype), (row, 0)))


@partial(jax.jit, static_argnums=(0, 1))
def _pull_back(model: Model, trained, params: nnx.State, patches, coords, image, cotangent: Float[Array, "F E"]) -> nnx.State:
    """Return the gradient of the tower's `trained` parameters (an nnx filter), given the gradient of one pack's features."""
    vision, frozen = nnx.split_state(params["vision"], trained, ...)

    def encode(vision):
        whole = nnx.State({**params, "vision": nnx.merge_state(vision, frozen)})
        return encode_images(model, whole, patches, coords, image)

    return jax.vjp(encode, vision)[1](cotangent)[0]


def _within(page: Float[Array, "F E"], vision: Int[Array, "*b S"], first) -> Int[Array, "*b S"]:
    """Return the row in a page, whose first feature row is `first`, of every token (negative: not in this page)."""
    row = vision - first
    return jnp.where(row < len(page), row, -1)


@partial(jax.jit, donate_argnums=0)
def _show(shown: Float[Array, "*b S E"], page: Float[Array, "F E"], vision: Int[Array, "*b S"], first) -> Float[Array, "*b S E"]:
    """Add the features of a page at their tokens to those of other pages."""
    return constrain(shown + at_tokens(page, _within(page, vision, first)), GROUPS)


@partial(jax.jit, donate_argnums=0)
def _add_shown(
    total: Float[Array, "F E"], gradient: Float[Array, "*b S E"], vision: Int[Array, "*b S"], first
) -> Float[Array, "F E"]:
    """Add to a page what its rows get of a gradient at tokens; the transpose of `_show`."""
    row = _within(total, vision, first)
    return constrain(total.at[jnp.where(row < 0, len(total), row)].add(gradient.astype(total.dtype), mode="drop"))


class Pages:
    """Numbered arrays of one shape. The `room` newest are on the device.

    Args:
        make: returns the array of a number that was not set; None: there is none, and to read one is a KeyError.
        keep: older ones move to host memory; else they are made again.
    """

    def __init__(self, room: int, make: Callable[[int], Array] | None = None, keep: bool = True):
        self.room, self.make, self.keep = room, make, keep
        self.device: dict[int, Array] = {}
        self.host: dict[int, tuple[np.ndarray, jax.sharding.Sharding]] = {}

    def __len__(self) -> int:
        return len(self.device) + len(self.host)

    def __iter__(self) -> Iterator[int]:
        return iter(sorted([*self.device, *self.host]))

    def __getitem__(self, number: int) -> Shaped[Array, "..."]:
        if number in self.host:
            array, place = self.host[number]
            return jax.make_array_from_callback(array.shape, place, array.__getitem__)
        if number not in self.device and self.make:
            self[number] = self.make(number)
        return self.device[number]

    def __setitem__(self, number: int, array: Array) -> None:
        self.host.pop(number, None)
        self.device.pop(number, None)
        self.device[number] = array
        while len(self.device) > self.room:
            old = next(iter(self.device))
            array = self.device.pop(old)
            if self.keep:
                self.host[old] = np.asarray(array), array.sharding


COUNTS = ("encoded", "shown", "patches", "packed")
"""Names of the counters of `EncodedImages`."""


class EncodedImages:
    """Encoded images in pages: shown at tokens, encoded again with other parameters, and differentiated.

    Args:
        rows: feature rows of a page.
        mesh: where the parameters are, if they are on a mesh.

    Attributes:
        packs: patches, coordinates and image ids of every page, where the tower is trained.
        encoded: distinct images encoded; shown: images requested; patches: patches of encoded images; packed: patch slots of
            encoded packs, padding included. All four are also metrics.
    """

    def __init__(self, model: Model, pages: Pages, rows: int, mesh: Mesh | None = None):
        self.model, self.pages, self.rows, self.mesh = model, pages, rows, mesh
        self.packs: list[tuple] = []
        self.encoded = self.shown = self.patches = self.packed = 0

    def touched(self, vision: Int[np.ndarray, "..."]) -> list[int]:
        """Return the pages of some feature rows (-1: text). There is always one, so that every batch runs the same programs."""
        return np.unique(vision[vision >= 0] // self.rows).tolist() or [0]

    def show(self, vision: Int[np.ndarray, "*b S"]) -> Float[Array, "*b S E"]:
        """Return the feature of every token, given its row; zeros for text (-1). On a mesh, `b` is split by groups."""
        shown = self._zeros(vision.shape, GROUPS)
        for page in self.touched(vision):
            shown = _show(shown, self.pages[page], vision, page * self.rows)
        return shown

    def blank(self, page: int = 0) -> Float[Array, "F E"]:
        """Return a page of zeros."""
        return self._zeros((self.rows,))

    def _zeros(self, shape: tuple[int, ...], *axes) -> Float[Array, "*shape E"]:
        """Return zeros placed as programs place what they return, so that each compiles once."""
        wanted = jax.ShapeDtypeStruct((*shape, self.model.cfg.vision.feature_dim), self.model.dtype)
        spec = fitting(wanted, *axes) if several_devices() else PartitionSpec()
        place = NamedSharding(self.mesh, spec if any(spec) else PartitionSpec()) if self.mesh else None
        return jnp.zeros(wanted.shape, wanted.dtype, device=place)

    def encode_again(self, params: nnx.State) -> "EncodedImages":
        """Return the same images under other parameters, in the same rows. A page is encoded when it is shown."""
        pages = Pages(self.pages.room, lambda page: _encode_into(self.model, params, self.blank(), 0, *self.packs[page]))
        return EncodedImages(self.model, pages, self.rows, self.mesh)

    def add_gradient(self, total: Pages, gradient: Float[Array, "*b S E"], vision: Int[np.ndarray, "*b S"]) -> None:
        """Add to the pages of `total` the gradient of what `show(vision)` returned."""
        for page in self.touched(vision):
            total[page] = _add_shown(total[page], gradient, vision, page * self.rows)

    def gradient(self, params: nnx.State, cotangent: Pages, trained=...) -> nnx.State:
        """Return the gradient of the vision tower's parameters. Every image is differentiated once.

        Args:
            cotangent: gradient of the features, of those pages that have one (`add_gradient`).
            trained: nnx filter that selects the parameters.
        """
        total = jax.tree.map(jnp.zeros_like, nnx.split_state(params["vision"], trained, ...)[0])
        for page in cotangent:
            part = _pull_back(self.model, trained, params, *self.packs[page], cotangent[page])
            total = jax.tree.map(jnp.add, total, part)
        return total


class FeatureStore(EncodedImages):
    """Features of all distinct images shown during a rollout.

    Images are packed, largest first, into the first block of `model.vision_block` patches with room. `pack_blocks` blocks form a
    pack, the unit of encoding with one compiled shape, whose features fill a page.

    Args:
        pages: pages on the device.
        frozen: the vision tower is not trained. Remaining blocks that fill less than 7/8 of a pack then go into smaller packs, of
            a quarter of `pack_blocks` and of one block, which share a page.

    """

    def __init__(self, model: Model, params: nnx.State, pack_blocks: int, pages: int = 4, frozen: bool = False):
        if jax.process_count() > 1 and not frozen:  # packs of all processes form one, with equally many blocks per device
            pack_blocks = -(-pack_blocks // shard_count(GROUPS)) * shard_count(GROUPS)
        self.params: nnx.State | None = params
        self.frozen = frozen
        self.pack = pack_blocks * model.vision_block
        mesh = getattr(jax.tree.leaves(params)[0].sharding, "mesh", None)
        super().__init__(model, Pages(pages), self.pack // model.cfg.vision.merge_unit, mesh)
        self.sizes = sorted({1, -(-pack_blocks // 4), pack_blocks}) if frozen else [pack_blocks]
        self.pages[0], self._end = self.blank(), 0
        self._first: dict[tuple, int] = {}

    def compile(self) -> None:
        """Compile every pack shape. Call it on an empty store."""
        for size in self.sizes:
            self.pages[0] = _encode_into(self.model, self.params, self.pages[0], 0, *self.blank_pack(size))

    def blank_pack(self, blocks: int) -> tuple[np.ndarray, ...]:
        """Return a pack without images."""
        return self._pack([], blocks)[0]

    @property
    def newest(self) -> Float[Array, "F E"]:
        """The page that was written last."""
        return self.pages[len(self.pages) - 1]

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
        """Encode a pack of `size` blocks, given (key, image) pairs by block, behind the last one or on a new page."""
        pack, first = self._pack([[image for _, image in pairs] for pairs in blocks], size)
        pairs, unit = [pair for pairs in blocks for pair in pairs], self.model.cfg.vision.merge_unit
        page, rows = len(self.pages) - 1, len(pack[0]) // unit
        if self._end + rows > self.rows:
            page, self._end = page + 1, 0
            self.pages[page] = self.blank()
        self.pages[page] = _encode_into(self.model, self.params, self.pages[page], self._end, *pack)
        begin = page * self.rows + self._end
        self._first |= {key: begin + at // unit for (key, _), at in zip(pairs, first, strict=True)}
        self._end += rows
        if not self.frozen:
            self.packs.append(pack)
        self.packed += len(pack[0])
        self.patches += sum(len(image.patches) for _, image in pairs)
