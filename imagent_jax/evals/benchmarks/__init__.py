"""Published benchmarks: a module for each family says how rows become tasks and how replies are scored."""
