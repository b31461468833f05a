"""Controls of an evaluation: what accuracy is left where the agent is shown something else than it asked to see."""

import copy
import zlib
from collections.abc import Sequence

import numpy as np
from PIL import Image

from imagent_jax.rollout.engine import RolloutEngine
from imagent_jax.tools import ImageRegistry
from imagent_jax.types import CallStatus, ImageEntry, Trajectory

CONTROLS = {"shuffle": "a random other image in place of every one a tool shows", "blank": "all images grey"}


def controlled(engine: RolloutEngine, control: str, done: Sequence[Trajectory], seed: int) -> RolloutEngine:
    """The engine with a control of `CONTROLS`; sizes and token counts stay what they were.

    Args:
        done: the trajectories of the true evaluation, whose observations `shuffle` draws from: every image that a call
            shows gives way to one that the agent saw in another task.
        seed: of that draw, which depends on the replaced pixels besides, not on the order of the rollouts.
    Raises:
        ValueError: there is no such control.
    """
    if control not in CONTROLS:
        raise ValueError(f"There is no control {control!r}; choose {' or '.join(CONTROLS)}.")
    engine = copy.copy(engine)
    if control == "blank":
        engine.look = lambda registry, entry, observed: Image.new("RGB", entry.image.size, (128, 128, 128))
        return engine
    pool = [
        (_fingerprint(t.registry), t.registry[number].image)
        for t in done for turn in t.turns if turn.call and turn.call.status == CallStatus.EXECUTED
        for number in turn.call.images
    ]  # fmt: skip

    def other(registry: ImageRegistry, entry: ImageEntry, observed: bool) -> Image.Image:
        own = _fingerprint(registry) if observed else 0
        others = [image for owner, image in pool if owner != own] if observed else []
        if not others:
            return entry.image
        rng = np.random.default_rng((seed, zlib.crc32(entry.image.tobytes())))
        return others[rng.integers(len(others))].resize(entry.image.size, Image.Resampling.BICUBIC)

    engine.look = other
    return engine


def _fingerprint(registry: ImageRegistry) -> int:
    """Tells tasks apart by the pixels of their first image."""
    return zlib.crc32(registry[1].image.tobytes())
