"""The one protocol that all agents of curation speak, and how a backend is named in the settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

ENDPOINT = "imagent_jax.curation.endpoint:Endpoint"


class AgentError(Exception):
    """An agent gave no usable answer. The message is one sentence that says why."""


class Backend(Protocol):
    """A model that completes conversations. Several threads call it at once."""

    def complete(self, messages: Sequence[Mapping[str, Any]], schema: Mapping[str, Any]) -> dict[str, Any]:
        """Return the answer to a conversation.

        Args:
            messages: as in OpenAI's chat API: `role`, and `content` as text or as parts {"type": "text", "text": ...} and
                {"type": "image_url", "image_url": {"url": "data:image/png;base64,..."}}.
            schema: JSON schema of the answer, an object.
        Raises:
            AgentError: there is no answer that fits the schema.
        """
        ...


def load_backend(name: str, settings: Mapping[str, Any], place: str) -> Backend:
    """Return the backend that the settings name.

    Args:
        name: "endpoint", or 'package.module:Class' of your own: a class with an attribute `Settings`, a frozen dataclass with
            defaults, of which the class is made with one.
        settings: of the backend's own.
        place: the setting that names the backend, for sentences; its own settings stand beside it.
    Raises:
        ValueError: there is no such class, the settings are no mapping, or see `config.read_own`.
    """
    from imagent_jax.config import import_path, read_own

    if not isinstance(name, str) or not isinstance(settings, Mapping):
        raise ValueError(f"{place} is {name!r} with the settings {settings!r}; give a name, and settings by name.")
    kind = import_path(ENDPOINT if name == "endpoint" else name, place)
    return kind(read_own(kind.Settings, settings, f"{place.rpartition('.')[0]}.settings"))
