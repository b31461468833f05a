"""Will a run fit a slice: shapes, programs compiled ahead of time, memory and collectives."""
