"""imagent-jax: multi-image vision agents trained end to end by reinforcement learning, in JAX."""

__version__ = "0.1.0"
