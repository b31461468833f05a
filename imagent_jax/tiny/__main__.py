"""Build the tiny base: `python -m imagent_jax.tiny --help`."""

from imagent_jax.tiny.build import main

if __name__ == "__main__":
    main()
