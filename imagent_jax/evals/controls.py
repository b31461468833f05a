"""Controls of an evaluation: accuracy when the agent is shown other results than those it requested."""

import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
from PIL import Image

from imagent_jax.chat import Action
from imagent_jax.rollout.environment import ToolEnvironment
from imagent_jax.types import CallResult, CallStatus, ImageEntry, Task, Trajectory

CONTROLS = {"shuffle": "what tools showed in other tasks in place of every image and text", "blank": "all images grey"}


class BlankEnvironment(ToolEnvironment):
    """Environment in which all images are grey."""

    def view(self, entry: ImageEntry, observed: bool) -> Image.Image:
        return Image.new("RGB", entry.size[::-1], (128, 128, 128))


class ShuffledEnvironment(ToolEnvironment):
    """Environment in which every image and every text shown by a call is replaced by a random one of another task.

    Texts are what a program printed or a search found; lines that name images stay. The choice depends on `seed` and on what is
    replaced, not on the order of the rollouts.

    Args:
        images, texts: to draw from, each with the uid of its task.
    """

    def __init__(self, *args, images: Sequence[tuple[str, Image.Image]], texts: Sequence[tuple[str, str]], seed: int):
        super().__init__(*args)
        self.others, self.seed, self.owner = (tuple(images), tuple(texts)), seed, ""  # tuples: forks share them

    def reset(self, task: Task) -> None:
        super().reset(task)
        self.owner = task.uid

    def view(self, entry: ImageEntry, observed: bool) -> Image.Image:
        instead = self._other(0, entry.pixels.tobytes()) if observed else None
        return entry.pixels if instead is None else instead.resize(entry.size[::-1], Image.Resampling.BICUBIC)

    def step(self, call: Action) -> CallResult:
        result = super().step(call)
        if result.status != CallStatus.EXECUTED:
            return result
        replaced = {i: self._other(1, result.parts[i].encode()) for i in told(result)}
        return replace(result, parts=[replaced.get(i) or part for i, part in enumerate(result.parts)])

    def _other(self, which: int, own: bytes) -> Image.Image | str | None:
        others = [item for owner, item in self.others[which] if owner != self.owner]
        return others[np.random.default_rng((self.seed, zlib.crc32(own))).integers(len(others))] if others else None


def controlled(control: str, done: Sequence[Trajectory], seed: int) -> Callable[..., ToolEnvironment]:
    """Return the environment of a control in `CONTROLS`. Image sizes do not change.

    Args:
        done: trajectories of the normal evaluation; `shuffle` draws from what their calls showed.
        seed: seed of that draw.
    Raises:
        ValueError: unknown control.
    """
    if control not in CONTROLS:
        raise ValueError(f"There is no control {control!r}; choose {' or '.join(CONTROLS)}.")
    if control == "blank":
        return BlankEnvironment
    calls = [(t, turn.call) for t in done for turn in t.turns if turn.call and turn.call.status == CallStatus.EXECUTED]
    images = [(t.task.uid, t.images[number - 1].pixels) for t, call in calls for number in call.images]
    texts = [(t.task.uid, call.parts[i]) for t, call in calls for i in told(call)]
    return partial(ShuffledEnvironment, images=images, texts=texts, seed=seed)


def told(result: CallResult) -> list[int]:
    """Return the indices of the parts of a result that are texts of their own: not the line that names the next image."""
    after = [*result.parts[1:], ""]
    return [i for i, part in enumerate(result.parts) if isinstance(part, str) and isinstance(after[i], str)]
