"""Evaluation on held-out tasks: metrics, controls, ablations and attention by source."""
