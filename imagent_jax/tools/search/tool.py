"""The tool `search`: passages of an index or a server, as the prompt declares them."""

import os
import re
from pathlib import Path

from imagent_jax.config import SearchConfig
from imagent_jax.config.naming import import_path
from imagent_jax.tools.context import ToolContext
from imagent_jax.tools.decorator import tool
from imagent_jax.tools.post import check_url, clean
from imagent_jax.tools.schema import Tool
from imagent_jax.tools.search.hits import Backend, Hit, SearchError
from imagent_jax.tools.search.index import Index
from imagent_jax.tools.search.remote import SERPER, Recorded, Serper, Server
from imagent_jax.types import ToolError

EMBEDDED = {"tiny": "imagent_jax.tiny.encyclopaedia:index_folder"}
"""Indexes that the package makes: import path of the function that returns the folder, imported on use."""
QUERY_CHARS, TITLE_CHARS = 500, 200
"""Most characters of a query, and of a title as shown."""


def open_backend(settings: SearchConfig) -> Backend:
    """Return the backend that the settings name, with its recordings.

    Raises:
        ValueError: a path, an address or a key is missing or wrong, or the server does not answer a first query.
    """
    s, mode = settings, settings.record
    source = {"index": s.path, "server": s.url, "serper": s.url or SERPER}[s.backend]
    if mode == "auto":
        mode = "record" if s.backend == "serper" else "off"
    if s.backend != "index":
        check_url(source, "search.url", "http://127.0.0.1:8000/retrieve")
    if mode == "off":
        return _open(s, source)
    backend = None if mode == "replay" else _open(s, source)
    return Recorded(backend, f"{s.backend} {source}", Path(s.recordings).expanduser())


def _open(settings: SearchConfig, source: str) -> Backend:
    if settings.backend == "index":
        if not source:
            raise ValueError("search.path is empty; name the folder that `imagent index CORPUS.jsonl OUT` wrote.")
        return Index(import_path(EMBEDDED[source], "search.path")() if source in EMBEDDED else source)
    if settings.backend == "server":
        server = Server(source, settings.timeout_s)
        try:
            server.search("test", 1)
        except SearchError as error:
            raise ValueError(f"The search server is not ready: {error} Start it, or correct search.url.") from None
        return server
    key = os.environ.get(settings.key_env, "").strip()
    if not re.fullmatch("[!-~]+", key):  # what a header can hold
        raise ValueError(f"The environment variable {settings.key_env} (search.key_env) holds no key; set it to one of Serper's.")
    return Serper(source, key, settings.timeout_s)


def search_tool(settings: SearchConfig, form: str) -> Tool:
    """Return the tool `search`, with a backend of its own.

    Args:
        form: a passage as the policy reads it, with {number}, {title} and {text} (`Prompt.passage`).

    Raises:
        ValueError: see `open_backend`.
    """
    backend = open_backend(settings)

    @tool
    def search(context: ToolContext, query: str) -> list[str]:
        """Search a collection of texts. You read the passages that match best, each with its title.

        Args:
            query: what to look for, in a few words
        """
        asked = " ".join(clean(query).split())
        if not asked:
            raise ToolError("query is empty; write what to look for in a few words")
        if len(asked) > QUERY_CHARS:
            raise ToolError(f"query has {len(asked)} characters; write at most {QUERY_CHARS}")
        hits = backend.search(asked, settings.passages)
        shown = [show(form, number, hit, settings.passage_chars) for number, hit in enumerate(hits, 1)]
        return shown or ["No passages were found."]

    return search


def show(form: str, number: int, hit: Hit, chars: int) -> str:
    """Return a hit as the policy reads it: title and text on one line each, the text cut at `chars` characters."""
    values = {"number": str(number), "title": _line(hit.title, TITLE_CHARS), "text": _line(hit.text, chars)}
    return re.sub(r"\{(number|title|text)\}", lambda name: values[name[1]], form)


def _line(text: str, chars: int) -> str:
    line = " ".join(clean(text).split())
    return line if len(line) <= chars else line[: max(chars - 4, 0)] + " ..."
