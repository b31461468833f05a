"""The whole pipeline with its agents behind a real HTTP server that sometimes fails: the same questions, and no call twice."""

import json
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from curation_parts import tiny_pictures, tiny_settings

from imagent_jax.curation.pipeline import curate
from imagent_jax.tiny.curators import TinyCurators, TinyCuratorsSettings


class Served(BaseHTTPRequestHandler):
    """/v1/chat/completions, answered by the embedded agents; every fifth request fails."""

    protocol_version, agents, asked, lock = "HTTP/1.1", None, Counter(), threading.Lock()

    def log_message(self, *args):
        pass

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        schema = body["response_format"]["json_schema"]["schema"]
        with self.lock:
            self.asked["requests"] += 1
            fails = self.asked["requests"] % 5 == 0
            self.asked[json.dumps([body["messages"], schema])] += not fails
        answer = json.dumps(self.agents.complete(body["messages"], schema))
        message = {"role": "assistant", "content": answer}
        reply = {"id": "1", "object": "chat.completion", "created": 0, "model": "m",
                 "choices": [{"index": 0, "finish_reason": "stop", "message": message}]}  # fmt: skip
        data = b'{"error": {"message": "busy"}}' if fails else json.dumps(reply).encode()
        self.send_response(503 if fails else 200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def address(tmp_path):
    tiny_pictures(tmp_path, 24)
    folders = tuple(str(tmp_path / name) for name in ("pictures", "pictures_test"))
    Served.agents, Served.asked = TinyCurators(TinyCuratorsSettings(folders=folders)), Counter()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Served)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()


@pytest.mark.slow(6)
def test_agents_behind_a_server_make_the_same_questions_and_are_asked_once(tmp_path, address):
    curate(tiny_settings(tmp_path))
    settings = {"base_url": address, "model": "m", "backoff_s": 0.01, "cache_dir": str(tmp_path / "answers")}
    served = {"agents": {"backend": "endpoint", "settings": settings}}
    curate(tiny_settings(tmp_path, run={"out": str(tmp_path / "served")}, **served))
    direct, ours = ((tmp_path / name / "questions.jsonl").read_bytes() for name in ("run", "served"))
    assert ours == direct and len(ours.splitlines()) == 12
    requests = Served.asked.pop("requests")
    assert requests > 60 and set(Served.asked.values()) == {1}
    curate(tiny_settings(tmp_path, run={"out": str(tmp_path / "again")}, **served))
    assert (tmp_path / "again/questions.jsonl").read_bytes() == direct and "requests" not in Served.asked
