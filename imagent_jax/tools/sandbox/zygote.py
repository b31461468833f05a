"""The process from which workers are forked: imports the libraries once, confines itself, and starts and ends workers on request.

Run as a script with the number of its control socket and its settings as JSON. It ends, and all workers with it, when that socket
is closed.
"""

import gc
import json
import os
import resource
import signal
import socket
import sys
import time


def main(control: socket.socket, settings: dict) -> None:
    """Say what happened at the start, then serve requests one by one."""
    sys.path += [os.path.dirname(__file__), *settings["path"]]
    import confine

    try:
        worker, base = load()
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write("1000")  # where memory runs out, workers end first
        if settings["backend"] == "namespaces":
            confine.enter_private_root(settings["visible"], settings["hidden"])
        else:
            confine.landlock_version()
    except (OSError, ImportError) as error:
        control.send(json.dumps({"error": str(error)}).encode())
        return
    gc.collect()
    gc.freeze()  # forked workers share these objects' pages
    control.send(b'{"ready": true}')
    while True:
        message, descriptors, *_ = socket.recv_fds(control, 4096, 2)
        if not message:
            return
        request = json.loads(message)
        try:
            if "open" in request:
                answer = {"pid": start(confine, worker, settings, base, request, descriptors)}
            elif request["lost"]:
                answer = lost(request["end"])
            else:
                os.kill(request["end"], signal.SIGKILL)
                answer = {"killed": request["end"]}
        except OSError as error:
            answer = {"error": str(error)}
        for descriptor in descriptors:
            os.close(descriptor)
        control.send(json.dumps(answer).encode())
        if "killed" in answer:
            os.waitpid(request["end"], 0)  # takes longer than the trainer need wait


def load():
    """Import what workers run. Returns the module, and the address space of this process in bytes.

    Raises:
        OSError: a library has started threads, which a fork would lose.
        ImportError: a library is missing.
    """
    import worker

    if len(os.listdir("/proc/self/task")) > 1:
        raise OSError("a library started threads")
    with open("/proc/self/statm") as file:
        return worker, int(file.read().split()[0]) * resource.getpagesize()


def start(confine, worker, settings: dict, base: int, request: dict, descriptors: list[int]) -> int:
    """Fork a worker that talks through two pipes; returns its process number."""
    pid = confine.start_process(settings["backend"] == "namespaces")
    if pid:
        return pid
    try:
        for number, descriptor in enumerate(descriptors):
            os.dup2(descriptor, 100 + number)
        for number in range(2):
            os.dup2(100 + number, 3 + number)
        os.closerange(5, 1 << 16)  # the two pipes are its only descriptors
        confine.confine_worker(settings["limits"], base, request.get("folder"), settings["readable"])
        worker.serve(3, 4, request["open"], settings["limits"]["printed"])
    finally:
        os._exit(70)


def lost(pid: int) -> dict:
    """Return the wait status of a worker whose pipe is closed and the CPU seconds that it used.

    The status is None where the worker closed the pipe and did not end; it is killed.
    """
    for _ in range(100):
        done, status, usage = os.wait4(pid, os.WNOHANG)
        if done:
            return {"status": status, "cpu_s": usage.ru_utime + usage.ru_stime}
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    _, _, usage = os.wait4(pid, 0)
    return {"status": None, "cpu_s": usage.ru_utime + usage.ru_stime}


if __name__ == "__main__":
    main(socket.socket(fileno=int(sys.argv[1])), json.loads(sys.argv[2]))
