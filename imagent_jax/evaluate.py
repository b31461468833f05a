"""Evaluate a model on held-out tasks: `python -m imagent_jax.evaluate --help`."""

import sys

from imagent_jax.evals.evaluate import main, parse

__all__ = ["main", "parse"]

if __name__ == "__main__":
    sys.exit(main())
