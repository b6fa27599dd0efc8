"""What the controller remembers of the store's slots, so that a store that dies can be recovered (`recovery`).

Rule: note a call when the store has answered it, and make a call that was not answered again, at the recovered store.
Two exceptions: `stepped`, as the learner's step is done, whatever the store says to the release, and `assigned`, as
nobody waits for the store to hear of prompts: a recovered store is told of all.

Memory: slots that the snapshot knows are kept by number, later ones are only counted, and what lies before a committed
snapshot is forgotten; so it is bounded by the slots open at a snapshot and those in flight.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from opd_ray.errors import LedgerError, StoreError
from opd_ray.replay.recovery import SinceSnapshot


@dataclass(slots=True)
class _Ends:
    """What became of slots: by number, and in counts for those that no snapshot knows."""

    visited: set[int] = field(default_factory=set)
    trained: set[int] = field(default_factory=set)
    failed: dict[int, str] = field(default_factory=dict)
    num_trained: int = 0
    num_failed: Counter[str] = field(default_factory=Counter)

    def and_then(self, later: _Ends) -> _Ends:
        """Both."""
        return _Ends(
            self.visited | later.visited,
            self.trained | later.trained,
            self.failed | later.failed,
            self.num_trained + later.num_trained,
            self.num_failed + later.num_failed,
        )

    def counted_from(self, first: int) -> _Ends:
        """The same, with the slots from `first` on only counted."""
        return _Ends(
            {slot for slot in self.visited if slot < first},
            {slot for slot in self.trained if slot < first},
            {slot: reason for slot, reason in self.failed.items() if slot < first},
            self.num_trained + sum(slot >= first for slot in self.trained),
            self.num_failed + Counter(reason for slot, reason in self.failed.items() if slot >= first),
        )


class SlotJournal:
    """Follows the slots of one run; a plain object in the controller's event loop.

    After a restart from a checkpoint `num_given` is what the store's `restore` returned and `in_flight` its `pending`.
    """

    def __init__(self, num_given: int = 0, in_flight: Mapping[int, str | None] | None = None) -> None:
        self._num_given = num_given
        self._in_flight = dict(in_flight or {})
        self._num_snapshot = num_given
        self._ends = _Ends()  # since the snapshot, up to the mark
        self._marked: _Ends | None = None  # since the mark; all by number, nobody knows yet what the new snapshot has
        self._carried = _Ends()  # before the mark, but perhaps not in the new snapshot
        self._mark = 0
        self._out: list[tuple[int, ...]] = []
        self._unreleased: set[int] = set()  # trained, and the store has not answered to the release
        self._num_running = 0
        self._data_ended = False

    @property
    def in_flight(self) -> Mapping[int, str | None]:
        """Slots that producers have, with their prompts' ids; an unanswered call about others is not made again."""
        return self._in_flight

    def acquired(self, slots: Iterable[int]) -> None:
        """`acquire_slots` answered."""
        for slot in slots:
            self._in_flight[slot] = None
            self._num_given = max(self._num_given, slot + 1)

    def assigned(self, slots: Sequence[int], prompt_ids: Sequence[str]) -> None:
        """`assign` is on its way."""
        self._in_flight.update(zip(slots, prompt_ids, strict=True))

    def landed(self, slots: Iterable[int]) -> None:
        """`append` answered."""
        for slot in slots:
            self._in_flight.pop(slot, None)  # sampled already, if that answer was faster

    def failed(self, slots: Iterable[int], reason: str) -> None:
        """`fail` answered."""
        for slot in slots:
            if slot not in self._in_flight:
                raise LedgerError(f"slot {slot} failed and is not in flight: note each slot's end once in the journal")
            del self._in_flight[slot]
            self._now().failed[slot] = reason
        self._settle()

    def sampled(self, slots: Sequence[int]) -> None:
        """`sample` answered: the learner has these."""
        self.landed(slots)
        self._out.append(tuple(slots))
        self._num_running += 1
        self._now().visited.update(slots)
        self._settle()

    def stepped(self, slots: Sequence[int], is_last_visit: bool) -> None:
        """The optimizer step on a batch is done (before the release); `is_last_visit` when these had all visits now."""
        self._num_running -= 1
        if is_last_visit:
            self._unreleased.update(slots)
            self._now().trained.update(slots)
        self._settle()

    def released(self, slots: Sequence[int]) -> None:
        """`release` or `release_and_snapshot` answered; note it before `snapshot_taken`."""
        if tuple(slots) not in self._out:
            raise LedgerError(f"{len(slots)} slots that are no sampled batch were released: release as sampled, once")
        self._out.remove(tuple(slots))
        self._unreleased.difference_update(slots)

    def data_ended(self) -> None:
        """`end_of_data` answered."""
        self._data_ended = True

    def mark(self) -> int:
        """A snapshot will be asked for now; returns what `snapshot_taken` is to be told. An older mark is forgotten."""
        if self._marked is not None:
            self._ends = self._ends.and_then(self._marked)
        self._carried = _Ends({slot for batch in self._out for slot in batch}, set(self._unreleased))
        self._marked = _Ends()
        self._settle()
        self._mark += 1
        return self._mark

    def snapshot_taken(self, mark: int, num_snapshot: int) -> None:
        """The snapshot asked for after `mark` is committed: recovery starts from it from now on.

        `num_snapshot` is what the store returned, the number of slots that the snapshot knows. Raises `StoreError` when
        `mark` is not the last one.
        """
        if self._marked is None or mark != self._mark:
            raise StoreError(
                f"a snapshot of mark {mark} was noted and the last mark is {self._mark}: take one snapshot at a time"
            )
        self._num_snapshot = num_snapshot
        self._ends, self._marked = self._carried.and_then(self._marked), None
        self._carried = _Ends()
        self._settle()

    def since(self, version: int, learner_version: int) -> SinceSnapshot:
        """What `recover` is to be told; `version` is published, the learner has done `learner_version` steps."""
        ends = self._ends
        if self._marked is not None:
            ends = ends.and_then(self._marked).counted_from(self._num_snapshot)
        return SinceSnapshot(
            version=version,
            learner_version=learner_version + self._num_running,
            num_snapshot=self._num_snapshot,
            num_given=self._num_given,
            in_flight=dict(self._in_flight),
            visited=frozenset(ends.visited),
            trained=frozenset(ends.trained),
            failed=dict(ends.failed),
            num_trained=ends.num_trained,
            num_failed=dict(ends.num_failed),
            out=tuple(slot for batch in self._out for slot in batch),
            data_ended=self._data_ended,
        )

    def _now(self) -> _Ends:
        return self._ends if self._marked is None else self._marked

    def _settle(self) -> None:
        """Slots that the snapshot does not know are only counted."""
        if self._marked is None:
            self._ends = self._ends.counted_from(self._num_snapshot)
