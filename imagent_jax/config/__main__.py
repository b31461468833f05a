"""Print the reference of all settings: `python -m imagent_jax.config > docs/configuration.md`."""

from imagent_jax.config import reference

print(reference(), end="")
