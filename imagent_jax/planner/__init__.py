"""Memory and communication planning: compile a run's programs ahead of time, from shapes alone."""
