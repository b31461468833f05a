"""A search server that speaks Search-R1's `POST /retrieve`, on one backend.

Request `{"queries": [text, ...], "topk": 3, "return_scores": true}`; answer `{"result": [[{"document": {"id", "contents"},
"score"}, ...], ...]}`, a list for each query. Without `return_scores` the documents stand bare.
"""

import json
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from imagent_jax.tools.post import clean
from imagent_jax.tools.search.hits import Backend

MOST_BYTES, MOST_QUERIES, MOST_CHARS, MOST_PASSAGES = 2**20, 512, 4096, 100
TOPK = 3


def answer(backend: Backend, request: Any) -> dict[str, Any]:
    """Return the answer to a request.

    Raises:
        ValueError: the request is no such request.
    """
    queries = request.get("queries") if isinstance(request, dict) else None
    texts = isinstance(queries, list) and all(isinstance(query, str) and len(query) <= MOST_CHARS for query in queries)
    if not texts or len(queries) > MOST_QUERIES:
        raise ValueError(f"queries must be a list of at most {MOST_QUERIES} texts of at most {MOST_CHARS} characters")
    topk = TOPK if request.get("topk") is None else request["topk"]
    if type(topk) is not int or not 1 <= topk <= MOST_PASSAGES:
        raise ValueError(f"topk must be a whole number from 1 to {MOST_PASSAGES}")
    found = [backend.search(" ".join(clean(query).split()), topk) for query in queries]
    documents = [[{"id": hit.id, "contents": hit.contents} for hit in hits] for hits in found]
    if not request.get("return_scores"):
        return {"result": documents}
    pairs = zip(documents, found, strict=True)
    return {"result": [[{"document": d, "score": h.score} for d, h in zip(*pair, strict=True)] for pair in pairs]}


class _Handler(BaseHTTPRequestHandler):
    protocol_version, timeout, disable_nagle_algorithm = "HTTP/1.1", 60, True

    def __init__(self, backend: Backend, *connection: Any):
        self.backend = backend
        super().__init__(*connection)  # answers

    def do_POST(self) -> None:
        length = self.headers.get("Content-Length", "")
        if self.path != "/retrieve":
            self._say(404, {"detail": "POST /retrieve is what there is"})
        elif not length.isdecimal() or int(length) > MOST_BYTES:
            self._say(413, {"detail": f"a request has a Content-Length of at most {MOST_BYTES} bytes"})
        else:
            try:
                self._say(200, answer(self.backend, json.loads(self.rfile.read(int(length)))))
            except (ValueError, RecursionError) as error:
                self._say(400, {"detail": str(error)})

    def do_GET(self) -> None:
        self._say(405, {"detail": "POST /retrieve is what there is"})

    def _say(self, status: int, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.close_connection = self.close_connection or status != 200  # what follows may be an unread body
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing."""


class RetrieveServer(ThreadingHTTPServer):
    """A server that listens; `serve_forever` answers, each connection on a thread of its own.

    Args:
        port: 0 takes a free one.

    Raises:
        OSError: it cannot listen there.
    """

    request_queue_size = 256

    def __init__(self, backend: Backend, host: str, port: int):
        super().__init__((host, port), partial(_Handler, backend))
