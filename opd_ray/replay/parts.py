"""What a store is made of, apart from its config and who waits: all that a snapshot keeps."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from opd_ray.replay.admission import Load, PayloadSize
from opd_ray.replay.cohort import StoredTrajectory
from opd_ray.replay.drafted import Drafted
from opd_ray.replay.ledger import Ledger
from opd_ray.replay.lengths import LengthReport
from opd_ray.replay.payloads import PayloadShelf
from opd_ray.replay.queue import SlotQueue
from opd_ray.replay.schedule import Schedule
from opd_ray.replay.staleness import StoreConfig


@dataclass(slots=True)
class StoreParts:
    """The parts; a trajectory leaves the store through `retire` or `evict` only."""

    schedule: Schedule
    queue: SlotQueue
    drafted: Drafted
    shelf: PayloadShelf
    ledger: Ledger
    lengths: LengthReport
    payload_size: PayloadSize
    data_ended: bool = False

    @classmethod
    def fresh(cls, config: StoreConfig, version: int) -> StoreParts:
        """Of an empty store at `version`."""
        size = PayloadSize(window=4 * config.trajectories_per_step)
        return cls(Schedule.at(version), SlotQueue(), Drafted(), PayloadShelf(), Ledger(), LengthReport(), size)

    @property
    def load(self) -> Load:
        """What counts for the byte budget."""
        return Load(len(self.queue), len(self.queue.in_flight), len(self.drafted), self.shelf.num_bytes)

    def counts(self) -> dict[str, int]:
        """Trajectories, payloads, bytes and versions."""
        stored = [*self.queue.ready.values(), *self.drafted.members.values()]
        return {
            "version": self.schedule.version,
            "next_version": self.schedule.next_version,
            "in_flight": len(self.queue.in_flight),
            "ready": len(self.queue.ready),
            "drafted": len(self.drafted),
            "visits_left": self.schedule.visits_left,
            "payloads": len(self.shelf),
            "payload_bytes": self.shelf.num_bytes,
            "memory_bytes": self.shelf.memory_bytes,
            "response_tokens": sum(member.receipt.num_response_tokens for member in stored),
        }

    def is_drafted(self, payload_id: int) -> bool:
        """Whether a row of that payload belongs to a cohort."""
        return self.drafted.has_payload(payload_id)

    def retire(self, members: Iterable[StoredTrajectory]) -> None:
        """These, taken out of `drafted`, had all their visits."""
        for member in members:
            self.shelf.drop_row(member.payload_id)
            self.ledger.train(1)
            self.lengths.keep(member.receipt.num_response_tokens)

    def evict_ready(self, slots: Iterable[int], reason: str) -> None:
        """Drop ready slots."""
        self.evict(self.queue.take(slots), reason)

    def evict(self, members: Iterable[StoredTrajectory], reason: str) -> None:
        """These, taken out of `queue` or `drafted`, are dropped."""
        for member in members:
            self.shelf.drop_row(member.payload_id)
            self.ledger.evict(1, reason)
            self.lengths.drop(member.receipt.num_response_tokens)
