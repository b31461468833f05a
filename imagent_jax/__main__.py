"""`python -m imagent_jax COMMAND ...`; see `imagent_jax.cli`."""

import sys

from imagent_jax.cli import main

sys.exit(main())
