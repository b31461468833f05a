"""Compare two results of benchmarks: `python -m imagent_jax.compare A/result.json B/result.json`."""

import sys

from imagent_jax.evals.compare import main, parse

__all__ = ["main", "parse"]

if __name__ == "__main__":
    sys.exit(main())
