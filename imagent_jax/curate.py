"""Make a data set of questions about several images: `python -m imagent_jax.curate --config configs/curate_tiny.yaml`."""

import sys

from imagent_jax.curation.command import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
