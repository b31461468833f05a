"""Search with servers of a test's own: answers that it scripts, and raw bytes."""

import contextlib
import http.client
import http.server
import json
import socket
import threading

from imagent_jax.chat import Call
from imagent_jax.chat.prompts import Prompt
from imagent_jax.config import ImagesConfig, SearchConfig
from imagent_jax.rollout.environment import ToolEnvironment
from imagent_jax.tools import ToolSettings, tools_by_name


def tools_of(prompt: Prompt | None = None, **settings):
    return tools_by_name(["search"], search=SearchConfig(**settings), prompt=prompt)


def called(tools, query, **arguments):
    environment = ToolEnvironment(tools, ToolSettings(), ImagesConfig())
    return environment.step(Call("search", {"query": query, **arguments}))


class Scripted(http.server.BaseHTTPRequestHandler):
    """Answers as `server.answer(path, body)` says: status, headers and body; keeps the requests. The query "test", with which a
    run begins, has a good answer."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if body.get("queries") == ["test"]:
            status, headers, answer = says(GOOD)(self.path, body)
        else:
            self.server.seen.append((self.path, {name.lower(): value for name, value in self.headers.items()}, body))
            status, headers, answer = self.server.answer(self.path, body)
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        with contextlib.suppress(OSError):  # who asked may have gone
            for piece in [answer] if isinstance(answer, bytes) else answer:
                self.wfile.write(piece)
                self.wfile.flush()

    do_GET = do_POST

    def log_message(self, *args):
        pass


@contextlib.contextmanager
def scripted(answer):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Scripted)
    server.answer, server.seen, server.daemon_threads = answer, [], True
    server.url = f"http://127.0.0.1:{server.server_address[1]}/retrieve"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def says(content, status: int = 200, **headers):
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    return lambda path, request: (status, headers, body)


def result_of(*items):
    return {"result": [list(items)]}


def item(score, **document):
    return {"document": document, "score": score}


@contextlib.contextmanager
def raw(begin: bytes, drip: bytes):
    """The address of a server that sends `begin`, then `drip` five times a second for 20 s; b"": that closes, None: that is
    silent."""
    over = threading.Event()

    def answer(connection):
        with connection, contextlib.suppress(OSError):
            connection.recv(65536)
            connection.sendall(begin)
            for _ in range(0 if drip == b"" else 100):
                if over.wait(0.2):
                    break
                connection.sendall(drip or b"")

    def serve():
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=answer, args=(listener.accept()[0],), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=serve, daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/retrieve"
        over.set()
        listener.shutdown(socket.SHUT_RDWR)


GOOD = result_of(item(1.0, id="a", contents="x"))
