"""Measure where an agent's attention goes: `python -m imagent_jax.attention --help`."""

import sys

from imagent_jax.evals.attention import main

if __name__ == "__main__":
    sys.exit(main())
