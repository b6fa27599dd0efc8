"""A store that died: what the new one has, from the last snapshot and from what the controller saw since.

The learner is not rolled back and producers go on, so the snapshot alone would be wrong: it would train again what was
trained, and miss what was started. `journal.SlotJournal` keeps what is needed of it, a `SinceSnapshot`. Each slot that
was open at the snapshot, or was given out since, has one of these fates:

- it was trained, or it failed: so it is in the books;
- its producer has it (no answer to `append` or `fail` came): in flight, whatever the snapshot says;
- a row of the snapshot that the learner did not get since: ready. The running cohort of the snapshot goes on if the
  learner did not sample since;
- all others are lost, and counted as evicted/`store_lost`: what was stored in the dead store only, the cohort that was
  running (its visits must not be made again), and what the dead store had evicted for itself.

A row that the dead store had evicted since the snapshot is ready once more; the sweep takes those above the bound.

Bound: Theorem 2 of `staleness` needs nothing but the sweep, so it holds as it is, and with it the bound of
``stale=wait``. That nothing in flight or ready gets too old without a sweep (Theorem 1) holds as well, unless a row
came back that was evicted: the queue is a part of the dead store's, so ranks do not rise; ``next_version`` becomes the
learner version of the next sample, as it does when the running cohort's visits are given up, so it does not rise.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from opd_ray.errors import LedgerError, SnapshotError
from opd_ray.replay.cohort import StoredTrajectory
from opd_ray.replay.parts import StoreParts
from opd_ray.replay.schedule import Schedule

STORE_LOST = "store_lost"


@dataclass(frozen=True, slots=True)
class SinceSnapshot:
    """What the controller knows of the time since a snapshot (`SlotJournal.since`), or since the start.

    `version` is published, `learner_version` that of the learner's next sample. The snapshot knows the slots below
    `num_snapshot` (0: there is none); of these `trained`, `visited` (sampled, trained or not) and `failed` (reasons)
    are named, of all later ones `num_trained` and `num_failed` (by reason) are counted. `num_given` is one more than
    the highest slot that was acquired, `in_flight` are the slots that producers have, with prompt ids if known, `out`
    those that the learner has and will release, once for each release.
    """

    version: int
    learner_version: int
    num_snapshot: int = 0
    num_given: int = 0
    in_flight: Mapping[int, str | None] = field(default_factory=dict)
    visited: Collection[int] = frozenset()
    trained: Collection[int] = frozenset()
    failed: Mapping[int, str] = field(default_factory=dict)
    num_trained: int = 0
    num_failed: Mapping[str, int] = field(default_factory=dict)
    out: Sequence[int] = ()
    data_ended: bool = False


def needed_payloads(index: Mapping[str, Any], since: SinceSnapshot) -> set[int]:
    """Numbers of a snapshot's payloads that have a row for `reconcile` to keep."""
    rows = [row for row in index["ready"] if row["receipt"]["slot"] not in since.visited]
    cohort = index["cohort"] if _cohort_goes_on(index["version"], since) else []
    return {row["payload"] for row in (*rows, *cohort)}


def reconcile(parts: StoreParts, since: SinceSnapshot) -> None:
    """Turn `parts`, a snapshot's or fresh ones, into the store's that goes on.

    Raises `SnapshotError` when `since` counts from another snapshot or the learner is behind what is published,
    `LedgerError` when it contradicts itself.
    """
    _refuse_foreign(parts, since)
    known, num_known = parts.queue.in_flight, parts.queue.num_given
    again = _close_rows(parts, since)
    in_flight = {
        slot: prompt_id
        for slot, prompt_id in sorted(since.in_flight.items())
        if slot >= num_known or slot in known or slot in again
    }
    ended = [slot for slot in {*known, *again} if slot not in in_flight]
    num_new = max(0, since.num_given - num_known)
    parts.ledger.start(num_new)
    trained = since.num_trained + sum(slot in since.trained for slot in ended)
    failed = Counter(since.failed[slot] for slot in ended if slot in since.failed) + Counter(since.num_failed)
    num_ended = len(ended) + num_new - sum(slot >= num_known for slot in in_flight)
    lost = num_ended - trained - failed.total()
    if lost < 0:
        raise LedgerError(
            f"{num_ended} slots ended since the snapshot and {trained} were trained, {failed.total()} failed: "
            "note each slot's end once in the journal"
        )
    _book(parts, trained, failed, lost)
    parts.queue.in_flight = in_flight
    parts.queue.num_given = num_known + num_new
    parts.drafted.expect(since.out)
    parts.data_ended = parts.data_ended or since.data_ended
    if not parts.drafted.running:
        version = max(parts.schedule.version, since.version)  # the answer to the release may have been lost
        parts.schedule = Schedule(version, since.learner_version, since.learner_version - 1)
    parts.ledger.check(len(in_flight), len(parts.queue.ready) + len(parts.drafted))


def _cohort_goes_on(snapshot_version: int, since: SinceSnapshot) -> bool:
    return since.learner_version == snapshot_version and not since.out


def _close_rows(parts: StoreParts, since: SinceSnapshot) -> set[int]:
    """Retire and evict rows of the snapshot; returns the slots of those whose `append` was not answered."""
    again = parts.queue.take([slot for slot in parts.queue.ready if slot in since.in_flight or slot in since.failed])
    for member in again:
        parts.shelf.drop_row(member.payload_id)
    parts.ledger.take_back(len(again))
    rows: list[StoredTrajectory] = parts.queue.take([slot for slot in parts.queue.ready if slot in since.visited])
    if not _cohort_goes_on(parts.schedule.version, since):
        rows += parts.drafted.take_away(list(parts.drafted.running))
    parts.retire([member for member in rows if member.receipt.slot in since.trained])
    parts.evict([member for member in rows if member.receipt.slot not in since.trained], STORE_LOST)
    return {member.receipt.slot for member in again}


def _book(parts: StoreParts, num_trained: int, failed: Mapping[str, int], num_lost: int) -> None:
    """Enter slots that the snapshot had in flight, or not at all; of those stored since only the number is known."""
    parts.ledger.store(num_trained + num_lost)
    parts.ledger.train(num_trained)
    if num_lost:
        parts.ledger.evict(num_lost, STORE_LOST)
    for reason, count in failed.items():
        parts.ledger.fail(count, reason)


def _refuse_foreign(parts: StoreParts, since: SinceSnapshot) -> None:
    if parts.queue.num_given != since.num_snapshot:
        raise SnapshotError(
            f"the snapshot knows {parts.queue.num_given} slots and the journal counts from one that knows "
            f"{since.num_snapshot}: recover from the snapshot that the journal was told of last"
        )
    if max(parts.schedule.version, since.version) > since.learner_version:
        raise SnapshotError(
            f"the snapshot is of version {parts.schedule.version}, {since.version} is published and the learner is at "
            f"{since.learner_version}, behind them: recover from a snapshot of this run"
        )
