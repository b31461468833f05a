"""Open a run's trajectories and report in the browser: `python -m imagent_jax.view --help`."""

import sys

from imagent_jax.runs.view import main

if __name__ == "__main__":
    sys.exit(main())
