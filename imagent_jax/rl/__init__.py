"""imagent_jax.rl"""
