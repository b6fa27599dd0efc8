"""The memory and traffic of a run, by arithmetic alone, and whether a cluster has room for it."""
