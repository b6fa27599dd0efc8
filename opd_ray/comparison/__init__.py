"""Comparison of runs by variant and condition, scored against their bases: the verb `compare`."""
