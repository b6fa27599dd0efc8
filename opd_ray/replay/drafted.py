"""Trajectories that belong to a cohort: what the learner has, what it has given back, what was taken from it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from opd_ray.errors import LedgerError
from opd_ray.replay.cohort import StoredTrajectory


class Drafted:
    """Members of cohorts until their last release; `running` are the slots of the cohort that has visits left."""

    def __init__(self) -> None:
        self.members: dict[int, StoredTrajectory] = {}
        self.running: list[int] = []
        self._dropped: Counter[int] = Counter()  # lost while the learner had them: releases still to come
        self._payloads: Counter[int] = Counter()  # how many members have a row in which payload

    def __len__(self) -> int:
        return len(self.members)

    def begin(self, cohort: Sequence[StoredTrajectory]) -> None:
        """`cohort`, in order of slot number, is the running one from now on."""
        self.members.update({member.receipt.slot: member for member in cohort})
        self.running = [member.receipt.slot for member in cohort]
        self._payloads.update(member.payload_id for member in cohort)

    def has_payload(self, payload_id: int) -> bool:
        """Whether a member has a row in that payload."""
        return payload_id in self._payloads

    def expect(self, slots: Iterable[int]) -> None:
        """The learner will give `slots` back, which are not here: these releases are passed over."""
        self._dropped.update(slots)

    def cohort(self) -> list[StoredTrajectory]:
        """The running cohort's members."""
        return [self.members[slot] for slot in self.running]

    def check_out(self, slots: Iterable[int]) -> None:
        """Raise `LedgerError` unless the learner has every one of `slots`."""
        for slot in slots:
            member = self.members.get(slot)
            if slot not in self._dropped and (member is None or member.num_releases >= member.num_visits):
                raise LedgerError(
                    f"slot {slot} was released and is not out for training: release what was sampled, once"
                )

    def give_back(self, slots: Iterable[int], reuse: int) -> list[StoredTrajectory]:
        """The learner gives `slots` back; returns those that had `reuse` visits and are retired now."""
        retired = []
        for slot in slots:
            if slot in self._dropped:
                self._forget_dropped(slot)
                continue
            member = self.members[slot]
            member.num_releases += 1
            if member.num_releases == reuse:
                retired.append(self.members.pop(slot))
        self._forget_payloads(retired)
        return retired

    def take_away(self, slots: Iterable[int]) -> list[StoredTrajectory]:
        """Remove the members among `slots`, the learner's too; returns them."""
        taken = [self.members.pop(slot) for slot in slots if slot in self.members]
        for member in taken:
            if member.num_visits > member.num_releases:
                self._dropped[member.receipt.slot] = member.num_visits - member.num_releases
        self.running = [slot for slot in self.running if slot in self.members]
        self._forget_payloads(taken)
        return taken

    def _forget_dropped(self, slot: int) -> None:
        self._dropped[slot] -= 1
        if self._dropped[slot] == 0:
            del self._dropped[slot]

    def _forget_payloads(self, members: Iterable[StoredTrajectory]) -> None:
        self._payloads -= Counter(member.payload_id for member in members)
