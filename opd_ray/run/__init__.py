"""A run on disk: its folder, its checkpoints, and the choice of the run to resume."""
