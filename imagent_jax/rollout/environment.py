"""An environment: the world of one trajectory. The default one offers a set of tools on numbered images."""

import copy
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image

from imagent_jax.chat import Call, MalformedCall
from imagent_jax.config import ImagesConfig
from imagent_jax.config.naming import import_path
from imagent_jax.images.decode import read_image
from imagent_jax.images.prepare import fit_budget
from imagent_jax.tools import ImageRegistry, Tool, ToolSet, ToolSettings, TrajectoryState, limited
from imagent_jax.types import CallResult, ImageEntry, Task, Trajectory

_STATE = (dict, list, set, np.ndarray)


def environment_class(path: str, what: str) -> "type[ToolEnvironment]":
    """Return the environment at 'package.module:Class'; `ToolEnvironment` for "".

    Args:
        what: the setting that names it, for the sentence.
    Raises:
        ValueError: it cannot be imported, or is no environment.
    """
    found = import_path(path, what) if path else ToolEnvironment
    if not (isinstance(found, type) and issubclass(found, ToolEnvironment)):
        raise ValueError(f"{what} {path!r} is no environment; name a subclass of rollout.environment.ToolEnvironment.")
    return found


def answered(work: Callable[[], Any], timeout_s: float) -> Any:
    """Return what a method of an environment returns.

    Raises:
        TimeoutError: it took longer than `timeout_s` seconds. What the method raises is raised as `limited` does.
    """
    return limited(work, timeout_s, "; raise tools.timeout_s")


class ToolEnvironment:
    """Numbered images, and tools that show them.

    A subclass is a world of your own (`tools.environment`): its methods with `@tool` are tools besides those of the run, and its
    attributes are the state of one trajectory (see `fork`). `step` runs on a thread of its own, beside decoding. A call that ends
    after `close` changes nothing.

    Args:
        images: how given images are shown.
    """

    def __init__(self, tools: ToolSet, settings: ToolSettings, images: ImagesConfig):
        self._given, self.settings, self.shown = tools, settings, images
        self._registry, self._closed, self._lock = ImageRegistry(), False, threading.Lock()
        self._state = TrajectoryState()

    @property
    def tools(self) -> ToolSet:
        """The tools of the run, then the methods of a subclass that are tools."""
        names = dict.fromkeys(name for kind in reversed(type(self).__mro__) for name in vars(kind))
        own = [getattr(self, name) for name in names if isinstance(getattr(type(self), name), Tool)]
        return ToolSet([*self._given, *own], self._given.changes) if own else self._given

    def reset(self, task: Task) -> None:
        """Number the images of a task from 1, each with the size at which the policy sees it.

        Raises:
            ValueError: an image cannot be used; the sentence names the task and the image.
        """
        registry = ImageRegistry()
        for number, data in enumerate(task.images, 1):
            try:
                image = read_image(data)
                size, low, high = self.budget((image.height, image.width))
            except ValueError as error:
                reason = str(error).rstrip(".")
                raise ValueError(f"Task {task.uid}: Image {number} cannot be used ({reason}); mend or drop it.") from error
            original = self.settings.originals.add(data, image)
            registry.add(image, shown=size, min_pixels=low, max_pixels=high, original=original)
        self._registry = registry

    def budget(self, size: tuple[int, int]) -> tuple[tuple[int, int], int, int]:
        """Return the (height, width) at which the policy sees a given image of `size` (height, width), and its pixel budget.

        Raises:
            ValueError: see `fit_budget`.
        """
        s, low, high = self.settings, self.shown.min_pixels, self.shown.max_pixels
        return fit_budget(size, s.patch_factor, low, high, s.most_pixels)

    def fork(self, seed: int = 0) -> "ToolEnvironment":
        """Return an environment in the same state, for another trajectory of the task. Pixels are shared.

        A subclass's attributes that are dictionaries, lists, sets or arrays are copied, with what they hold; all others are
        shared. What two of them share, their copies share. What tools keep between calls is not shared.

        Args:
            seed: source of everything random that a tool does in the trajectory.
        """
        other = type(self).__new__(type(self))
        state = copy.deepcopy({k: v for k, v in self.__dict__.items() if isinstance(v, _STATE)})
        own = {"_registry": self._registry.fork(), "_state": TrajectoryState(seed), "_closed": False, "_lock": threading.Lock()}
        other.__dict__ |= self.__dict__ | state | own
        return other

    @property
    def images(self) -> Sequence[ImageEntry]:
        """The numbered images, in order."""
        return tuple(self._registry)

    def step(self, call: Call | MalformedCall) -> CallResult:
        """Run a call. Images that a tool made are kept only where the call is EXECUTED. Never raises for what the policy wrote
        or a tool did."""
        fork = self._registry.fork()
        result = self.tools.execute(call, fork, self.settings, self._state)
        with self._lock:
            if not self._closed:
                self._registry = fork
        return result

    def view(self, entry: ImageEntry, observed: bool) -> Image.Image:
        """Return the pixels that the policy is shown for an image, of any size. `observed`: a call shows it."""
        return entry.pixels

    def reward(self, trajectory: Trajectory) -> float | None:
        """Return a reward of the finished trajectory (`reward.environment`), or None where there is none. It is called after
        `close`; attributes are as the last call left them."""
        return None

    def close(self) -> None:
        """End the trajectory, and what tools kept for it."""
        with self._lock:
            self._closed = True
        self._state.close()
