"""Tasks and where they come from: the tiny world, JSON Lines files, ArrayRecord caches and grain pipelines."""
