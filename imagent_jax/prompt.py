"""Print what a policy reads: `python -m imagent_jax.prompt --help`."""

import sys

from imagent_jax.rollout.show_prompt import main

if __name__ == "__main__":
    sys.exit(main())
