"""`python -m imagent_jax.data INPUT`; see `imagent_jax.data.summary`."""

import sys

from imagent_jax.data.summary import main

sys.exit(main())
