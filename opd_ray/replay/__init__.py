"""The replay store and the Arrow form of a trajectory batch; pyarrow and numpy only."""
