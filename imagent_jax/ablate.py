"""Train ablations and compare them: `python -m imagent_jax.ablate --help`."""

import sys

from imagent_jax.evals.ablate import main, parse

__all__ = ["main", "parse"]

if __name__ == "__main__":
    sys.exit(main())
