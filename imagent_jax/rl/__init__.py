"""Rewards, advantages, the two-level mask, the GRPO loss and the learner."""
