"""A run as it lies on disk: its folder, what is written into it, checkpoints, and how one is resumed."""
