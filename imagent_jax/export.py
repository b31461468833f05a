"""Write a training checkpoint as a Hugging Face model: `python -m imagent_jax.export --help`."""

import sys

from imagent_jax.runs.export import main

if __name__ == "__main__":
    sys.exit(main())
