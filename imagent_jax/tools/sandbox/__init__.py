"""Sandbox for code that a policy writes: one confined worker process for each trajectory.

`host` and `link` are the trainer's side. `zygote` forks workers from a process that has imported the libraries, `confine` takes
their rights away, `worker` runs the code. A backend is how workers are confined. Its first use is an attempt to break it.
"""

from imagent_jax.tools.sandbox.host import BACKENDS, Sandbox
from imagent_jax.tools.sandbox.link import Ran, SandboxError, Worker

__all__ = ["BACKENDS", "Ran", "Sandbox", "SandboxError", "Worker"]
