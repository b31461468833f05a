"""Interleaved text and images as token ids, M-RoPE positions and feature rows (NumPy, on the host)."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from imagent_jax.images.prepare import PreparedImage
from imagent_jax.model.positions import mrope_positions
from imagent_jax.model.processor import Processor


class Encoded(NamedTuple):
    """Encoded text and images.

    Attributes:
        ids: token ids, int32 [S].
        positions: M-RoPE positions, int32 [3 S].
        next_position: position after the last token.
        image_index: index into `images` of each placeholder's image, -1 for text, int32 [S].
        image_offset: feature row within that image, int32 [S].
        images: prepared images, in order.
    """

    ids: np.ndarray  # int32 [S]
    positions: np.ndarray  # int32 [3 S]
    next_position: int
    image_index: np.ndarray  # int32 [S]
    image_offset: np.ndarray  # int32 [S]
    images: list[PreparedImage]

    def vision(self, first_rows: Sequence[int]) -> np.ndarray:
        """Return the feature row of every token (-1: text), int32 [S].

        Args:
            first_rows: first feature row of each image.
        """
        if not self.images:
            return np.full(len(self.ids), -1, np.int32)
        first = np.asarray(first_rows, np.int32)[np.maximum(self.image_index, 0)]
        return np.where(self.image_index >= 0, first + self.image_offset, -1).astype(np.int32)


def encode_parts(parts: Sequence[str | tuple[str, ...] | PreparedImage], processor: Processor, start: int = 0) -> Encoded:
    """Encode interleaved text and images as token ids, M-RoPE positions from `start` on, and image placement.

    Args:
        parts: a text, several that are tokenised as one, or an image. Only `Markup` holds marker tokens.
    Raises:
        ValueError: image placeholders and features do not match (promise 5).
    """
    ids: list[int] = []
    images = [part for part in parts if isinstance(part, PreparedImage)]
    for part in parts:
        if isinstance(part, PreparedImage):
            ids += processor.image_ids(part.grid)
        else:
            ids += processor.encode(*([part] if isinstance(part, str) else part))
    merge = processor.merge_size
    grids = [image.grid for image in images]
    array = np.asarray(ids, np.int32)
    positions, next_position = mrope_positions(array, processor.image_token_id, grids, merge, start)
    index, offset = np.full(len(ids), -1, np.int32), np.zeros(len(ids), np.int32)
    counts = [h * w // merge**2 for h, w in grids]
    places = np.flatnonzero(array == processor.image_token_id)
    index[places] = np.repeat(np.arange(len(counts)), counts)
    offset[places] = np.concatenate([np.arange(c) for c in counts]) if counts else []
    return Encoded(array, positions, next_position, index, offset, images)


def pad_prompts(prompts: Sequence[Encoded], vision: Sequence[np.ndarray], width: int):
    """Return right-padded token ids [N P], positions [3 N P] and feature rows [N P] (padding: -1) of prompts.

    Args:
        vision: feature row of every token, by prompt.
        width: P.
    """
    n = len(prompts)
    ids, positions, rows = np.zeros((n, width), np.int32), np.zeros((3, n, width), np.int32), np.full((n, width), -1)
    for k, (prompt, index) in enumerate(zip(prompts, vision, strict=True)):
        s = len(prompt.ids)
        ids[k, :s], positions[:, k, :s], rows[k, :s] = prompt.ids, prompt.positions, index
    return ids, positions, rows.astype(np.int32)
