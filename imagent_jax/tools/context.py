"""Tool execution: settings, the context that a tool receives, and one guarded call."""

import copy
import json
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from imagent_jax.chat import Call
from imagent_jax.config import CallSettings
from imagent_jax.images.originals import Originals
from imagent_jax.images.prepare import fit_budget
from imagent_jax.tools.calls import fault, invalid
from imagent_jax.tools.registry import ImageRegistry
from imagent_jax.tools.schema import Tool
from imagent_jax.types import CallResult, CallStatus, ImageEntry, ImageNumber, ToolError

COORDINATES = ("relative_1000", "absolute")


@dataclass(frozen=True)
class ToolSettings:
    """How tools show images.

    Attributes:
        coordinates: coordinate space of boxes: "relative_1000" (0 to 1000 along each side) or "absolute" (pixels of the image
            as shown to the policy).
        patch_factor: sides of shown images are multiples of this (patch size times merge size), pixels.
        low_pixels, high_pixels: maximum pixels of an image shown again at "low" and "high" resolution.
        confirm_min_pixels, confirm_max_pixels: pixel budget of a crop; smaller crops are enlarged.
        min_box: minimum side of a crop as a fraction of the image's side; smaller boxes are enlarged about their centre.
        max_images: maximum images of a trajectory, given and made.
        most_pixels: maximum pixels of any shown image; without it, long strips would exceed their budget.
        originals: pixels of given images that are in memory.

    Raises:
        ValueError: a value is out of range.
    """

    coordinates: str = "relative_1000"
    patch_factor: int = 28
    low_pixels: int = 4704
    high_pixels: int = 7056
    confirm_min_pixels: int = 7056
    confirm_max_pixels: int = 9408
    min_box: float = 0.08
    max_images: int = 16
    most_pixels: int = 144 * 14 * 14
    originals: Originals = field(default_factory=Originals, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.coordinates not in COORDINATES:
            raise ValueError(f'coordinates must be one of {", ".join(COORDINATES)}, got "{self.coordinates}"')
        for name in ("patch_factor", "low_pixels", "high_pixels", "confirm_min_pixels", "max_images"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.confirm_max_pixels < self.confirm_min_pixels:
            raise ValueError(
                f"confirm_max_pixels must be at least confirm_min_pixels ({self.confirm_min_pixels}), "
                f"got {self.confirm_max_pixels}"
            )
        if not 0 <= self.min_box <= 1:
            raise ValueError(f"min_box is a fraction of the side, 0 to 1, got {self.min_box}")


class TrajectoryState:
    """What tools keep between the calls of one trajectory, such as a process.

    Args:
        seed: source of everything random that a tool does in the trajectory.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        self._kept: dict[str, Any] = {}
        self._makers: dict[str, threading.RLock] = {}
        self._closed, self._lock = False, threading.Lock()

    def keep(self, name: str, make: Callable[[], Any]) -> Any:
        """Return the object kept under `name`; the first call makes it. Its `close()` is called when the trajectory ends, or as
        soon as it is made where the trajectory has ended meanwhile.

        Raises:
            RuntimeError: the trajectory has ended.
        """
        with self._lock:
            maker = self._makers.setdefault(name, threading.RLock())
        with maker:  # others that want the same wait; `close` and what is kept under other names do not
            with self._lock:
                self._check_open()
                if name in self._kept:
                    return self._kept[name]
            made = make()
            with self._lock:
                if not self._closed:
                    self._kept[name] = made
                    return made
            made.close()
            self._check_open()

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError("the trajectory has ended")

    def close(self) -> None:
        """End the trajectory: close all that is kept, then raise the first error of that."""
        with self._lock:
            self._closed, kept, self._kept = True, self._kept, {}
        errors = []
        for item in kept.values():
            try:
                item.close()
            except Exception as error:  # noqa: BLE001 - the others are closed all the same
                errors.append(error)
        if errors:
            raise errors[0]


class ToolContext:
    """What a tool may access: the trajectory's image `registry`, its `state`, the `settings` of how images are shown, and the
    tool's `own` settings."""

    def __init__(
        self,
        registry: ImageRegistry,
        settings: ToolSettings,
        state: TrajectoryState | None = None,
        own: CallSettings | None = None,
    ) -> None:
        self.registry = registry
        self.settings = settings
        self.state = state or TrajectoryState()
        self.own = own or CallSettings()

    def show(
        self,
        image: Image.Image,
        *,
        parent: int | None = None,
        box: tuple[int, int, int, int] | None = None,
        origin: str = "",
        min_pixels: int | None = None,
        max_pixels: int | None = None,
    ) -> ImageNumber:
        """Register an image made by a tool and return its number. A tool shows the image by returning this number.

        Args:
            image: pixels at their original resolution, copied; resized for the policy later.
            parent: number of the image it was made from, if any.
            box: (left, top, right, bottom) in pixels of the parent, if it is a crop.
            origin: description in words; default: "crop" if `box` is given.
            min_pixels, max_pixels: budget of the shown size; default: the settings' confirm budget.

        Raises:
            ToolError: the trajectory has the maximum number of images, or the image is too narrow to show.
        """
        limit = self.settings.max_images
        if len(self.registry) >= limit:
            raise ToolError(f"no more than {limit} images; answer with what you have seen")
        min_pixels = self.settings.confirm_min_pixels if min_pixels is None else min_pixels
        max_pixels = self.settings.confirm_max_pixels if max_pixels is None else max_pixels
        shown, min_pixels, max_pixels = self.budget((image.height, image.width), min_pixels, max_pixels)
        return self.registry.add(
            image.copy(),
            shown=shown,
            parent=parent,
            box=box,
            origin=origin or ("crop" if box is not None else ""),
            min_pixels=min_pixels,
            max_pixels=max_pixels,
        )

    def show_again(self, number: int, min_pixels: int, max_pixels: int) -> ImageNumber:
        """Return the number under which image `number` is shown within a pixel budget.

        This is `number` itself, or an earlier view of the image, if the shown size is the same. Otherwise a new image is
        registered, so that a number always has one size.

        Raises:
            ToolError: unknown number, or see `show`.
        """
        source = self.registry[number]
        shown, *_ = self.budget(source.size, min_pixels, max_pixels)
        same: list[ImageEntry] = [
            e for e in self.registry if e.source is source.source and e.region == source.region and e.shown == shown
        ]
        if same:
            return source.number if source in same else same[0].number
        larger = shown[0] * shown[1] > source.shown[0] * source.shown[1]
        origin = "larger view" if larger else "smaller view"
        return self.show(source.pixels, parent=number, origin=origin, min_pixels=min_pixels, max_pixels=max_pixels)

    def budget(self, size: tuple[int, int], min_pixels: int, max_pixels: int) -> tuple[tuple[int, int], int, int]:
        """Return the (height, width) at which an image of `size` (height, width) is shown, and its budget (`fit_budget`).

        Raises:
            ToolError: the image is too narrow.
        """
        try:
            return fit_budget(size, self.settings.patch_factor, min_pixels, max_pixels, self.settings.most_pixels)
        except ValueError as error:
            raise ToolError(f"a piece of {size[1]} x {size[0]} pixels is too narrow to show") from error


def run_call(
    item: Tool, call: Call, registry: ImageRegistry, settings: ToolSettings, state: TrajectoryState | None = None
) -> tuple[CallResult, ImageRegistry]:
    """Run a checked call on `registry`, to which it may add images. Return the result and the registry; never raise."""
    try:
        returned = item(
            ToolContext(registry, settings, state, item.settings), **copy.deepcopy(call.arguments)
        )  # keeps the record unchanged
        parts = observation_parts(returned, registry, item)
        return CallResult(CallStatus.EXECUTED, call.name, call.arguments, parts), registry
    except ToolError as error:
        return invalid(error, call), registry
    except KeyboardInterrupt:
        raise
    except BaseException:  # noqa: BLE001 - nothing a tool does may stop the run
        return fault(traceback.format_exc(), call), registry


def observation_parts(returned: Any, registry: ImageRegistry, tool: Tool) -> list[str | int]:
    """Return a tool's return value as observation parts, with a line of text that names each image before it.

    An `ImageNumber` shows the image. Another number is text where the tool declares that it returns numbers; otherwise an integer
    shows the image.

    Raises:
        TypeError: the value is not text, a number, a registered image number, or a list of these.
    """
    name, items = tool.name, returned if isinstance(returned, (list, tuple)) else [returned]
    parts: list[str | int] = []
    for item in items:
        if isinstance(item, str):
            parts.append(item)
        elif isinstance(item, (bool, int, float)) and type(item) is not ImageNumber and tool.returns_numbers:
            parts.append(json.dumps(item))
        elif type(item) in (int, ImageNumber):
            if not 1 <= item <= len(registry):
                raise TypeError(f"tool {name} returned image number {item}, which is not registered")
            parts += [registry[item].describe(), int(item)]
        elif isinstance(item, Image.Image):
            raise TypeError(f"tool {name} returned a PIL image; return context.show(image, parent=...) instead")
        else:
            raise TypeError(f"tool {name} returned {type(item).__name__}; return text, image numbers or a list of them")
    return parts
