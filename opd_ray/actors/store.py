"""The replay store as a Ray actor."""

from __future__ import annotations

from typing import Any

import ray

from opd_ray.config import RunConfig
from opd_ray.replay.spill import SpillSpace
from opd_ray.replay.staleness import StoreConfig
from opd_ray.replay.store import ReplayStore


def start_store(cfg: RunConfig) -> Any:
    """Start the store of a run; returns its handle."""
    # References can be awaited; what comes back from a file is the store's own, so it outlives whoever made it.
    spill = SpillSpace(cfg.replay.spill_bytes, put=ray.put) if cfg.replay.spill_bytes else None
    store_class: Any = ray.remote(ReplayStore)
    options = store_class.options(name="replay-store", num_cpus=0, max_concurrency=1000)
    return options.remote(store_config(cfg), spill=spill)


def store_config(cfg: RunConfig) -> StoreConfig:
    """What the store is told of a run."""
    replay = cfg.replay
    return StoreConfig(
        trajectories_per_step=cfg.trajectories_per_step,
        reuse=replay.reuse,
        max_staleness=replay.max_staleness,
        final_version=cfg.num_steps,
        order=replay.order,
        stale=replay.stale,
        hard_staleness=replay.hard_staleness,
        max_bytes=replay.max_bytes,
        seed=cfg.seed,
    )
