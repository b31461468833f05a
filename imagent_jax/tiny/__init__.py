"""The embedded example, all of it: a small world of questions, the base model, its corpus and its assets."""
