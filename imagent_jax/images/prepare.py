"""Image preparation: Qwen2-VL's resize and patches with PIL and NumPy. Patches stay uint8; the vision tower normalises them."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from imagent_jax.images.decode import to_rgb

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class PreparedImage(NamedTuple):
    """An image cut into patches for the vision tower.

    Attributes:
        patches: uint8 [n, channels * patch_size**2], merge unit by merge unit.
        grid: (h, w) in patches.
        size: (height, width) in pixels.
    """

    patches: np.ndarray
    grid: tuple[int, int]
    size: tuple[int, int]


def smart_resize(
    height: int, width: int, factor: int = 28, min_pixels: int = 56 * 56, max_pixels: int = 28 * 28 * 1280
) -> tuple[int, int]:
    """Return the (height, width) to which an image is resized, with about the same aspect ratio.

    Both sides are multiples of `factor`, and their product lies in `min_pixels` to `max_pixels`. Equals transformers' function of
    the same name.

    Raises:
        ValueError: the longer side is more than 200 times the shorter.
    """
    if max(height, width) > 200 * min(height, width):
        raise ValueError(
            f"An image of {width} x {height} pixels is too narrow: the longer side may be at most 200 times the shorter; crop it."
        )
    h, w = round(height / factor) * factor, round(width / factor) * factor
    if h * w > max_pixels:
        scale = math.sqrt(height * width / max_pixels)
        h = max(factor, math.floor(height / scale / factor) * factor)
        w = max(factor, math.floor(width / scale / factor) * factor)
    elif h * w < min_pixels:
        scale = math.sqrt(min_pixels / (height * width))
        h, w = math.ceil(height * scale / factor) * factor, math.ceil(width * scale / factor) * factor
    return h, w


def fit_budget(
    size: tuple[int, int], factor: int, min_pixels: int, max_pixels: int, most_pixels: int
) -> tuple[tuple[int, int], int, int]:
    """Return the (height, width) at which an image is shown, and the pixel budget (min_pixels, max_pixels) that gives this size.

    The budget is lowered where `smart_resize` would exceed `most_pixels`, as with long strips and enlarged images.

    Args:
        size: (height, width) of the image in pixels.
        most_pixels: upper limit of the shown area, in pixels.
    Raises:
        ValueError: see `smart_resize`.
    """
    while math.prod(shown := smart_resize(*size, factor, min_pixels, max_pixels)) > max(most_pixels, factor**2):
        max_pixels = max_pixels * 7 // 8
        min_pixels = min(min_pixels, max_pixels)
    return shown, min_pixels, max_pixels


def prepare_image(image: Image.Image, *, min_pixels: int, max_pixels: int, patch_size: int, merge_size: int) -> PreparedImage:
    """Resize an image to a pixel budget and cut it into patches.

    With `vision.normalise`, equals transformers' `Qwen2VLImageProcessorPil`.

    Raises:
        ValueError: see `smart_resize`.
    """
    size = smart_resize(image.height, image.width, patch_size * merge_size, min_pixels, max_pixels)
    return prepare_to(image, size, patch_size=patch_size, merge_size=merge_size)


def prepare_to(image: Image.Image, size: tuple[int, int], *, patch_size: int, merge_size: int) -> PreparedImage:
    """Resize an image (bicubic, uint8) to (height, width), multiples of `patch_size * merge_size`, and cut it into patches."""
    image, (height, width) = to_rgb(image), size
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    gh, gw = height // patch_size, width // patch_size
    tiles = np.asarray(image).reshape(gh // merge_size, merge_size, patch_size, gw // merge_size, merge_size, patch_size, 3)
    patches = tiles.transpose(0, 3, 1, 4, 6, 2, 5).reshape(gh * gw, -1)
    return PreparedImage(patches, (gh, gw), (height, width))


def patch_coords(grid: tuple[int, int], merge: int) -> np.ndarray:
    """Return the (h, w) of every patch, int32 [n, 2], in the patch order of `prepare_image`."""
    h, w = grid
    at = np.stack(np.meshgrid(np.arange(h), np.arange(w), indexing="ij"), axis=-1).astype(np.int32)
    return at.reshape(h // merge, merge, w // merge, merge, 2).transpose(0, 2, 1, 3, 4).reshape(-1, 2)


def first_fit(counts: Sequence[int], block: int) -> list[list[int]]:
    """Assign images to blocks: the largest first, each to the first block with room.

    Args:
        counts: patches of each image.
        block: patches of a block.
    Returns:
        For each block, the indices of its images.
    Raises:
        ValueError: an image has more patches than a block.
    """
    blocks, room = [], []
    for index in sorted(range(len(counts)), key=lambda i: -counts[i]):  # stable for equal sizes
        if counts[index] > block:
            raise ValueError(
                f"An image of {counts[index]} patches does not fit images.vision_block={block}; raise it, or lower max_pixels."
            )
        at = next((i for i, free in enumerate(room) if free >= counts[index]), len(blocks))
        if at == len(blocks):
            blocks.append([])
            room.append(block)
        blocks[at].append(index)
        room[at] -= counts[index]
    return blocks


def pack_images(blocks: Sequence[Sequence[PreparedImage]], block: int, n_blocks: int, *, merge: int, patch_bytes: int):
    """Lay images out in `n_blocks` blocks of `block` patches.

    Args:
        blocks: the images of each block, in order (`first_fit`); the last blocks may be left out.
        merge: patches along a side of a merge unit.
        patch_bytes: bytes of a patch.
    Returns:
        patches uint8 [M, bytes], coords int32 [M, 2], image_id int32 [M] (-1: padding), and the first patch row of each image.
    Raises:
        ValueError: there are more than `n_blocks` blocks.
    """
    if len(blocks) > n_blocks:
        raise ValueError(f"{sum(map(len, blocks))} images need {len(blocks)} blocks of {block} patches; there are {n_blocks}.")
    m, first = block * n_blocks, []
    patches, coords, image_id = np.zeros((m, patch_bytes), np.uint8), np.zeros((m, 2), np.int32), np.full(m, -1, np.int32)
    for number, images in enumerate(blocks):
        at = number * block
        for image in images:
            rows = slice(at, at + len(image.patches))
            patches[rows], coords[rows], image_id[rows] = image.patches, patch_coords(image.grid, merge), len(first)
            first.append(at)
            at = rows.stop
    return patches, coords, image_id, first


def image_settings(folder: Path, default: dict | None = None) -> dict:
    """Return the image settings of a folder, from either file in which Hugging Face stores them.

    Raises:
        ValueError: a file is unreadable, or both are missing and there is no `default`.
    """
    older, newer = folder / "preprocessor_config.json", folder / "processor_config.json"
    for path in (older, newer):
        if path.is_file():
            try:
                settings = json.loads(path.read_text())
            except ValueError as error:
                raise ValueError(f"{path} is not valid JSON ({error}); download it again.") from error
            if path == older or "image_processor" in settings:
                return settings if path == older else settings["image_processor"]
    if default is not None:
        return default
    raise ValueError(f"{folder} holds no preprocessor_config.json; name a folder with a complete Qwen2-VL processor.")
