"""The byte budget: how many slots the expected payloads leave room for (`staleness` proves that progress goes on)."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from opd_ray.replay.staleness import StoreConfig


@dataclass(slots=True)
class PayloadSize:
    """Running mean of a trajectory's bytes: of all at first, then with a memory of `window` trajectories."""

    window: int
    mean_bytes: float = 0.0
    num_seen: int = 0

    def add(self, num_bytes: int, num_rows: int) -> None:
        """A payload of `num_rows` trajectories came in."""
        self.num_seen = max(num_rows, min(self.num_seen + num_rows, self.window))
        self.mean_bytes += (num_bytes / num_rows - self.mean_bytes) * num_rows / self.num_seen


@dataclass(frozen=True, slots=True)
class Load:
    """What the store has: slots queued (in flight or ready), in flight and drafted, and bytes of payloads held."""

    num_queued: int
    num_in_flight: int
    num_drafted: int
    num_bytes: int


def num_in_budget(load: Load, size: PayloadSize, wanted: int, config: StoreConfig) -> int:
    """Slots that `max_bytes` leaves room for; 0 if there is room for fewer than `wanted`.

    While no cohort is drafted it is at least what the next one is missing, so that the learner never waits in vain.
    """
    if not config.max_bytes:
        return sys.maxsize
    fitting = _num_that_fit(load, size, config.max_bytes)
    missing = config.trajectories_per_step - load.num_queued if load.num_drafted == 0 else 0
    return max(fitting if fitting >= wanted else 0, missing, 0)


def _num_that_fit(load: Load, size: PayloadSize, max_bytes: int) -> int:
    if not size.num_seen:
        return 0  # nobody knows yet how large they are
    room = max_bytes - load.num_bytes - load.num_in_flight * size.mean_bytes
    return int(room // max(size.mean_bytes, 1.0))
