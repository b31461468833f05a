"""Rollouts: from tasks to trajectories, with tools on the host and tokens from a jitted sampler."""
