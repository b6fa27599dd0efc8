"""The Arrow form of a trajectory batch: schema, codec, columns, rows. pyarrow and numpy only."""
