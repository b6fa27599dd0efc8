"""Ray: groups of workers, placement, remote calls, and what the cluster has."""
