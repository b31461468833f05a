"""`python -m imagent_jax.tools.sandbox [URL]`: tries every backend here, and the server at URL, and prints what each enforces, or
why it does not hold."""

import sys
from typing import Any

from imagent_jax.config import SandboxConfig
from imagent_jax.tools.sandbox import BACKENDS, open_sandbox

tried: list[tuple[Any, str]] = [*((backend, "") for backend in BACKENDS), *(("remote", url) for url in sys.argv[1:2])]
for backend, url in tried:
    try:
        sandbox = open_sandbox(SandboxConfig(backend=backend, url=url))
        print(f"{backend}: holds {'there' if url else 'here'}. Enforces: {sandbox.enforces}.")
        sandbox.close()
    except ValueError as error:
        print(f"{backend}: {error}")
