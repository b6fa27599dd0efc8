"""Slots that wait for a cohort: in flight, or ready with their trajectory; always in order of slot number."""

from __future__ import annotations

from bisect import insort
from collections import Counter
from collections.abc import Iterable

from opd_ray.replay.cohort import StoredTrajectory


class SlotQueue:
    """Gives out slot numbers and says which slots are next.

    `ready` changes through `put`, `land` and `take` only: its order and its versions are kept beside it, because every
    arrival asks for them.
    """

    def __init__(self) -> None:
        self.num_given = 0
        self.in_flight: dict[int, str | None] = {}  # prompt ids, if known; ascending: slot numbers only grow
        self.ready: dict[int, StoredTrajectory] = {}  # in order of arrival
        self._order: list[int] = []  # the ready slots, ascending
        self._versions: Counter[int] = Counter()  # how many of them have which oldest version

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
        del self.in_flight[trajectory.receipt.slot]
        self.put(trajectory)

    def put(self, trajectory: StoredTrajectory) -> None:
        """A slot is ready that was not in flight here."""
        self.ready[trajectory.receipt.slot] = trajectory
        insort(self._order, trajectory.receipt.slot)
        self._versions[trajectory.receipt.oldest_version] += 1

    def take(self, slots: Iterable[int]) -> list[StoredTrajectory]:
        """Remove ready slots; returns them as they were named."""
        taken = [self.ready.pop(slot) for slot in slots]
        if taken:
            self._order = [slot for slot in self._order if slot in self.ready]
            self._versions -= Counter(member.receipt.oldest_version for member in taken)
        return taken

    def head(self, size: int) -> list[int]:
        """The `size` oldest slots if all of them are ready, else none: a slow slot is never overtaken."""
        oldest_in_flight = next(iter(self.in_flight), None)
        if len(self._order) < size or (oldest_in_flight is not None and oldest_in_flight < self._order[size - 1]):
            return []
        return self._order[:size]

    def oldest_ready(self, size: int) -> list[int]:
        """The `size` oldest slots that are ready, or as many as there are."""
        return self._order[:size]

    def older_than(self, version: int) -> list[int]:
        """Ready slots with a token below policy version `version`."""
        if min(self._versions, default=version) >= version:
            return []
        return [slot for slot, member in self.ready.items() if member.receipt.oldest_version < version]
