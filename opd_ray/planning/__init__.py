"""What a run needs and moves, by arithmetic alone, and whether a cluster has it."""
