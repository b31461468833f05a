"""Several processes as one job: the device mesh, starting, noticing an end, and exchanging data."""
