"""Evaluation on held-out tasks, controls, ablations and where attention goes."""
