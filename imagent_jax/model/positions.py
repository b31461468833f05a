"""M-RoPE positions of interleaved text and images, computed on the host."""

from collections.abc import Sequence

import numpy as np


def mrope_positions(
    ids: np.ndarray, image_token_id: int, grids: Sequence[tuple[int, int]], merge: int, start: int = 0
) -> tuple[np.ndarray, int]:
    """Return (t, h, w) positions, int32 [3, S], counted from `start`, and the position after the last token.

    Text increments all three components by one per token. An image has one t, and h and w run over its merged grid. The next
    text starts after the largest position of the image. Equals transformers' `Qwen2VLModel.get_rope_index` for images.

    Args:
        grids: (h, w) of each image in patches.
        merge: patches along a side of a merge unit.
    Raises:
        ValueError: the placeholders in `ids` do not match `grids`.
    """
    ids = np.asarray(ids)
    places = np.flatnonzero(ids == image_token_id)
    counts = [h * w // merge**2 for h, w in grids]
    if len(places) != sum(counts):
        raise ValueError(f"{len(places)} image placeholders in the text, but {len(grids)} images need {sum(counts)}.")
    positions, at, position = np.zeros((3, len(ids)), np.int32), 0, start
    taken = 0
    for (h, w), count in zip(grids, counts, strict=True):
        first = int(places[taken])
        if int(places[taken + count - 1]) - first != count - 1:
            raise ValueError("The placeholders of an image do not stand together.")
        positions[:, at:first] = position + np.arange(first - at)
        position += first - at
        rows, columns = h // merge, w // merge
        positions[0, first : first + count] = position
        positions[1, first : first + count] = position + np.repeat(np.arange(rows), columns)
        positions[2, first : first + count] = position + np.tile(np.arange(columns), rows)
        position += max(rows, columns)
        at, taken = first + count, taken + count
    positions[:, at:] = position + np.arange(len(ids) - at)
    return positions, position + len(ids) - at
