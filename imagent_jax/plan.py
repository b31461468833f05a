"""Say whether a run fits its chips: `python -m imagent_jax.plan --help`."""

import sys

from imagent_jax.planner.plan import main, parse

__all__ = ["main", "parse"]

if __name__ == "__main__":
    sys.exit(main())
