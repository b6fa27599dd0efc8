"""Admission: which policy version the next batch will meet, and how much work the byte budget leaves room for.

`staleness` holds the rule, the proof of its bound, and why neither budget can stop the run.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

from opd_ray.replay.staleness import StoreConfig


@dataclass(slots=True)
class Schedule:
    """Published version, uses that the current batch has left, and the learner version of the next batch's first use.

    `version` and `next_version` are those of `staleness`.
    """

    version: int
    next_version: int
    last_use_version: int
    uses_left: int = 0

    @classmethod
    def at(cls, version: int, uses_left: int = 0) -> Schedule:
        """Nothing is in training at `version`; the current batch, last used one step ago, still has `uses_left`."""
        return cls(version, version + uses_left, version - 1, uses_left)

    def publish(self, version: int) -> None:
        """All engines have `version`."""
        self.version = version
        self.next_version = max(self.next_version, version + self.uses_left)

    def anchor(self, learner_version: int) -> None:
        """The learner asks for a new batch at `learner_version`."""
        self.next_version = learner_version

    def use(self, learner_version: int) -> None:
        """The current batch is used at `learner_version`."""
        self.uses_left -= 1
        self.last_use_version = learner_version
        self.next_version = learner_version + 1 + self.uses_left

    def skip_uses(self) -> None:
        """The current batch has no member left."""
        self.uses_left = 0
        self.next_version = max(self.last_use_version + 1, self.version)


@dataclass(slots=True)
class PayloadSize:
    """Running mean of a trajectory's bytes: of all at first, then with a memory of `window` trajectories."""

    window: int
    mean_bytes: float = 0.0
    num_seen: int = 0

    def add(self, num_bytes: int, num_rows: int) -> None:
        """Count a payload of `num_rows` trajectories."""
        self.num_seen = max(num_rows, min(self.num_seen + num_rows, self.window))
        self.mean_bytes += (num_bytes / num_rows - self.mean_bytes) * num_rows / self.num_seen


@dataclass(frozen=True, slots=True)
class Load:
    """Trajectories queued (in flight or ready), in flight, and in training, and the bytes of all stored payloads."""

    num_queued: int
    num_in_flight: int
    num_in_training: int
    num_bytes: int


def num_in_budget(load: Load, size: PayloadSize, wanted: int, config: StoreConfig) -> int:
    """Trajectories that `max_bytes` leaves room for; 0 if there is room for fewer than `wanted`.

    While nothing is in training it is at least what the next batch is missing, so that the learner never waits in vain.
    """
    if not config.max_bytes:
        return sys.maxsize
    fitting = _num_that_fit(load, size, config.max_bytes)
    missing = config.trajectories_per_step - load.num_queued if load.num_in_training == 0 else 0
    return max(fitting if fitting >= wanted else 0, missing, 0)


def _num_that_fit(load: Load, size: PayloadSize, max_bytes: int) -> int:
    if not size.num_seen:
        return 0  # no payload has told yet how large they are
    room = max_bytes - load.num_bytes - load.num_in_flight * size.mean_bytes
    return int(room // max(size.mean_bytes, 1.0))
