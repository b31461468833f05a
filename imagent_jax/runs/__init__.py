"""Run folders: checkpoints, logs, trackers, report and viewer."""
