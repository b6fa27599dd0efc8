"""Runs told apart by variant and condition, and scored against their bases: what the verb `compare` shows."""
