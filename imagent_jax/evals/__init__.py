"""Scoring of answers, and evaluation on held-out tasks and benchmarks."""
