"""Multi-process jobs: device mesh, start-up, detection of dead processes, and data exchange."""
