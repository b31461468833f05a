"""Image registry of a trajectory: original pixels, shown size and origin of every image, by number."""

from collections.abc import Iterator

import numpy as np
from PIL import Image

from imagent_jax.images.decode import to_rgb
from imagent_jax.images.originals import Original
from imagent_jax.types import ImageEntry, ImageNumber, ToolError


class ImageRegistry:
    """The numbered images of one trajectory. Numbers are 1-based, never change and are never reused."""

    def __init__(self) -> None:
        self._entries: list[ImageEntry] = []

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[ImageEntry]:
        return iter(self._entries)

    def __getitem__(self, number: int) -> ImageEntry:
        """Return the entry of an image number.

        Raises:
            ToolError: no such image; the message names the valid numbers.
        """
        if type(number) in (int, ImageNumber) and 1 <= number <= len(self._entries):
            return self._entries[number - 1]
        valid = {0: "there are no images", 1: "the only image is 1"}
        raise ToolError(f"there is no Image {str(number)[:12]}; " + valid.get(len(self), f"image numbers are 1 to {len(self)}"))

    def add(
        self,
        image: Image.Image,
        *,
        shown: tuple[int, int],
        parent: int | None = None,
        box: tuple[int, int, int, int] | None = None,
        origin: str = "",
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        original: Original | None = None,
    ) -> ImageNumber:
        """Register an image and return its number. Pixels that are those of its parent, or of the box there, are not kept twice.

        Args:
            image: pixels at their original resolution; converted to RGB.
            shown: (height, width) in pixels as the policy sees it.
            parent, box, origin, min_pixels, max_pixels: see ImageEntry.
            original: decodes the pixels of a given image again; it is kept in place of them.

        Raises:
            TypeError: `image` is not a PIL image.
            ValueError: `shown` is not two positive integers, or `box` has no parent or exceeds it.
            ToolError: `parent` is not a registered number.
        """
        if not isinstance(image, Image.Image):
            raise TypeError(f"the registry takes PIL images, got {type(image).__name__}; convert it first")
        height, width = (int(side) for side in shown)
        if height < 1 or width < 1:
            raise ValueError(f"shown must be a positive (height, width), got {tuple(shown)}")
        source = None if parent is None else self[parent]
        if box is not None:
            if source is None:
                raise ValueError("a box needs the parent it was cut from; pass parent=")
            left, top, right, bottom = (int(edge) for edge in box)
            rows, columns = source.size
            if not (0 <= left < right <= columns and 0 <= top < bottom <= rows):
                raise ValueError(f"box {tuple(box)} is not inside Image {parent}, {columns} x {rows} pixels")
            box = (left, top, right, bottom)
        rgb = to_rgb(image)
        rgb.load()  # decode once here: tools in several threads only read it
        number, region = ImageNumber(len(self._entries) + 1), None
        if source is not None and np.array_equal(np.asarray((part := source.part(box)).pixels), np.asarray(rgb)):
            rgb, region = part.source, part.region
        rgb = original or rgb
        self._entries.append(ImageEntry(number, rgb, (height, width), parent, box, origin, min_pixels, max_pixels, region))
        return number

    def fork(self) -> "ImageRegistry":
        """Return a registry with the same entries that can grow independently (pixels are shared)."""
        other = ImageRegistry()
        other._entries = list(self._entries)
        return other

    def adopt(self, fork: "ImageRegistry") -> None:
        """Take over the images that were added to `fork`, a fork of this registry.

        Raises:
            ValueError: this registry has grown since the fork, so that the fork's numbers would name other images.
        """
        mine, theirs = self._entries, fork._entries
        if len(theirs) < len(mine) or any(a is not b for a, b in zip(mine, theirs, strict=False)):
            raise ValueError("the registry changed since it was forked; run one call at a time on a registry")
        self._entries = list(theirs)
