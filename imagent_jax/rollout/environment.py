"""An environment: the world of one trajectory. The default one offers a set of tools on numbered images."""

import io
import threading
from collections.abc import Sequence

from PIL import Image

from imagent_jax.chat import Action
from imagent_jax.config import ImagesConfig
from imagent_jax.images.prepare import fit_budget, to_rgb
from imagent_jax.tools import ImageRegistry, ToolSet, ToolSettings, TrajectoryState
from imagent_jax.types import CallResult, ImageEntry, Task


class ToolEnvironment:
    """Numbered images, and tools that show them.

    `step` runs on a thread of its own, beside decoding. A call that ends after `close` changes nothing.

    Args:
        images: how given images are shown.
    """

    def __init__(self, tools: ToolSet, settings: ToolSettings, images: ImagesConfig):
        self.tools, self.settings, self.shown = tools, settings, images
        self._registry, self._closed, self._lock = ImageRegistry(), False, threading.Lock()
        self._state = TrajectoryState()

    def reset(self, task: Task) -> None:
        """Number the images of a task from 1, each with the size at which the policy sees it.

        Raises:
            ValueError: an image does not decode; the sentence names the task and the image.
        """
        s, registry = self.settings, ImageRegistry()
        for number, data in enumerate(task.images, 1):
            try:
                image = to_rgb(Image.open(io.BytesIO(data)))
                size, low, high = fit_budget(
                    (image.height, image.width), s.patch_factor, self.shown.min_pixels, self.shown.max_pixels, s.most_pixels
                )
            except (OSError, ValueError) as error:
                raise ValueError(f"Task {task.uid}: Image {number} cannot be used ({error}); mend or drop it.") from error
            registry.add(image, shown=size, min_pixels=low, max_pixels=high)
        self._registry = registry

    def fork(self, seed: int = 0) -> "ToolEnvironment":
        """Return an environment with the same images, for another trajectory of the task. Pixels are shared; what tools keep
        between calls is not.

        Args:
            seed: source of everything random that a tool does in the trajectory.
        """
        other = type(self).__new__(type(self))
        own = {"_registry": self._registry.fork(), "_state": TrajectoryState(seed), "_closed": False, "_lock": threading.Lock()}
        other.__dict__ |= self.__dict__ | own
        return other

    @property
    def images(self) -> Sequence[ImageEntry]:
        """The numbered images, in order."""
        return tuple(self._registry)

    def step(self, call: Action) -> CallResult:
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
        return entry.image

    def close(self) -> None:
        """End the trajectory, and what tools kept for it."""
        with self._lock:
            self._closed = True
        self._state.close()
