"""imagent_jax.evals"""
