"""Sandbox for code that a policy writes: one confined worker process for each trajectory.

`host` and `link` are the trainer's side. `zygote` forks workers from a process that has imported the libraries, `confine` takes
their rights away, `worker` runs the code. A backend is how workers are confined. Its first use is an attempt to break it.
`remote` has a server run `program`, which confines a worker over there.
"""

from imagent_jax.config import SandboxConfig
from imagent_jax.tools.sandbox.host import BACKENDS, Sandbox
from imagent_jax.tools.sandbox.link import Ran, SandboxError, Worker
from imagent_jax.tools.sandbox.remote import Remote, RemoteWorker

__all__ = ["BACKENDS", "Ran", "Remote", "RemoteWorker", "Sandbox", "SandboxError", "Worker", "open_sandbox"]


def open_sandbox(settings: SandboxConfig) -> Sandbox | Remote:
    """Return the sandbox that the settings name, after an attempt to break out of it.

    Raises:
        ValueError: it does not hold; the sentence says what to do.
    """
    return Remote(settings) if settings.backend == "remote" else Sandbox(settings)
