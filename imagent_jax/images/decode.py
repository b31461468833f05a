"""Decoding: from any image file or PIL image to 8-bit RGB pixels. Every source of images comes through here.

- Grey, palette, 1-bit, CMYK, YCbCr, LAB and HSV become RGB as Pillow converts them. Colour profiles are not applied.
- Transparency (RGBA, LA, PA, a transparent colour) is composed over white, as transformers' image processor does. Its
  `load_image` drops alpha instead, which shows colours that no viewer shows.
- Grey of 16 bits is scaled to 8 bits, 65535 to 255. (transformers clips at 255: nearly all is white.) Colour files of 16 bits a
  channel are scaled by Pillow. A grey TIFF file of 12 bits is scaled from 4095, and one whose white is zero is inverted.
- Pixels that are 32-bit integers or floats are refused, because their white is not known. (transformers clips them.)
- Of an animation, or a file of several pages, the first frame counts, as in transformers.
- A file is turned as its EXIF orientation says, as all viewers and `transformers.image_utils.load_image` do. Boxes are in turned
  pixels.
"""

import base64
import contextlib
import io

import numpy as np
from PIL import Image, ImageOps

_BITS, _PHOTOMETRIC = 258, 262
"""Tags of a TIFF file."""
_ALPHA = ("RGBA", "RGBa", "LA", "La", "PA")


def read_image(data: bytes) -> Image.Image:
    """Return the pixels of an image file in RGB, turned as its EXIF orientation says.

    Raises:
        ValueError: the file does not decode, or see `to_rgb`; the message is a clause about "it".
    """
    try:
        image = Image.open(io.BytesIO(data))
        image.load()
    except Exception as error:  # Pillow's decoders raise many kinds
        raise ValueError("it does not decode") from error
    return to_rgb(_turn(image))


def read_pil(image: Image.Image) -> Image.Image:
    """Return the pixels of a PIL image as `read_image` would those of its file. The image itself is not changed.

    Raises:
        ValueError: see `to_rgb`.
    """
    own = image.copy()
    own.format = image.format
    own = _turn(own)
    own.__dict__["tag_v2"] = getattr(image, "tag_v2", {})  # of a TIFF file; a copy loses it
    return to_rgb(own)


def _turn(image: Image.Image) -> Image.Image:
    """Turn a loaded image in place as its EXIF orientation says. Damaged EXIF data counts as none."""
    with contextlib.suppress(Exception):
        ImageOps.exif_transpose(image, in_place=True)
    return image


def to_rgb(image: Image.Image) -> Image.Image:
    """Return an image in RGB by the rules above; the image itself if it is in RGB. EXIF orientation is not applied.

    Raises:
        ValueError: the pixels are 32-bit numbers, whose white is not known.
    """
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):  # Pillow scales PGM files to 16 bits
        return _from_16_bits(image)
    if image.mode in ("I", "F"):
        raise ValueError(f"its pixels are 32-bit numbers (mode {image.mode}), whose white is not known: convert it to 8 bits")
    if image.mode in _ALPHA or image.info.get("transparency") is not None:
        image = image.convert("LA") if image.mode == "La" else image
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _from_16_bits(image: Image.Image) -> Image.Image:
    """Return a grey image of 16 bits in RGB; its transparent value, where it has one, becomes white."""
    pixels, tags = np.asarray(image).astype(np.uint32), getattr(image, "tag_v2", {})
    white = 2 ** tags.get(_BITS, (16,))[0] - 1
    grey = (pixels * 255 + white // 2) // white
    if tags.get(_PHOTOMETRIC) == 0:  # white is zero
        grey = 255 - grey
    if (transparent := image.info.get("transparency")) is not None:
        grey[pixels == transparent] = 255
    return Image.fromarray(grey.astype(np.uint8)).convert("RGB")


def data_uri(data: bytes, side: int, largest: int) -> str:
    """Return an image file for a page, as a data URI that every browser shows with the pixels of `read_image`.

    Args:
        side: longer side in pixels of the JPEG that stands for a file of more than `largest` bytes, or one of another kind than
            JPEG, PNG, GIF and WebP.
    """
    with Image.open(io.BytesIO(data)) as image:
        kind = (image.format or "").lower()
    if len(data) > largest or kind not in ("jpeg", "png", "gif", "webp"):
        image = read_image(data)
        image.thumbnail((side, side))
        image.save(out := io.BytesIO(), "JPEG", quality=85)
        data, kind = out.getvalue(), "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
