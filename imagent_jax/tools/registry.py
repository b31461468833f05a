"""Images of one trajectory by number: their original pixels, the size they are shown at, and where they come from."""

from collections.abc import Iterator

from PIL import Image

from imagent_jax.images.prepare import to_rgb
from imagent_jax.types import ImageEntry, ToolError


class ImageRegistry:
    """The numbered images of one trajectory; numbers are 1-based and never change or get reused."""

    def __init__(self) -> None:
        self._entries: list[ImageEntry] = []

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[ImageEntry]:
        return iter(self._entries)

    def __getitem__(self, number: int) -> ImageEntry:
        """The entry of an image number. Raises ToolError naming the valid numbers when there is no such image."""
        if type(number) is int and 1 <= number <= len(self._entries):
            return self._entries[number - 1]
        valid = {0: "there are no images", 1: "the only image is 1"}
        raise ToolError(
            f"there is no Image {str(number)[:12]}; " + valid.get(len(self), f"image numbers are 1 to {len(self)}")
        )

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
    ) -> int:
        """Register an image and return its number.

        Args:
            image: pixels at their own resolution; converted to RGB.
            shown: (height, width) in pixels as the policy sees it.
            parent, box, origin, min_pixels, max_pixels: see ImageEntry.

        Raises:
            TypeError: `image` is not a PIL image.
            ValueError: `shown` is not two positive integers, or `box` is given without a
                parent or reaches outside it.
            ToolError: `parent` is not a registered number.
        """
        if not isinstance(image, Image.Image):
            raise TypeError(f"the registry takes PIL images, got {type(image).__name__}; convert it first")
        height, width = (int(side) for side in shown)
        if height < 1 or width < 1:
            raise ValueError(f"shown must be a positive (height, width), got {tuple(shown)}")
        if parent is not None:
            source = self[parent].image
        if box is not None:
            if parent is None:
                raise ValueError("a box needs the parent it was cut from; pass parent=")
            left, top, right, bottom = (int(edge) for edge in box)
            if not (0 <= left < right <= source.width and 0 <= top < bottom <= source.height):
                raise ValueError(
                    f"box {tuple(box)} is not inside Image {parent}, {source.width} x {source.height} pixels"
                )
            box = (left, top, right, bottom)
        rgb = to_rgb(image)
        rgb.load()  # decoded once, here: tools on several threads then only read it
        number = len(self._entries) + 1
        self._entries.append(ImageEntry(number, rgb, (height, width), parent, box, origin, min_pixels, max_pixels))
        return number

    def fork(self) -> "ImageRegistry":
        """A registry with the same entries that can grow on its own (pixels are shared, not copied)."""
        other = ImageRegistry()
        other._entries = list(self._entries)
        return other

    def adopt(self, fork: "ImageRegistry") -> None:
        """Take over the images that were added to `fork`, made from this registry by fork().

        Raises ValueError when this registry has grown since, because the fork's numbers would then name other images.
        """
        mine, theirs = self._entries, fork._entries
        if len(theirs) < len(mine) or any(a is not b for a, b in zip(mine, theirs, strict=False)):
            raise ValueError("the registry changed since it was forked; run one call at a time on a registry")
        self._entries = list(theirs)
