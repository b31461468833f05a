"""The two visual tools, and the conversion of box coordinates."""

import math
from collections.abc import Sequence
from typing import Literal

from imagent_jax.tools.context import ToolContext
from imagent_jax.tools.decorator import tool
from imagent_jax.tools.schema import Tool
from imagent_jax.types import ImageEntry, ImageNumber, ToolError


@tool
def visual_reflection(context: ToolContext, images: list[int], resolution: Literal["low", "high"] = "low") -> list[ImageNumber]:
    """Show whole images again, to look at them with a question in mind or to compare them. They may be larger than before.

    Args:
        images: numbers of the images to show, in the order in which you want to see them
        resolution: high shows more detail and costs more of your text
    """
    if not images:
        raise ToolError("images must name at least one image")
    if len(set(images)) < len(images):
        raise ToolError("images must name each image once")
    settings = context.settings
    budget = settings.high_pixels if resolution == "high" else settings.low_pixels
    shown: list[ImageNumber] = []
    for number in images:
        least = context.registry[number].min_pixels or settings.patch_factor**2
        shown.append(context.show_again(number, min(least, budget), budget))
    return list(dict.fromkeys(shown))  # two numbers may give the same view


@tool
def visual_confirmation(
    context: ToolContext, image: int, bbox_2d: tuple[float, float, float, float], label: str = ""
) -> list[ImageNumber]:
    """Look closely at a part of an image: it is cut out of the original and enlarged, so that small text and details can be read.

    Args:
        image: number of the image
        bbox_2d: the part as [x1, y1, x2, y2], its left, top, right and bottom edge, {space}
        label: what you expect to see there, in a few words
    """
    return _look_closely(context, image, bbox_2d, context.settings.coordinates)


@tool
def image_zoom_in_tool(
    context: ToolContext, bbox_2d: tuple[float, float, float, float], label: str, img_idx: int
) -> list[ImageNumber]:
    """Zoom in on a part of an image: it is cut out of the original and enlarged.

    Args:
        bbox_2d: the part as [x1, y1, x2, y2], from 0 to 1000 across the width and the height of the image
        label: what there is in the part
        img_idx: number of the image, from 0
    """
    count = len(context.registry)
    if not 0 <= img_idx < count:
        raise ToolError(f"img_idx must be from 0 to {count - 1}" if count else "there are no images")
    return _look_closely(context, img_idx + 1, bbox_2d, "relative_1000")


def _look_closely(context: ToolContext, image: int, bbox_2d: Sequence[float], coordinates: str) -> list[ImageNumber]:
    entry = context.registry[image]
    box = grow_box(to_pixels(bbox_2d, entry, coordinates), entry.size, context.settings.min_box)
    return [context.show(entry.pixels.crop(box), parent=image, box=box)]


VISUAL_TOOLS: dict[str, Tool] = {item.name: item for item in (visual_reflection, visual_confirmation)}
ALIASES: dict[str, Tool] = {"image_zoom_in_tool": image_zoom_in_tool}
"""Tools of other systems' models: visual_confirmation with the name and arguments of Qwen-Agent."""


def coordinate_limits(entry: ImageEntry, coordinates: str) -> tuple[float, float]:
    """Return (width, height) of the coordinate space of an image's boxes."""
    return (1000, 1000) if coordinates == "relative_1000" else (entry.shown[1], entry.shown[0])


def to_pixels(bbox: Sequence[float], entry: ImageEntry, coordinates: str, argument: str = "bbox_2d") -> tuple[int, int, int, int]:
    """Convert a box from the declared coordinate space to original pixels.

    Args:
        bbox: [x1, y1, x2, y2] in the declared space.
        entry: the image.
        coordinates: "relative_1000" or "absolute" (pixels of the image as shown).
        argument: name of the box in error messages.

    Returns:
        (left, top, right, bottom) in pixels of the image, inside the image, at least one pixel per side.

    Raises:
        ToolError: the box is inverted, empty, or not inside the image.
    """
    width, height = coordinate_limits(entry, coordinates)
    x1, y1, x2, y2 = bbox
    if x1 >= x2 or y1 >= y2:
        raise ToolError(f"{argument} must be [x1, y1, x2, y2] with x1 < x2 and y1 < y2")
    if x1 < 0 or y1 < 0 or x2 > width or y2 > height:
        where = "from 0 to 1000" if coordinates == "relative_1000" else f"inside {width} x {height} pixels"
        raise ToolError(f"{argument} must lie {where}")
    rows, columns = entry.size
    left, right = _pixel_span(x1 / width, x2 / width, columns)
    top, bottom = _pixel_span(y1 / height, y2 / height, rows)
    return left, top, right, bottom


def to_bbox(box: Sequence[float], entry: ImageEntry, coordinates: str) -> tuple[float, float, float, float]:
    """Convert a box from original pixels to the declared coordinate space; inverse of `to_pixels`, without rounding."""
    width, height = coordinate_limits(entry, coordinates)
    rows, columns = entry.size
    return box[0] * width / columns, box[1] * height / rows, box[2] * width / columns, box[3] * height / rows


def grow_box(box: tuple[int, int, int, int], size: tuple[int, int], min_box: float) -> tuple[int, int, int, int]:
    """Enlarge a pixel box about its centre to at least `min_box` of each side of an image of `size` (height, width).

    A box that would exceed the image is moved inside.
    """
    left, right = _grow_span(box[0], box[2], size[1], min_box)
    top, bottom = _grow_span(box[1], box[3], size[0], min_box)
    return left, top, right, bottom


def _pixel_span(start: float, stop: float, side: int) -> tuple[int, int]:
    """Convert fractions of a side to whole pixels [first, last), rounded to the nearest, never empty."""
    first, last = round(start * side), round(stop * side)
    if first == last:
        first = min(int((start + stop) / 2 * side), side - 1)
        last = first + 1
    return first, last


def _grow_span(start: int, stop: int, side: int, fraction: float) -> tuple[int, int]:
    length = min(max(math.ceil(fraction * side), 1), side)
    if stop - start >= length:
        return start, stop
    first = min(max(round((start + stop - length) / 2), 0), side - length)
    return first, first + length
