"""Which pictures are the same picture: a perceptual hash, and a comparison of colours for those whose hashes are near."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image
from scipy.fft import dctn

BITS = 8
"""Hashes that differ in at most so many of 64 bits may be of one picture."""
COLOUR = 18.0
"""Most that the colours of one place of one picture differ, of 255."""
_GRID = 8
_CUTS = ((0, 0, 0, 0), (0.03,) * 4, (0.06,) * 4, (0.08, 0, 0, 0), (0, 0.08, 0, 0), (0, 0, 0.08, 0), (0, 0, 0, 0.08))
"""Parts of the sides (left, top, right, bottom) without which a picture is compared too; the first is the whole."""


class Look(NamedTuple):
    """What is compared of a picture, whole and without parts of its sides (`_CUTS`).

    Attributes:
        hashes: uint64[7].
        colours: (Cb, Cr) of 8 x 8 places, float32[7, 8, 8, 2].
    """

    hashes: np.ndarray
    colours: np.ndarray


def look_of(image: Image.Image) -> Look:
    """Return what is compared of a picture.

    A hash has a bit for each of the 64 lowest frequencies of the cosine transform of 32 x 32 grey pixels: above their median or
    not (pHash; Zauner 2010). It hardly changes when a picture is resized or recompressed. For cropped copies, some crops are
    hashed as well.
    """
    image = image.copy()
    image.thumbnail((384, 384), reducing_gap=2.0)
    light, colour = image.convert("L"), image.convert("YCbCr")
    (width, height), hashes, colours = image.size, [], []
    for left, top, right, bottom in _CUTS:
        box = (left * width, top * height, (1 - right) * width, (1 - bottom) * height)
        grey = np.asarray(light.resize((32, 32), Image.Resampling.BOX, box), np.float64)
        low = np.asarray(dctn(grey, norm="ortho"))[:8, :8].ravel()
        hashes.append(np.packbits(low > np.median(low[1:])).view(np.uint64)[0])  # low[0] is the mean brightness
        small = colour.resize((_GRID, _GRID), Image.Resampling.BOX, box)
        colours.append(np.asarray(small, np.float32)[..., 1:])
    return Look(np.stack(hashes), np.stack(colours))


class Known:
    """Pictures that were seen, each by a name."""

    def __init__(self):
        self.names: list[str] = []
        n = len(_CUTS)
        self.hashes, self.colours = np.empty((64, n), np.uint64), np.empty((64, n, _GRID, _GRID, 2), np.float32)

    def add(self, name: str, look: Look) -> None:
        """Remember a picture."""
        n = len(self.names)
        if n == len(self.hashes):
            self.hashes, self.colours = (np.concatenate([old, np.empty_like(old)]) for old in (self.hashes, self.colours))
        self.hashes[n], self.colours[n] = look
        self.names.append(name)

    def find(self, look: Look) -> str | None:
        """Return the name of the first picture that is the same as this one, or a crop of it; None: there is none."""
        n, cuts = len(self.names), range(len(_CUTS))
        found = [n]
        for mine, its in [*((0, cut) for cut in cuts), *((cut, 0) for cut in cuts[1:])]:
            near = np.flatnonzero(np.bitwise_count(self.hashes[:n, its] ^ look.hashes[mine]) <= BITS)
            if len(near):
                far = np.abs(self.colours[near, its] - look.colours[mine]).max((1, 2, 3))
                found.extend(near[far <= COLOUR][:1].tolist())
        return None if min(found) == n else self.names[min(found)]


def histogram(image: Image.Image) -> np.ndarray:
    """Return the default embedding of a picture: shares of 64 colours, and of 8 directions of edges; float32[72], length 1."""
    pixels = np.asarray(image.resize((64, 64), Image.Resampling.BOX), np.int32)
    codes = (pixels[..., 0] >> 6) * 16 + (pixels[..., 1] >> 6) * 4 + (pixels[..., 2] >> 6)
    colours = np.bincount(codes.ravel(), minlength=64) / codes.size
    grey = pixels.mean(2)
    down, right = np.gradient(grey)
    strength, direction = np.hypot(down, right), (np.arctan2(down, right) + np.pi) / (2 * np.pi) * 8
    edges = np.bincount(direction.astype(int).ravel() % 8, strength.ravel(), minlength=8) / (strength.sum() + 1e-9)
    vector = np.concatenate([np.sqrt(colours), np.sqrt(edges)]).astype(np.float32)
    return vector / (np.linalg.norm(vector) + 1e-9)


def unit(vectors: Sequence[np.ndarray]) -> np.ndarray:
    """Return the vectors at length 1, float32[n, d]."""
    table = np.asarray(vectors, np.float32)
    return table / (np.linalg.norm(table, axis=1, keepdims=True) + 1e-9)
