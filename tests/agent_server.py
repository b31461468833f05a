"""A server that speaks /v1/chat/completions, in a process of its own: `python tests/agent_server.py`. Prints its port.

Asked for "item N", it answers {"item": N, "square": N * N}. It counts what it was asked, and fails as it is told:
`POST /control` sets the attributes of `State`, `GET /stats` returns them.
"""

import contextlib
import json
import re
import sys
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

SCHEMA = {
    "type": "object", "properties": {"item": {"type": "integer"}, "square": {"type": "integer"}},
    "required": ["item", "square"], "additionalProperties": False,
}  # fmt: skip
QUICK = ("429", "500", "cut", "cut chunk", "half JSON", "other protocol", "prose", "wrong schema", "too long")
SLOW = ("slow", "drip")
"""Faults that end by the client's time limit."""


class State:
    """What the server does and has seen.

    Attributes:
        queue: faults of the next requests, in order; "" is none.
        every: every so many items fail at first, each in its own way of `faults` (0: none).
        forms: the response formats that are known.
        pause: seconds before an answer.
        retry_after: header of a 429.
        asked: requests of each item; answered: whole good answers of each item.
        most: greatest number of requests under way at once.
        last: body of the last request; keys: Authorization headers.
    """

    def __init__(self):
        self.reset()

    def reset(self):
        self.queue, self.every, self.faults, self.pause, self.retry_after = [], 0, list(QUICK), 0.0, "0"
        self.forms = ["json_schema", "json_object"]
        self.asked, self.answered, self.now, self.most, self.last, self.keys = {}, {}, 0, 0, {}, []

    def fault_of(self, item: str) -> str:
        if self.queue:
            return self.queue.pop(0)
        if self.every and int(item) % self.every == 0 and self.asked[item] <= 1 + int(item) // self.every % 2:
            return self.faults[int(item) // self.every % len(self.faults)]
        return ""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state, lock = State(), threading.Lock()

    def log_message(self, *args):
        pass

    def do_GET(self):
        with self.lock:
            self.send(200, json.dumps(vars(self.state)))

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/control":
            with self.lock:
                if body.pop("reset", False):
                    self.state.reset()
                vars(self.state).update(body)
            self.send(200, "{}")
            return
        text = json.dumps(body["messages"])
        item = (re.search(r"item (\d+)", text) or ["", "0"])[1]
        form = body.get("response_format", {}).get("type", "prompt")
        state = self.state
        with self.lock:
            state.last = body
            state.keys = sorted({*state.keys, self.headers["Authorization"]})
            if form != "prompt" and form not in state.forms:
                self.send(400, json.dumps({"error": {"message": f"response_format {form} is unknown"}}))
                return
            state.asked[item] = state.asked.get(item, 0) + 1
            state.now += 1
            state.most = max(state.most, state.now)
            fault = state.fault_of(item)
        time.sleep(state.pause)
        with self.lock:
            state.now -= 1
        with contextlib.suppress(OSError):
            self.answer(fault, int(item), "ready" in text)
            if fault in ("", "fenced", "drip"):
                with self.lock:
                    state.answered[item] = state.answered.get(item, 0) + 1

    def answer(self, fault, item, ready):
        if fault.isdigit():
            self.send(int(fault), '{"error": {"message": "told to fail"}}')
        elif fault in ("cut", "half JSON"):
            self.start(200, "1000" if fault == "cut" else "13")
            self.wfile.write(b'{"choices": [')
            self.close_connection = fault == "cut"
        elif fault == "cut chunk":
            self.start(200, None)
            self.wfile.write(b'd\r\n{"choices": [\r\n')
            self.close_connection = True
        elif fault == "other protocol":
            self.send(200, '{"result": 1}')
        elif fault == "slow":
            time.sleep(3)
            self.close_connection = True
        else:
            right = {"ready": True} if ready else {"item": item, "square": item**2}
            good = json.dumps(right)
            said = {
                "prose": f"The square of {item} is no secret.",
                "wrong schema": json.dumps({"item": str(item)}),
                "fenced": f"<think>{{}}</think>Here it is:\n```json\n{good}\n```",
            }
            text = self.said(said.get(fault, good), "length" if fault == "too long" else "stop")
            self.send(200, text, drips=30 if fault == "drip" else 0)

    def said(self, text, reason):
        choice = {"index": 0, "finish_reason": reason, "message": {"role": "assistant", "content": text}}
        usage = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}
        made = {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice], "usage": usage}
        return json.dumps(made)

    def start(self, code, length):
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", length) if length else self.send_header("Transfer-Encoding", "chunked")
        if code in (429, 503):
            self.send_header("Retry-After", self.state.retry_after)
        self.end_headers()

    def send(self, code, text, drips=0):
        self.start(code, str(drips + len(text.encode())))
        for _ in range(drips):
            self.wfile.write(b" ")
            time.sleep(0.1)
        self.wfile.write(text.encode())


class Remote:
    """The other end: a server in a process of its own, told and asked over HTTP."""

    def __init__(self):
        import subprocess

        self.process = subprocess.Popen([sys.executable, __file__], stdout=subprocess.PIPE, text=True)
        self.root = f"http://127.0.0.1:{int(self.process.stdout.readline())}"

    @property
    def url(self) -> str:
        return f"{self.root}/v1"

    def tell(self, **changes):
        """Changes attributes of the server's state; `reset=True` forgets everything first."""
        request = urllib.request.Request(f"{self.root}/control", json.dumps(changes).encode())
        urllib.request.urlopen(request).read()

    def stats(self) -> dict:
        """The server's state."""
        return json.loads(urllib.request.urlopen(f"{self.root}/stats").read())

    def stop(self):
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request, client_address):
        pass  # a client that was killed


def main():
    server = Server(("127.0.0.1", 0), Handler)
    print(server.server_port, flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
