"""Will a task's prompt open? Tried from the sizes of its images alone, so that a whole data set can be tried at the start."""

import functools
import hashlib
from collections.abc import Callable, Collection, Sequence

import numpy as np

from imagent_jax.chat import QwenChat
from imagent_jax.images.prepare import PreparedImage
from imagent_jax.model.interleave import encode_parts
from imagent_jax.model.processor import Processor
from imagent_jax.rollout.environment import ToolEnvironment
from imagent_jax.types import Task


class PromptCheck:
    """Renders and encodes a task as `Collector.open_task` does, with images that have a size and no pixels.

    Args:
        system: gives the content of the system turn for the names of a task's tools (None: all) and its environment.
        environment: decides at which size the policy sees an image.
        limit: most tokens of a prompt.
        rewards: names of the run's rewards.

    Attributes:
        fingerprint: hash of all on which a verdict depends besides the task.
    """

    def __init__(
        self,
        chat: QwenChat,
        processor: Processor,
        system: Callable[..., tuple[str, ...]],
        environment: ToolEnvironment,
        limit: int,
        rewards: Collection[str] = (),
    ):
        self.chat, self.processor, self.system, self.environment, self.limit = chat, processor, system, environment, limit
        self.rewards = tuple(rewards)
        self._tokens = functools.lru_cache(10_000)(self._count)  # texts around images are the same for all tasks
        self._image = functools.lru_cache(10_000)(self._sized)

    @functools.cached_property
    def fingerprint(self) -> str:
        tokenizer = self.processor.tokenizer.backend_tokenizer.to_str()
        probe = encode_parts(
            self.chat.render_task(self.system(None), (1, "Is <tool_call> 1?"), self._images([(56, 84)])), self.processor
        )
        facts = self.environment.settings, self.environment.shown, self.limit, self.processor.patch_size, probe.ids.tolist()
        return hashlib.sha256(f"{tokenizer} {self.system(None)} {facts} {self.rewards}".encode()).hexdigest()

    def __call__(self, task: Task, sizes: Sequence[tuple[int, int]]) -> None:
        """Try a task.

        Args:
            sizes: (height, width) of its images, as `images.decode.read_image` returns them.
        Raises:
            ValueError: the task names a tool or a reward that the run does not have, an image is too narrow, placeholders and
                images do not match, or the prompt has too many tokens.
        """
        if unknown := [name for name in task.reward if name not in self.rewards]:
            raise ValueError(f"the run has no reward {unknown[0]!r}; its rewards are {', '.join(self.rewards)}")
        parts = self.chat.render_task(self.system(task.tools, task.environment), task.shown, self._images(sizes))
        try:
            tokens = sum(self._tokens((), part.grid) if isinstance(part, PreparedImage) else self._tokens(part) for part in parts)
        except ValueError:
            encode_parts(parts, self.processor)  # its sentence is about the whole prompt
            raise
        check_length(tokens, self.limit)

    def _count(self, text: tuple[str, ...], grid: tuple[int, int] | None = None) -> int:
        """Return the tokens of a text, or of an image with a (height, width) in patches. Parts are tokenised apart."""
        return len(encode_parts([PreparedImage(_NO_PIXELS, grid, (0, 0)) if grid else text], self.processor).ids)

    def _images(self, sizes: Sequence[tuple[int, int]]) -> list[PreparedImage]:
        images = []
        for number, size in enumerate(sizes, 1):
            try:
                images.append(self._image(size))
            except ValueError as error:
                raise ValueError(f"Image {number} cannot be used ({str(error).rstrip('.')}); mend or drop it") from error
        return images

    def _sized(self, size: tuple[int, int]) -> PreparedImage:
        try:
            (height, width), *_ = self.environment.budget(size)
        except ValueError:
            raise
        except Exception as error:  # a user's own environment may do anything
            raise ValueError(f"{type(self.environment).__name__}.budget raised {type(error).__name__}: {error}") from error
        patch = self.processor.patch_size
        return PreparedImage(_NO_PIXELS, (height // patch, width // patch), (height, width))


_NO_PIXELS = np.zeros((0, 0), np.uint8)


def check_length(tokens: int, limit: int) -> None:
    """Raise ValueError where a prompt has more tokens than `rollout.prompt_tokens`."""
    if tokens > limit:
        raise ValueError(
            f"the prompt needs {tokens} tokens, more than rollout.prompt_tokens={limit}; raise it, lower images.max_pixels, or "
            "shorten the question."
        )
