"""The state of a replay store: all that a checkpoint keeps of it."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from opd_ray.replay.admission import Load, PayloadSize, Schedule
from opd_ray.replay.batch import StoredTrajectory
from opd_ray.replay.ledger import Ledger
from opd_ray.replay.lengths import LengthReport
from opd_ray.replay.payloads import PayloadTable
from opd_ray.replay.staleness import StoreConfig
from opd_ray.replay.trajectories import InTraining, Queue


@dataclass(slots=True)
class StoreState:
    """Queue, batches in training, payloads and books; a trajectory leaves through `retire` or `evict` only."""

    schedule: Schedule
    queue: Queue
    in_training: InTraining
    payloads: PayloadTable
    ledger: Ledger
    lengths: LengthReport
    payload_size: PayloadSize
    data_ended: bool = False

    @classmethod
    def fresh(cls, config: StoreConfig, version: int) -> StoreState:
        """The state of an empty store at `version`."""
        size = PayloadSize(window=4 * config.trajectories_per_step)
        return cls(Schedule.at(version), Queue(), InTraining(), PayloadTable(), Ledger(), LengthReport(), size)

    @property
    def load(self) -> Load:
        """What counts for the byte budget."""
        return Load(len(self.queue), len(self.queue.in_flight), len(self.in_training), self.payloads.num_bytes)

    @property
    def stored(self) -> Mapping[int, StoredTrajectory]:
        """Trajectories that are ready or in training, by id."""
        return ChainMap(self.queue.ready, self.in_training.members)

    def counts(self) -> dict[str, int]:
        """Count trajectories, payloads, bytes and versions."""
        return {
            "version": self.schedule.version,
            "next_version": self.schedule.next_version,
            "in_flight": len(self.queue.in_flight),
            "ready": len(self.queue.ready),
            "in_training": len(self.in_training),
            "uses_left": self.schedule.uses_left,
            "payloads": len(self.payloads),
            "payload_bytes": self.payloads.num_bytes,
            "memory_bytes": self.payloads.memory_bytes,
            "response_tokens": sum(member.meta.num_response_tokens for member in self.stored.values()),
        }

    def check(self) -> None:
        """Compare the books with what is here; raises `LedgerError` if they differ."""
        num_stored = len(self.queue.ready) + len(self.in_training)
        self.ledger.check(in_flight=len(self.queue.in_flight), in_store=num_stored)

    def in_payloads(self, payload_ids: Collection[int]) -> list[int]:
        """Ids of the stored trajectories in these payloads, ascending."""
        return sorted(
            trajectory_id for trajectory_id, member in self.stored.items() if member.payload_id in payload_ids
        )

    def retire(self, members: Iterable[StoredTrajectory]) -> None:
        """Account for members, already taken out of `in_training`, that had all their uses."""
        for member in members:
            self.payloads.drop_row(member.payload_id)
            self.ledger.train(1)
            self.lengths.keep(member.meta.num_response_tokens)

    def evict(self, trajectory_ids: Collection[int], reason: str) -> None:
        """Drop stored trajectories, also those that the learner has; ids that are not stored are skipped."""
        members = self.queue.take(
            [trajectory_id for trajectory_id in trajectory_ids if trajectory_id in self.queue.ready]
        )
        members += self.in_training.remove(trajectory_ids)
        for member in members:
            self.payloads.drop_row(member.payload_id)
            self.ledger.evict(1, reason)
            self.lengths.drop(member.meta.num_response_tokens)
        if self.schedule.uses_left > 0 and not self.in_training.current:
            self.schedule.skip_uses()
