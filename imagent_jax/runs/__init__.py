"""A run on disk: folder, checkpoints, logs, trackers, report and viewer."""
