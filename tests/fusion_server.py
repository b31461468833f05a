"""A server that speaks SandboxFusion's `POST /run_code`, as its runner without isolation does. Prints its address.

It runs the code for real, with this Python, in a folder of its own.
"""

import base64
import json
import subprocess
import sys
import tempfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


def run_code(request: dict) -> dict:
    """The reply to a request."""
    with tempfile.TemporaryDirectory() as folder:
        for name, content in request["files"].items():
            path = Path(folder, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(base64.b64decode(content))
        script = Path(folder, "tmpcode.py")
        script.write_text(request["code"])
        try:
            ended = subprocess.run(
                [sys.executable, str(script)], cwd=folder, capture_output=True, text=True, timeout=request["run_timeout"],
                stdin=subprocess.DEVNULL, env={"PATH": "/usr/bin:/bin", "SERVER_SECRET": "s3cr3t"},
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return {"status": "Failed", "message": "", "run_result": {"status": "TimeLimitExceeded"}, "files": {}}
        found = {name: Path(folder, name) for name in request["fetch_files"]}
        files = {name: base64.b64encode(path.read_bytes()).decode() for name, path in found.items() if path.is_file()}
        run = {"status": "Finished", "return_code": ended.returncode, "stdout": ended.stdout, "stderr": ended.stderr}
        return {"status": "Failed" if ended.returncode else "Success", "message": "", "run_result": run, "files": files}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        known = self.path == "/run_code" and request.get("language") == "python"
        body = json.dumps(run_code(request) if known else {"detail": "Not Found"}).encode()
        self.send_response(200 if known else 404)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


if __name__ == "__main__":
    server = ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1]) if sys.argv[1:] else 0), Handler)
    print(f"http://127.0.0.1:{server.server_address[1]}/run_code", flush=True)
    server.serve_forever()
