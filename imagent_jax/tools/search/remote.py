"""Search by servers: Search-R1's `POST /retrieve` and Serper. Requests go to the configured address and nowhere else."""

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from imagent_jax.tools.post import post
from imagent_jax.tools.search.hits import Backend, Hit, SearchError, passage, ranked

SERPER = "https://google.serper.dev/search"
_ask = partial(post, raises=SearchError, setting="search.url")


class Server:
    """A server that speaks Search-R1's `POST /retrieve`, at its full address."""

    def __init__(self, url: str, timeout_s: float):
        self.url, self.timeout_s = url, timeout_s

    def search(self, query: str, k: int) -> list[Hit]:
        """See `Backend.search`."""
        answer = _ask(self.url, {"queries": [query], "topk": k, "return_scores": True}, self.timeout_s)
        try:
            [found] = answer["result"]
            hits = [_hit(item, position) for position, item in enumerate(found, 1)]
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise SearchError(f"{self.url} answered no list of scored documents ({type(error).__name__}: {error}).") from None
        if not all(math.isfinite(hit.score) for hit in hits):
            raise SearchError(f"{self.url} answered a score that is no number.")
        return ranked(hits, k)


def _hit(item: Mapping[str, Any], position: int) -> Hit:
    """Return a document of a server. Search-R1's own ones leave out the id, which is then a digest of the contents, or the score,
    which is then 1 over the position."""
    document = item["document"]
    if document.get("id") is None:
        _, *contents = passage({**document, "id": "none"})
        document = {**document, "id": hashlib.sha256(json.dumps(contents).encode()).hexdigest()[:16]}
    return Hit(*passage(document), float(item.get("score", 1 / position)))


class Serper:
    """Serper's web search. The id of a result is its link; its score is 1 over its position."""

    def __init__(self, url: str, key: str, timeout_s: float):
        self.url, self.key, self.timeout_s = url, key, timeout_s

    def search(self, query: str, k: int) -> list[Hit]:
        """See `Backend.search`."""
        answer = _ask(self.url, {"q": query, "num": k}, self.timeout_s, headers={"X-API-KEY": self.key})
        try:
            rows = [{"id": row["link"], "title": row["title"], "text": row.get("snippet", "")} for row in answer["organic"]]
            return [Hit(*passage(row), 1 / position) for position, row in enumerate(rows[:k], 1)]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise SearchError(f"{self.url} answered no list of results ({type(error).__name__}: {error}).") from None


class Recorded:
    """Keeps the answers of a backend as files, and gives the same answer to the same query ever after.

    Args:
        backend: whom to ask; None: only recordings count.
        source: name of the backend, a part of a recording's key.
    """

    def __init__(self, backend: Backend | None, source: str, folder: Path):
        self.backend, self.source, self.folder = backend, source, folder

    def search(self, query: str, k: int) -> list[Hit]:
        """See `Backend.search`.

        Raises:
            SearchError: also where there is no recording and no backend.
        """
        asked = {"source": self.source, "query": query, "passages": k}
        name = hashlib.sha256(json.dumps(asked).encode()).hexdigest()
        path = self.folder / name[:2] / f"{name}.json"
        if not path.exists():
            if self.backend is None:
                raise SearchError(f"{self.folder} has no recording of {query!r}; record it with search.record=record.")
            _write_once(path, asked | {"hits": [asdict(hit) for hit in self.backend.search(query, k)]})
        try:
            return [Hit(**hit) for hit in json.loads(path.read_text())["hits"]]
        except (ValueError, KeyError, TypeError) as error:
            raise SearchError(f"The recording {path} cannot be read ({error}); remove it.") from None


def _write_once(path: Path, content: dict[str, Any]) -> None:
    """Write a file unless it exists: of several that write at once, also in other processes, the first counts."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=".", delete=False) as part:
        try:
            json.dump(content, part)
            part.flush()
            os.link(part.name, path)
        except FileExistsError:
            pass
        finally:
            os.unlink(part.name)
