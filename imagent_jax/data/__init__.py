"""Tasks: data formats, and pipelines over them."""

from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command `imagent data`; see `summary`."""
    from imagent_jax.data.summary import main as run

    return run(argv)
