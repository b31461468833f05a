"""An agent in a few lines: load it, ask it about images, look at what it did."""

import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from PIL import Image

from imagent_jax.config import MeshConfig
from imagent_jax.images.decode import read_pil
from imagent_jax.rollout.policy import Policy
from imagent_jax.runs.loading import load_policy
from imagent_jax.types import Task, Trajectory, Turn


class Agent:
    """A model that answers questions about several images, and calls tools to look again.

    ```python
    from imagent_jax import Agent

    agent = Agent.from_pretrained("tiny")
    trajectory = agent.answer("Which image has a red tag?", ["a.jpg", "b.jpg"])
    print(trajectory.answer, [turn.text for turn in trajectory.turns])
    ```

    Args:
        policy: the model with its processor, tools and settings.
    """

    def __init__(self, policy: Policy):
        self.policy, self._weights = policy, None

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path = "tiny",
        *,
        step: int | None = None,
        mesh: MeshConfig | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> "Agent":
        """Load an agent.

        Args:
            path: "tiny" (the embedded base), the folder of a run such as "runs/tiny", the folder of a model in Hugging Face's
                form, or a hub id.
            step: checkpoint of a run (default: the newest).
            mesh: devices that hold the parameters (default: one); see `MeshConfig`.
            settings: settings by dotted name, such as {"tools.max_turns": 3}.
        Raises:
            ValueError: there is no such model, run, checkpoint or setting, or they do not go together.
        """
        return cls(load_policy(path, step=step, mesh=mesh, settings=settings)[0])

    def answer(
        self, question: str, images: Sequence[str | Path | bytes | Image.Image] = (), *, temperature: float = 0.0, seed: int = 0
    ) -> Trajectory:
        """Answer a question.

        Args:
            question: plain text; it calls images "Image 1", "Image 2", ... in their order.
            images: files, encoded bytes, or PIL images.
            temperature: of the sampled softmax; 0 takes the likeliest tokens.
            seed: of sampling.
        Returns:
            The trajectory: `answer` (None: there is none), `turns` with their calls, numbered `images`, `end`.
        Raises:
            ValueError: an image cannot be read, or the question does not fit `rollout.prompt_tokens`.
        """
        steps = self.stream(question, images, temperature=temperature, seed=seed)
        [trajectory] = (step for step in steps if isinstance(step, Trajectory))
        return trajectory

    def stream(
        self, question: str, images: Sequence[str | Path | bytes | Image.Image] = (), *, temperature: float = 0.0, seed: int = 0
    ) -> Iterator[Turn | Trajectory]:
        """Answer a question step by step. Yields every turn once its call is answered, and at the end the trajectory. The
        arguments and errors are those of `answer`."""
        task = Task("question", question, tuple(map(encoded, images)), answer="")
        collector = self.policy.collector
        with jax.set_mesh(self.policy.mesh):
            if self._weights is None:
                self._weights = collector.weights(self.policy.params)
            steps = collector.stream(self._weights, task, seed=seed, temperature=temperature)
        while True:
            with jax.set_mesh(self.policy.mesh):
                step = next(steps, None)
            if step is None:
                return
            yield step


def encoded(image: str | Path | bytes | Image.Image) -> bytes:
    """Return an image as the bytes of an image file. A PIL image is turned as its EXIF orientation says.

    Raises:
        ValueError: there is no such file, or a PIL image has pixels without a known white (`to_rgb`).
    """
    if isinstance(image, bytes):
        return image
    if isinstance(image, Image.Image):
        out = io.BytesIO()
        read_pil(image).save(out, "PNG")
        return out.getvalue()
    if not Path(image).is_file():
        raise ValueError(f"There is no image {image}; name a file, or give a PIL image or bytes.")
    return Path(image).read_bytes()
