"""Controls of an evaluation: accuracy when the agent is shown other images than those it requested."""

import zlib
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from PIL import Image

from imagent_jax.rollout.environment import ToolEnvironment
from imagent_jax.types import CallStatus, ImageEntry, Trajectory

CONTROLS = {"shuffle": "a random other image in place of every one a tool shows", "blank": "all images grey"}


class BlankEnvironment(ToolEnvironment):
    """Environment in which all images are grey."""

    def view(self, entry: ImageEntry, observed: bool) -> Image.Image:
        return Image.new("RGB", entry.size[::-1], (128, 128, 128))


class ShuffledEnvironment(ToolEnvironment):
    """Environment in which every image shown by a call is replaced by a random image that the agent saw in another task.

    The choice depends on `seed` and on the replaced pixels, not on the order of the rollouts.

    Args:
        pool: images to draw from, each with the fingerprint of its task.
    """

    def __init__(self, *args, pool: Sequence[tuple[int, Image.Image]], seed: int):
        super().__init__(*args)
        self.pool, self.seed = tuple(pool), seed  # a tuple: forks share it

    def view(self, entry: ImageEntry, observed: bool) -> Image.Image:
        own = fingerprint(self.images) if observed else 0
        others = [image for owner, image in self.pool if owner != own] if observed else []
        if not others:
            return entry.pixels
        rng = np.random.default_rng((self.seed, zlib.crc32(entry.pixels.tobytes())))
        return others[rng.integers(len(others))].resize(entry.size[::-1], Image.Resampling.BICUBIC)


def controlled(control: str, done: Sequence[Trajectory], seed: int) -> Callable[..., ToolEnvironment]:
    """Return the environment of a control in `CONTROLS`. Image sizes and token counts do not change.

    Args:
        done: trajectories of the normal evaluation; `shuffle` draws from the images that their calls showed in this process.
        seed: seed of that draw.
    Raises:
        ValueError: unknown control.
    """
    if control not in CONTROLS:
        raise ValueError(f"There is no control {control!r}; choose {' or '.join(CONTROLS)}.")
    if control == "blank":
        return BlankEnvironment
    pool = [
        (fingerprint(t.images), t.images[number - 1].pixels)
        for t in done if t.images for turn in t.turns if turn.call and turn.call.status == CallStatus.EXECUTED
        for number in turn.call.images
    ]  # fmt: skip
    return partial(ShuffledEnvironment, pool=pool, seed=seed)


def fingerprint(images: Sequence[ImageEntry]) -> int:
    """Return a checksum of the first image's pixels, which identifies a task."""
    return zlib.crc32(images[0].pixels.tobytes())
