"""`python -m imagent_jax.tools.sandbox`: tries every backend here and prints what it enforces, or why it does not hold."""

from imagent_jax.config import SandboxConfig
from imagent_jax.tools.sandbox import BACKENDS, Sandbox

for backend, enforces in BACKENDS.items():
    try:
        Sandbox(SandboxConfig(backend=backend)).close()
        print(f"{backend}: holds here. Enforces: {enforces}.")
    except ValueError as error:
        print(f"{backend}: {error}")
