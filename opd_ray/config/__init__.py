"""The configuration of a run: schema, the names that keys may take, and checks."""
