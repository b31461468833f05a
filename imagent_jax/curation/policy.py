"""A policy of ours as an agent that answers: the base, a trained run, or a model in Hugging Face's form, with its own tools."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from imagent_jax.curation.agents import AgentError
from imagent_jax.curation.difficulty import PolicyRatesSettings
from imagent_jax.types import Task


class PolicyAnswerer:
    """A `curation.agents.Backend` for the answerers, and for the attacks that are answers to a question.

    The policy looks by its own tools, so it never asks for a crop. It is sure where it gives an answer at all. Its answer is a
    function of the conversation and the settings. It cannot write questions: name another backend for the other roles.
    """

    Settings = PolicyRatesSettings

    def __init__(self, settings: PolicyRatesSettings):
        from imagent_jax.runs.loading import load_policy

        self.settings, self.policy = settings, load_policy(settings.path, settings=settings.settings)[0]
        self.lock = threading.Lock()  # the engine takes one collection at a time

    def complete(self, messages: Sequence[Mapping[str, Any]], schema: Mapping[str, Any]) -> dict[str, Any]:
        """See `Backend.complete`.

        Raises:
            AgentError: the schema asks for more than an answer, or the question does not fit the policy's prompt.
        """
        if not set(schema["required"]) <= {"answer", "sure", "look"}:
            raise AgentError(f"A policy only answers questions and cannot make a {schema.get('title')}; set agents.roles.")
        parts = [part for message in messages if isinstance(message["content"], list) for part in message["content"]]
        images = tuple(base64.b64decode(p["image_url"]["url"].partition(",")[2]) for p in parts if p["type"] == "image_url")
        asked = re.search(r"Question: (.*?)(?:\n\n|\Z)", parts[-1]["text"], re.DOTALL)
        key = hashlib.sha256(json.dumps(list(messages)).encode()).hexdigest()
        task = Task(key[:16], asked[1] if asked else parts[-1]["text"], images, "")
        answer = self._answer(task, int(key[:7], 16))
        return {"answer": answer or "cannot tell", "sure": answer is not None, "look": None}

    def _answer(self, task: Task, luck: int) -> str | None:
        import jax

        from imagent_jax.types import EndReason

        with self.lock, jax.set_mesh(self.policy.mesh):
            try:
                [[trajectory]] = self.policy.collector.collect(
                    self.policy.params,
                    [task],
                    group_size=1,
                    seed=self.settings.seed + luck,
                    temperature=self.settings.temperature,
                    slots=1,
                ).trajectories
            except ValueError as error:
                raise AgentError(f"The policy cannot be asked: {error}") from error
        if trajectory.end == EndReason.FAULT:
            raise AgentError(f"A tool of the policy failed: {(trajectory.error or 'unknown').strip().splitlines()[-1]}")
        return trajectory.answer
