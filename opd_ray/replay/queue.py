"""Slots that wait for a cohort: in flight, or ready with their trajectory; always in order of slot number."""

from __future__ import annotations

import heapq

from opd_ray.replay.cohort import StoredTrajectory


class SlotQueue:
    """Gives out slot numbers and says which slots are next."""

    def __init__(self) -> None:
        self.num_given = 0
        self.in_flight: dict[int, str | None] = {}  # prompt ids, if known; ascending: slot numbers only grow
        self.ready: dict[int, StoredTrajectory] = {}  # in order of arrival

    def __len__(self) -> int:
        return len(self.in_flight) + len(self.ready)

    def give(self, count: int) -> tuple[int, ...]:
        """`count` new slots, in flight from now on."""
        slots = tuple(range(self.num_given, self.num_given + count))
        self.num_given += count
        self.in_flight.update(dict.fromkeys(slots))
        return slots

    def land(self, trajectory: StoredTrajectory) -> None:
        """A slot in flight became ready."""
        slot = trajectory.receipt.slot
        del self.in_flight[slot]
        self.ready[slot] = trajectory

    def head(self, size: int) -> list[int]:
        """The `size` oldest slots if all of them are ready, else none: a slow slot is never overtaken."""
        head = heapq.nsmallest(size, self.ready)
        oldest_in_flight = next(iter(self.in_flight), None)
        if len(head) < size or (oldest_in_flight is not None and oldest_in_flight < head[-1]):
            return []
        return head

    def older_than(self, version: int) -> list[int]:
        """Ready slots with a token below policy version `version`."""
        return [slot for slot, member in self.ready.items() if member.receipt.oldest_version < version]
