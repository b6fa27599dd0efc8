"""The store at one instant: ready rows, what was in flight, the running cohort, the books. `snapshot_files` writes it.

Work that the learner had and did not give back is lost with it, so these visits are taken back: a cohort without any
release goes back to the ready (and, with ``order=fifo``, is formed again), one with some goes on with the visits that
are left. No planned first visit moves by that, so the bound of `staleness` holds across a restart: what follows such a
cohort in the queue had ``next_version - version`` visits before it, and has them again.

Where only the store is lost and the learner goes on, `recovery` says what becomes of these rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from opd_ray.errors import SnapshotError, StoreError
from opd_ray.replay.cohort import StoredTrajectory
from opd_ray.replay.ledger import Ledger
from opd_ray.replay.lengths import LengthReport
from opd_ray.replay.parts import StoreParts
from opd_ray.replay.schedule import Schedule
from opd_ray.replay.staleness import StoreConfig
from opd_ray.types import TrajectoryReceipt

FORMAT = 1


@dataclass(frozen=True, slots=True)
class StoreImage:
    """A store at one instant: `index`, JSON-able apart from its receipts, and the payloads' references by number."""

    index: dict[str, Any]
    refs: tuple[Any, ...]

    @property
    def num_given(self) -> int:
        """Slots that it knows."""
        return int(self.index["num_given"])


def capture(parts: StoreParts, config: StoreConfig, now_s: float) -> StoreImage:
    """The image of a store; raises `StoreError` when batches were released in another order than sampled."""
    drafted = parts.drafted.members.values()
    ready = [*parts.queue.ready.values(), *(member for member in drafted if not member.num_releases)]
    cohort = [member for member in drafted if member.num_releases]
    releases = {member.num_releases for member in cohort}
    if len(releases) > 1 or len(cohort) > config.trajectories_per_step:
        raise StoreError("a snapshot was asked for between releases out of order: release as sampled, whole batches")
    payload_ids = sorted({member.payload_id for member in (*ready, *cohort)})
    numbers = {payload_id: number for number, payload_id in enumerate(payload_ids)}

    def rows(members: Sequence[StoredTrajectory]) -> list[dict[str, Any]]:
        return [
            {
                "receipt": member.receipt,
                "payload": numbers[member.payload_id],
                "age_s": now_s - member.appended_s,
            }
            for member in members
        ]

    # Written later, while the store goes on: nothing in here may change with it.
    index: dict[str, Any] = {
        "format": FORMAT,
        "trajectories_per_step": config.trajectories_per_step,
        "reuse": config.reuse,
        "version": parts.schedule.version,
        "num_releases": max(releases, default=0),
        "num_given": parts.queue.num_given,
        "in_flight": [[slot, prompt_id] for slot, prompt_id in parts.queue.in_flight.items()],
        "ready": rows(ready),
        "cohort": rows(cohort),
        "payload_bytes": [parts.shelf.size(payload_id) for payload_id in payload_ids],
        "ledger": parts.ledger.as_dict(),
        "lengths": parts.lengths.as_dict(),
        "payload_size": [parts.payload_size.mean_bytes, parts.payload_size.num_seen],
        "data_ended": parts.data_ended,
    }
    return StoreImage(index, tuple(parts.shelf.ref(payload_id) for payload_id in payload_ids))


def rebuild(image: StoreImage, config: StoreConfig, now_s: float) -> StoreParts:
    """The store of an image that was read; raises `SnapshotError` where it does not fit `config`."""
    index = image.index
    for name in ("trajectories_per_step", "reuse"):
        if index[name] != getattr(config, name):
            raise SnapshotError(
                f"the snapshot has {name} = {index[name]} and the run {getattr(config, name)}: go on with the same"
            )
    num_rows = [0] * len(image.refs)
    for row in (*index["ready"], *index["cohort"]):
        num_rows[row["payload"]] += 1
    parts = StoreParts.fresh(config, index["version"])
    sizes = index["payload_bytes"]
    ids = [parts.shelf.put(*payload) for payload in zip(image.refs, sizes, num_rows, strict=True)]

    def members(rows: Sequence[Mapping[str, Any]], num_visits: int) -> list[StoredTrajectory]:
        return [
            StoredTrajectory(
                TrajectoryReceipt(**row["receipt"]), ids[row["payload"]], now_s - row["age_s"], num_visits, num_visits
            )
            for row in rows
        ]

    cohort = members(index["cohort"], index["num_releases"])
    parts.drafted.begin(cohort)
    parts.schedule = Schedule.at(index["version"], config.reuse - index["num_releases"] if cohort else 0)
    parts.queue.num_given = index["num_given"]
    parts.queue.in_flight = {slot: prompt_id for slot, prompt_id in index["in_flight"]}
    for member in members(index["ready"], 0):
        parts.queue.put(member)
    parts.ledger = Ledger.of(index["ledger"])
    parts.lengths = LengthReport.of(index["lengths"])
    parts.payload_size.mean_bytes, parts.payload_size.num_seen = index["payload_size"]
    parts.data_ended = index["data_ended"]
    parts.ledger.check(len(parts.queue.in_flight), len(parts.queue.ready) + len(parts.drafted))
    return parts
