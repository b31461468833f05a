"""What every search backend returns: passages with titles and scores, as clean text."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from imagent_jax.tools.post import clean

_TITLED = re.compile(r'"([^\n]*)"\n')


@dataclass(frozen=True)
class Hit:
    """A passage that was found. Greater scores are better."""

    id: str
    title: str
    text: str
    score: float

    @property
    def contents(self) -> str:
        """Title and text as Search-R1 writes them: the title in quotes on the first line."""
        return f'"{self.title}"\n{self.text}'


class Backend(Protocol):
    """Where passages are looked up. Called from several threads at once."""

    def search(self, query: str, k: int) -> list[Hit]:
        """Return at most `k` passages, the best first; equal scores are in the order of ids.

        Raises:
            SearchError: an environment error.
        """


class SearchError(Exception):
    """A search failed for a reason that the policy cannot repair. The trajectory ends with a FAULT."""


def passage(row: Mapping[str, Any]) -> tuple[str, str, str]:
    """Return id, title and text of a passage: `{id, title, text}` (the title may be absent), or `{id, contents}` in which a first
    line in quotes is the title.

    Raises:
        ValueError: the row is no passage; the message says what it lacks.
    """
    name = row.get("id")
    name = clean(name).strip() if isinstance(name, str) else str(name) if type(name) is int else ""
    if not name:
        raise ValueError("the passage has no id; give it a text or a whole number of its own as `id`")
    title, text = row.get("title") or "", row.get("text")
    if text is None and isinstance(contents := row.get("contents"), str):
        titled = _TITLED.match(contents)
        title, text = (titled[1], contents[titled.end() :]) if titled else ("", contents)
    if not isinstance(title, str) or not isinstance(text, str):
        raise ValueError("the passage has no text; give it `text` (and `title`), or `contents`")
    title, text = " ".join(clean(title).split()), clean(text).strip()
    if not title and not text:
        raise ValueError("the passage is empty; leave it out")
    return name, title, text


def ranked(hits: list[Hit], k: int) -> list[Hit]:
    """Return the `k` best hits, the best first; equal scores are in the order of ids."""
    return sorted(hits, key=lambda hit: (-hit.score, hit.id))[:k]
