"""What a server runs for a call: it confines a process as the Landlock backend does, which runs the trajectory's earlier calls
again, then the new one.

Its folder holds the other modules of a worker, `request.json`, the trajectory's images as `images/1.png` and so on, and the
worker's own folder `work`. It leaves the file `result`: a line of JSON that says how the process ended, then all that the process
wrote.
"""

import hashlib
import json
import os
import select
import signal
import sys
import time

HERE = os.path.dirname(os.path.abspath(__file__))
ENVIRONMENT = {"PYTHONHASHSEED": "0", "PYTHONUTF8": "1", "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}


def main() -> None:
    """Run the calls of `request.json`, all together for at most `wall_s` seconds."""
    import confine
    import zygote

    with open(f"{HERE}/request.json") as file:
        request = json.load(file)
    limits = request["limits"]
    confine.landlock_version()
    readable = [*confine.places(HERE)["readable"], f"{HERE}/images"]
    worker, base = zygote.load()
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.dup2(os.open(os.devnull, os.O_RDWR), 0)
            for old, new in ((0, 1), (0, 2), (writer, 3)):
                os.dup2(old, new)
            os.closerange(4, 1 << 16)
            confine.confine_worker(limits, base, f"{HERE}/work", readable)
            session = worker.begin(files(worker, 3, len(request["calls"]) - 1), request["seed"], limits["printed"])
            for call in request["calls"]:
                session.call(call)
        finally:
            os._exit(0)
    os.close(writer)
    said, left = bytearray(), request["wall_s"]
    deadline = time.monotonic() + left
    while left > 0 and len(said) <= request["most"] and select.select([reader], [], [], left)[0]:
        if not (part := os.read(reader, 1 << 20)):
            break
        said += part
        left = deadline - time.monotonic()
    else:
        left = 0
    with open(f"/proc/{pid}/schedstat") as file:
        waited = int(file.read().split()[1]) / 1e9
    if left <= 0:
        os.kill(pid, signal.SIGKILL)
    ended = {"late": left <= 0, "waited_s": waited, **zygote.lost(pid)}
    with open(f"{HERE}/result", "wb") as file:
        file.write(json.dumps(ended).encode() + b"\n" + said)


def files(worker, outgoing: int, earlier: int):
    """What a worker has in place of pipes to a trainer: images as files, and a pipe for what it says.

    Args:
        earlier: number of calls whose results are not wanted any more; a digest of each is sent.
    """

    class Files:
        def __init__(self):
            self.earlier = earlier

        def fetch(self, number):
            with open(f"{HERE}/images/{number}.png", "rb") as file:
                return worker.decode.read_image(file.read())

        def send(self, message, *payload):
            whole = b"".join((worker.frame(message), *payload))
            if "ready" not in message and self.earlier:
                self.earlier -= 1
                whole = worker.frame({"digest": hashlib.sha256(whole).hexdigest()})
            view = memoryview(whole)
            while view:
                view = view[os.write(outgoing, view) :]

    return Files()


if __name__ == "__main__":
    if os.environ.get("PYTHONHASHSEED") != "0":
        os.execve(sys.executable, [sys.executable, "-s", "-B", __file__], ENVIRONMENT)
    main()
