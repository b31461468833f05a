"""Search by servers: Search-R1's `POST /retrieve` and Serper. Requests go to the configured address and nowhere else."""

import hashlib
import http.client
import json
import math
import os
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from imagent_jax.tools.search.hits import Backend, Hit, SearchError, clean, passage, ranked

SERPER = "https://google.serper.dev/search"
MOST_BYTES = 8 * 2**20
"""Of an answer."""


class Server:
    """A server that speaks Search-R1's `POST /retrieve`, at its full address."""

    def __init__(self, url: str, timeout_s: float):
        self.url, self.timeout_s = url, timeout_s

    def search(self, query: str, k: int) -> list[Hit]:
        """See `Backend.search`."""
        answer = post(self.url, {"queries": [query], "topk": k, "return_scores": True}, {}, self.timeout_s)
        try:
            [found] = answer["result"]
            hits = [Hit(*passage(item["document"]), float(item["score"])) for item in found]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise SearchError(f"{self.url} answered no list of scored documents ({type(error).__name__}: {error}).") from None
        if not all(math.isfinite(hit.score) for hit in hits):
            raise SearchError(f"{self.url} answered a score that is no number.")
        return ranked(hits, k)


class Serper:
    """Serper's web search. The id of a result is its link; its score is 1 over its position."""

    def __init__(self, url: str, key: str, timeout_s: float):
        self.url, self.key, self.timeout_s = url, key, timeout_s

    def search(self, query: str, k: int) -> list[Hit]:
        """See `Backend.search`."""
        answer = post(self.url, {"q": query, "num": k}, {"X-API-KEY": self.key}, self.timeout_s)
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


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        """Follow nothing: the answer itself is then an error."""


# no proxies either, whatever the environment says
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirect)


def post(url: str, body: Mapping[str, Any], headers: Mapping[str, str], timeout_s: float) -> Any:
    """Send JSON and return the JSON of the answer, of at most `MOST_BYTES`.

    Raises:
        SearchError: no answer within `timeout_s`, another status than 200, or no JSON.
    """
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json", **headers})
    until = time.monotonic() + timeout_s
    try:
        with _OPENER.open(request, timeout=timeout_s) as response:
            data = bytearray()
            while piece := response.read1(65536):
                data += piece
                if len(data) > MOST_BYTES:
                    raise SearchError(f"{url} answered more than {MOST_BYTES} bytes.")
                if time.monotonic() > until:
                    raise TimeoutError(f"longer than {timeout_s:g} s")
            if response.status != 200 or response.length:
                raise SearchError(f"{url} answered {response.status}{' and broke off' if response.length else ''}.")
        return json.loads(bytes(data))
    except urllib.error.HTTPError as error:
        said = clean(error.read(200).decode("utf-8", "replace"))
        where = "; set search.url to the final address" if 300 <= error.code < 400 else ""
        raise SearchError(f"{url} answered {error.code} {error.reason}{where}. {said}") from None
    except (OSError, http.client.HTTPException, ValueError, RecursionError) as error:
        raise SearchError(f"{url} gave no answer that can be used ({type(error).__name__}: {error}).") from None


def check_url(url: str) -> str:
    """Return a valid address.

    Raises:
        ValueError: it is not the address of a server.
    """
    try:
        parts = urllib.parse.urlsplit(url)
        valid = parts.scheme in ("http", "https") and parts.hostname and parts.username is None and parts.port != 0
    except ValueError:
        valid = False
    if not valid or not url.isascii() or not url.isprintable() or " " in url:
        raise ValueError(f"search.url is {url!r}; give a full address, such as http://127.0.0.1:8000/retrieve.")
    return url
