"""The store's trajectories: those that wait for a batch, and those in training."""

from __future__ import annotations

from bisect import insort
from collections import Counter
from collections.abc import Iterable, Sequence

from opd_ray.errors import LedgerError
from opd_ray.replay.batch import StoredTrajectory


class Queue:
    """Trajectories that belong to no batch yet, in flight or ready, always in order of their id.

    `ready` changes through `complete`, `put` and `take` only: its order and its versions are kept with it, because
    every arrival asks for them.
    """

    def __init__(self) -> None:
        self.num_given = 0
        self.in_flight: dict[int, str | None] = {}  # prompt ids, if known; ascending: ids only grow
        self.ready: dict[int, StoredTrajectory] = {}  # in order of arrival
        self._order: list[int] = []  # the ready ones, ascending
        self._versions: Counter[int] = Counter()  # how many of them have which oldest version

    def __len__(self) -> int:
        return len(self.in_flight) + len(self.ready)

    def give(self, count: int) -> tuple[int, ...]:
        """Return `count` new ids, in flight from now on."""
        trajectory_ids = tuple(range(self.num_given, self.num_given + count))
        self.num_given += count
        self.in_flight.update(dict.fromkeys(trajectory_ids))
        return trajectory_ids

    def complete(self, trajectory: StoredTrajectory) -> None:
        """Move a trajectory from in flight to ready."""
        del self.in_flight[trajectory.meta.trajectory_id]
        self.put(trajectory)

    def put(self, trajectory: StoredTrajectory) -> None:
        """Add a ready trajectory that was not in flight here."""
        self.ready[trajectory.meta.trajectory_id] = trajectory
        insort(self._order, trajectory.meta.trajectory_id)
        self._versions[trajectory.meta.oldest_version] += 1

    def take(self, trajectory_ids: Iterable[int]) -> list[StoredTrajectory]:
        """Remove ready trajectories; returns them in the order named."""
        taken = [self.ready.pop(trajectory_id) for trajectory_id in trajectory_ids]
        if taken:
            self._order = [trajectory_id for trajectory_id in self._order if trajectory_id in self.ready]
            self._versions -= Counter(member.meta.oldest_version for member in taken)
        return taken

    def head(self, size: int) -> list[int]:
        """Return the `size` oldest ids if all of them are ready, else none: a slow one is never overtaken."""
        oldest_in_flight = next(iter(self.in_flight), None)
        if len(self._order) < size or (oldest_in_flight is not None and oldest_in_flight < self._order[size - 1]):
            return []
        return self._order[:size]

    def oldest_ready(self, size: int) -> list[int]:
        """Return the `size` oldest ids that are ready, or as many as there are."""
        return self._order[:size]

    def older_than(self, version: int) -> list[int]:
        """Return the ready ids with a token below policy version `version`."""
        if min(self._versions, default=version) >= version:
            return []
        return [trajectory_id for trajectory_id, member in self.ready.items() if member.meta.oldest_version < version]


class InTraining:
    """Members of batches until their last release; `current` are the ids of the batch that has uses left."""

    def __init__(self) -> None:
        self.members: dict[int, StoredTrajectory] = {}
        self.current: list[int] = []
        self._dropped: Counter[int] = Counter()  # dropped while the learner had them: releases still to come
        self._payloads: Counter[int] = Counter()  # how many members have a row in which payload

    def __len__(self) -> int:
        return len(self.members)

    def begin(self, batch: Sequence[StoredTrajectory]) -> None:
        """Make `batch`, in order of id, the current one."""
        self.members.update({member.meta.trajectory_id: member for member in batch})
        self.current = [member.meta.trajectory_id for member in batch]
        self._payloads.update(member.payload_id for member in batch)

    def has_payload(self, payload_id: int) -> bool:
        """Whether a member has a row in that payload."""
        return payload_id in self._payloads

    def current_batch(self) -> list[StoredTrajectory]:
        """Members of the current batch."""
        return [self.members[trajectory_id] for trajectory_id in self.current]

    def check_out(self, trajectory_ids: Iterable[int]) -> None:
        """Raise `LedgerError` unless the learner has every one of `trajectory_ids`."""
        for trajectory_id in trajectory_ids:
            member = self.members.get(trajectory_id)
            if trajectory_id not in self._dropped and (member is None or member.num_releases >= member.num_uses):
                raise LedgerError(
                    f"trajectory {trajectory_id} was released and is not out for training: "
                    "release what was sampled, once"
                )

    def give_back(self, trajectory_ids: Iterable[int], reuse: int) -> list[StoredTrajectory]:
        """Count a release of `trajectory_ids`; returns those that had `reuse` uses and are retired now."""
        retired = []
        for trajectory_id in trajectory_ids:
            if trajectory_id in self._dropped:
                self._dropped[trajectory_id] -= 1
                if self._dropped[trajectory_id] == 0:
                    del self._dropped[trajectory_id]
                continue
            member = self.members[trajectory_id]
            member.num_releases += 1
            if member.num_releases == reuse:
                retired.append(self.members.pop(trajectory_id))
        self._forget_payloads(retired)
        return retired

    def remove(self, trajectory_ids: Iterable[int]) -> list[StoredTrajectory]:
        """Remove the members among `trajectory_ids`, also those that the learner has; returns them."""
        taken = [self.members.pop(trajectory_id) for trajectory_id in trajectory_ids if trajectory_id in self.members]
        for member in taken:
            if member.num_uses > member.num_releases:
                self._dropped[member.meta.trajectory_id] = member.num_uses - member.num_releases
        self.current = [trajectory_id for trajectory_id in self.current if trajectory_id in self.members]
        self._forget_payloads(taken)
        return taken

    def _forget_payloads(self, members: Iterable[StoredTrajectory]) -> None:
        self._payloads -= Counter(member.payload_id for member in members)
