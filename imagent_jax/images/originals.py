"""Originals of given images: pixels in host memory up to a bound. Others are decoded again when a tool needs them."""

import threading
import weakref

from PIL import Image

from imagent_jax.images.decode import read_image


class Original:
    """The pixels of an image file in RGB, see `Originals`.

    Attributes:
        size: (width, height) in pixels, as of a PIL image.
    """

    def __init__(self, data: bytes, size: tuple[int, int], kept: "Originals"):
        self.data, self.size, self.pixels, self._kept = data, size, None, kept

    def decoded(self) -> Image.Image:
        """Return the pixels. Only read them: all who ask share them."""
        image = read_image(self.data) if (pixels := self.pixels) is None else pixels
        self._kept.use(self, image)
        return image


class Originals:
    """Keeps the pixels of the originals that were used last. An original that nobody holds any more takes no room.

    Args:
        room: most bytes of pixels.
    """

    def __init__(self, room: float = 4e9):
        self.room, self._used, self._lock = room, [], threading.Lock()

    def add(self, data: bytes, image: Image.Image) -> Original:
        """Return the original of an image file with the pixels `image`."""
        original = Original(data, image.size, self)
        self.use(original, image)
        return original

    def use(self, original: Original, image: Image.Image) -> None:
        """Keep the pixels of an original, and let go of those that were not used for longest."""
        with self._lock:
            held = [one for one in (ref() for ref in self._used) if one is not None and one is not original and one.pixels]
            original.pixels, total = image, sum(map(_bytes, [*held, original]))
            for one in [*held, original]:
                if total > self.room:
                    one.pixels, total = None, total - _bytes(one)
            self._used = [weakref.ref(one) for one in [*held, original] if one.pixels]


def _bytes(original: Original) -> int:
    return 4 * original.size[0] * original.size[1]  # Pillow holds a pixel of RGB in four bytes
