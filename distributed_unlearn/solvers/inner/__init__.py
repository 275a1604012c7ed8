"""Inner solvers of a step: driver half and shard half side by side."""
