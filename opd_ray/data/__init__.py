"""Prompts: read, ordered, put into templates; and trajectories packed into microbatches."""
