"""Selection of the ready trajectories that become the next batch, for every `ReplayOrder`."""

from __future__ import annotations

import hashlib
import math

from opd_ray.config.choices import ReplayOrder
from opd_ray.replay.staleness import StoreConfig
from opd_ray.replay.trajectories import Queue


def next_batch(queue: Queue, config: StoreConfig, learner_version: int) -> list[int]:
    """Return `trajectories_per_step` ready ids, ascending; none if they cannot be had yet.

    It depends on what is ready, the versions and the seed alone, never on the order of arrival or the time.
    """
    size = config.trajectories_per_step
    if not config.overtakes:
        return queue.head(size)
    if len(queue.ready) < size:
        return []
    if config.order is ReplayOrder.fifo:
        return queue.oldest_ready(size)
    keys = [
        (sampling_key(trajectory_id, member.meta.oldest_version, learner_version, config), trajectory_id)
        for trajectory_id, member in queue.ready.items()
    ]
    return sorted(trajectory_id for _, trajectory_id in sorted(keys)[:size])


def sampling_key(trajectory_id: int, oldest_version: int, learner_version: int, config: StoreConfig) -> float:
    """What ready trajectories are ordered by, the smallest first; ties go to the smaller trajectory id.

    ``weighted`` is a race of exponential clocks with rate w = 1 / (1 + staleness): its first n are a weighted draw
    without replacement (Efraimidis and Spirakis 2006, in the log domain). A trajectory's clock is seeded by the run's
    seed, the learner version and its number, so that it needs no state and every batch is a new draw.
    """
    if config.order is ReplayOrder.fifo:
        return trajectory_id
    if config.order is ReplayOrder.freshest:
        return -oldest_version
    # A hash, and no generator: seeding one for every trajectory would take longer than all else here.
    digest = hashlib.blake2b(f"{config.seed}/{learner_version}/{trajectory_id}".encode(), digest_size=8).digest()
    uniform = (int.from_bytes(digest) >> 11) * 2.0**-53  # of 53 bits, in [0, 1)
    return -math.log1p(-uniform) * (1 + learner_version - oldest_version)
