"""Controls of an evaluation: what accuracy is left where the agent is shown something else than it asked to see."""

import zlib
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from PIL import Image

from imagent_jax.rollout.environment import ToolEnvironment
from imagent_jax.types import CallStatus, ImageEntry, Trajectory

CONTROLS = {"shuffle": "a random other image in place of every one a tool shows", "blank": "all images grey"}


class BlankEnvironment(ToolEnvironment):
    """All images are grey."""

    def view(self, entry: ImageEntry, observed: bool) -> Image.Image:
        return Image.new("RGB", entry.image.size, (128, 128, 128))


class ShuffledEnvironment(ToolEnvironment):
    """Every image that a call shows gives way to one of `pool`, (task, image), that the agent saw in another task.

    The choice depends on `seed` and on the replaced pixels, not on the order of the rollouts.
    """

    def __init__(self, *args, pool: Sequence[tuple[int, Image.Image]], seed: int):
        super().__init__(*args)
        self.pool, self.seed = pool, seed

    def view(self, entry: ImageEntry, observed: bool) -> Image.Image:
        own = fingerprint(self.images) if observed else 0
        others = [image for owner, image in self.pool if owner != own] if observed else []
        if not others:
            return entry.image
        rng = np.random.default_rng((self.seed, zlib.crc32(entry.image.tobytes())))
        return others[rng.integers(len(others))].resize(entry.image.size, Image.Resampling.BICUBIC)


def controlled(control: str, done: Sequence[Trajectory], seed: int) -> Callable[..., ToolEnvironment]:
    """Return the environment of a control of `CONTROLS`. Sizes and token counts stay what they were.

    Args:
        done: the trajectories of the true evaluation; `shuffle` draws from the images that their calls showed.
        seed: of that draw.
    Raises:
        ValueError: there is no such control.
    """
    if control not in CONTROLS:
        raise ValueError(f"There is no control {control!r}; choose {' or '.join(CONTROLS)}.")
    if control == "blank":
        return BlankEnvironment
    pool = [
        (fingerprint(t.images), t.images[number - 1].image)
        for t in done for turn in t.turns if turn.call and turn.call.status == CallStatus.EXECUTED
        for number in turn.call.images
    ]  # fmt: skip
    return partial(ShuffledEnvironment, pool=pool, seed=seed)


def fingerprint(images: Sequence[ImageEntry]) -> int:
    """Tell tasks apart by the pixels of their first image."""
    return zlib.crc32(images[0].image.tobytes())
