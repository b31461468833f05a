"""Score predictions of MAT and text benchmarks: `python -m imagent_jax.score PREDICTIONS.json --benchmark mat-coding`."""

import sys

from imagent_jax.evals.score import main, parse

__all__ = ["main", "parse"]

if __name__ == "__main__":
    sys.exit(main())
