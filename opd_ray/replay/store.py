"""The replay store: who may roll out, what is ready, which trajectories train next, and what became of each.

A plain class without Ray: `desk` takes calls to it, `actors.store` makes both an actor. It keeps payload references of
any type and never looks inside. `staleness` explains the protocol and proves its bound.
"""

from __future__ import annotations

import time
from collections import ChainMap
from collections.abc import Callable, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, Literal

from opd_ray.errors import PayloadLostError, StoreClosedError, StoreError
from opd_ray.replay.admission import num_in_budget
from opd_ray.replay.cohort import SampledBatch, StoredTrajectory, collect
from opd_ray.replay.lost import PAYLOAD_LOST, in_same_payloads, unavailable
from opd_ray.replay.parts import StoreParts
from opd_ray.replay.recovery import SinceSnapshot, needed_payloads, reconcile
from opd_ray.replay.requests import refuse_misfit, refuse_older, refuse_repeated, refuse_used, require
from opd_ray.replay.sampling import next_cohort
from opd_ray.replay.snapshot import capture, rebuild
from opd_ray.replay.snapshot_files import read_index, read_payloads, write_image
from opd_ray.replay.spill import SpillSpace, as_is
from opd_ray.replay.staleness import StoreConfig, num_acquirable
from opd_ray.types import BatchReceipt, Histogram

STALE = "stale"
DRAINED = "drained"


class NotYet(Enum):
    """The answer of a call that would have to wait."""

    NOT_YET = "not yet"


NOT_YET = NotYet.NOT_YET


class ReplayStore:
    """Slots, ready trajectories, the running cohort and the ledger; `desk.StoreDesk` keeps who must wait.

    `version` is the policy version that all engines have at the start; `clock` gives seconds; `spill` is where payloads
    go that memory has no room for (None: nowhere).
    """

    def __init__(
        self,
        config: StoreConfig,
        version: int = 0,
        clock: Callable[[], float] = time.monotonic,
        spill: SpillSpace | None = None,
    ) -> None:
        self._config = config
        self._spill = spill
        self._clock = clock
        self._parts = StoreParts.fresh(config, version)
        self._drained = False
        self._closed = False

    def acquire_now(self, num_slots: int) -> tuple[int, ...]:
        """Return `num_slots` new slot numbers, in ascending order; none while there is no room.

        Fewer are returned (at least one) when fewer are missing: failures and evictions leave gaps smaller
        than a group, and waiting for a whole group's room would wait forever. Without them, and with groups
        that divide `trajectories_per_step`, groups are always whole; the byte budget is waited for as a whole,
        except when the learner has nothing. Raises `StoreClosedError` once the store is closed or the data have ended.
        """
        if num_slots < 1:
            raise StoreError(f"{num_slots} slots were asked for: ask for at least 1")
        self._refuse_if_closed()
        if self._parts.data_ended:
            raise StoreClosedError("the data have ended: acquire no slot after end_of_data()")
        count = min(num_slots, self._num_acquirable(num_slots))
        if count < 1:
            return ()
        self._parts.ledger.start(count)
        return self._parts.queue.give(count)

    @property
    def wants_relief(self) -> bool:
        """Whether payloads have more memory than they may, and nobody moves them to files yet: call `relieve`."""
        return self._spill is not None and self._spill.is_needed(self._parts)

    async def relieve(self) -> None:
        """Move payloads to files until the rest fits into memory; raises `StoreError` on a full disk."""
        if self._spill is not None:
            await self._spill.relieve(self._parts)

    def assign(self, slots: Sequence[int], prompt_ids: Sequence[str]) -> None:
        """Say which prompt each slot in flight is for, so that it can be started again after a crash (`pending`)."""
        if len(slots) != len(prompt_ids):
            raise StoreError(f"assign got {len(slots)} slots and {len(prompt_ids)} prompt ids: give one id a slot")
        require(slots, self._parts.queue.in_flight, "assign", "in flight")
        self._parts.queue.in_flight.update(zip(slots, prompt_ids, strict=True))

    def pending(self) -> dict[int, str | None]:
        """Slots in flight, ascending, with their prompts' ids; None where `assign` was not called.

        After `restore` each is to be started again under its slot number, or failed.
        """
        return dict(self._parts.queue.in_flight)

    def append(self, receipt: BatchReceipt, refs: list[Any]) -> None:
        """Take in scored trajectories; `refs` is a list, which Ray leaves alone, of one payload reference.

        Raises `LedgerError` when a slot is not in flight, `StoreError` on a receipt that cannot be right; the
        store is then unchanged.
        """
        slots = [trajectory.slot for trajectory in receipt.trajectories]
        if len(refs) != 1 or not slots:
            raise StoreError(f"append got {len(refs)} references and {len(slots)} trajectories: give 1 and at least 1")
        require(slots, self._parts.queue.in_flight, "append", "in flight")
        now_s = self._clock()
        payload_id = self._parts.shelf.put(refs[0], receipt.num_bytes, len(slots))
        for trajectory in receipt.trajectories:
            self._parts.queue.land(StoredTrajectory(trajectory, payload_id, now_s))
        self._parts.payload_size.add(receipt.num_bytes, len(slots))
        self._parts.ledger.store(len(slots))
        if self._drained:
            self._parts.evict_ready(slots, DRAINED)

    def sample_now(self, num_trajectories: int, learner_version: int) -> SampledBatch | None | Literal[NotYet.NOT_YET]:
        """The batch of the optimizer step that starts from `learner_version`, with its visit counted.

        The running cohort again while it has visits left (smaller if members were evicted), else the next
        one, once `num_trajectories` slots are ready: with ``stale=wait`` the oldest, else as `order` says. None
        when the data have ended and no cohort can be filled any more; the leftovers are evicted as ``drained``.
        `NOT_YET` while neither is so. Raises `StoreError` when the request does not fit the protocol, `StaleBatchError`
        when a trajectory would be used above its bound, `StoreClosedError` when closed.
        """
        expected, published = self._config.trajectories_per_step, self._parts.schedule.version
        refuse_misfit(num_trajectories, expected, learner_version, published)
        if self._drained:
            return None
        self._refuse_if_closed()
        if self._parts.schedule.visits_left == 0:
            self._parts.schedule.anchor(learner_version)
            self._sweep(learner_version)
            self._form_cohort(learner_version)
        if self._parts.schedule.visits_left > 0:
            return self._visit(learner_version)
        return None if self._drained else NOT_YET

    def release(self, slots: Sequence[int], policy_version: int) -> None:
        """The step on `slots` is done, `policy_version` published: retire those that had all their visits.

        Slots evicted since they were sampled are passed over. Raises `LedgerError` for a slot that is not
        out, `StoreError` for a version below the published one; the store is then unchanged.
        """
        refuse_older(policy_version, self._parts.schedule.version)
        refuse_repeated(slots, "release")
        self._parts.drafted.check_out(slots)
        self._parts.retire(self._parts.drafted.give_back(slots, self._config.reuse))
        self.set_version(policy_version)

    def set_version(self, policy_version: int) -> None:
        """All engines have confirmed `policy_version`; raises `StoreError` when versions go back."""
        refuse_older(policy_version, self._parts.schedule.version)
        self._parts.schedule.publish(policy_version)

    def fail(self, slots: Sequence[int], reason: str) -> None:
        """Slots in flight ended without a trajectory; raises `LedgerError` if one is not in flight."""
        require(slots, self._parts.queue.in_flight, "fail", "in flight")
        for slot in slots:
            del self._parts.queue.in_flight[slot]
        self._parts.ledger.fail(len(slots), reason)

    def evict(self, slots: Sequence[int], reason: str) -> None:
        """Drop stored trajectories, the learner's too; raises `LedgerError` if one is not in the store."""
        ready, drafted = self._parts.queue.ready, self._parts.drafted.members
        require(slots, ChainMap(ready, drafted), "evict", "in the store")
        self._parts.evict_ready([slot for slot in slots if slot in ready], reason)
        self._parts.evict(self._parts.drafted.take_away(slots), reason)
        if self._parts.schedule.visits_left > 0 and not self._parts.drafted.running:
            self._parts.schedule.give_up_visits()

    def lose(self, slots: Sequence[int]) -> None:
        """Evict what lies in the payloads of `slots`, which are gone with a node; what is not here is passed over."""
        self.evict(in_same_payloads(self._parts, slots), PAYLOAD_LOST)

    def end_of_data(self) -> None:
        """No slot will be acquired any more: `sample_now` drains what is left and then returns None."""
        self._parts.data_ended = True

    async def snapshot(self, folder: Path, fetch: Callable[[Any], Any]) -> int:
        """Write the store of this instant as `folder`; returns how many slots it knows (`SlotJournal.snapshot_taken`).

        `fetch` makes bytes, or an awaitable of them, of a payload reference, or raises `PayloadLostError`: then the
        payload's trajectories are evicted, and the snapshot is one of the store without them. The store goes on
        meanwhile. Raises `SnapshotError` if it cannot be written; an older one is then left as it was.
        """
        while True:
            image = capture(self._parts, self._config, self._clock())
            try:
                await write_image(image, folder, fetch)
            except PayloadLostError:
                self.evict(await unavailable(self._parts, fetch), PAYLOAD_LOST)
            else:
                return image.num_given

    async def release_and_snapshot(
        self, slots: Sequence[int], policy_version: int, folder: Path, fetch: Callable[[Any], Any]
    ) -> int:
        """`release`, then `snapshot` before any waiting call goes on: in lock-step nothing is in flight then."""
        self.release(slots, policy_version)
        return await self.snapshot(folder, fetch)

    async def restore(self, folder: Path, put: Callable[[Any], Any] = as_is) -> int:
        """Go on from a snapshot; returns how many slots it knows.

        `put` makes a payload reference of a `pyarrow.Buffer`. Slots that were in flight are so again, and visits that
        were not released are made again. Raises `SnapshotError` on a snapshot that is missing, damaged or foreign,
        `StoreError` when this store was in use; it stays as it was.
        """
        index = await read_index(folder)
        image = await read_payloads(folder, index, put, range(len(index["sha256"])))
        self._begin(rebuild(image, self._config, self._clock()))
        return self._parts.queue.num_given

    async def recover(
        self, since: SinceSnapshot, folder: Path | None = None, put: Callable[[Any], Any] = as_is
    ) -> None:
        """Go on where another store died: from its last snapshot (None: it left none) and what happened `since`.

        The learner goes on as well, and producers with the slots in flight; `recovery` tells what is lost. Raises as
        `restore` does, and `SnapshotError` when `since` does not count from that snapshot; it stays as it was.
        """
        parts = StoreParts.fresh(self._config, 0)
        if folder is not None:
            index = await read_index(folder)
            image = await read_payloads(folder, index, put, needed_payloads(index, since))
            parts = rebuild(image, self._config, self._clock())
        reconcile(parts, since)
        self._begin(parts)

    def close(self) -> None:
        """Refuse slots and batches from now on with `StoreClosedError`."""
        self._closed = True

    def ledger(self) -> dict[str, int]:
        """The books (`Ledger.as_dict`), compared with what is here; raises `LedgerError` if they differ."""
        self._parts.ledger.check(
            in_flight=len(self._parts.queue.in_flight), in_store=len(self._parts.queue.ready) + len(self._parts.drafted)
        )
        return self._parts.ledger.as_dict()

    def state(self) -> dict[str, int]:
        """Fill counts, flat and JSON-able: trajectories, payloads, bytes, versions, slots acquirable now, ledger/*."""
        books = {f"ledger/{name}": count for name, count in self._parts.ledger.as_dict().items()}
        return self._parts.counts() | {"acquirable": self._num_acquirable(1)} | books

    def lengths(self) -> dict[str, float | Histogram]:
        """What training kept against what was dropped, since the start (`LengthReport.as_metrics`)."""
        return self._parts.lengths.as_metrics()

    def _begin(self, parts: StoreParts) -> None:
        refuse_used(self._parts.ledger.started)
        self._parts = parts

    def _num_acquirable(self, wanted: int) -> int:
        schedule = self._parts.schedule
        load = self._parts.load
        fresh = num_acquirable(load.num_queued, schedule.next_version, schedule.version, self._config)
        return min(fresh, num_in_budget(load, self._parts.payload_size, min(wanted, fresh), self._config))

    def _sweep(self, learner_version: int) -> None:
        stale = self._parts.queue.older_than(learner_version - self._config.sweep_bound)
        if stale:
            self._parts.evict_ready(stale, STALE)

    def _form_cohort(self, learner_version: int) -> None:
        """Draft the next cohort if it is ready; drain if the data have ended and it cannot be filled."""
        cohort = next_cohort(self._parts.queue, self._config, learner_version)
        if cohort:
            self._parts.drafted.begin(self._parts.queue.take(cohort))
            self._parts.schedule.visits_left = self._config.reuse
        elif self._parts.data_ended and len(self._parts.queue) < self._config.trajectories_per_step:
            self._drained = True
            self._parts.evict_ready(list(self._parts.queue.ready), DRAINED)

    def _visit(self, learner_version: int) -> SampledBatch:
        if self._spill is not None:
            self._spill.recall(self._parts)
        members = self._parts.drafted.cohort()
        now_s = self._clock()
        infos = tuple(member.info(learner_version, self._config.sweep_bound, now_s) for member in members)
        for member in members:
            member.num_visits += 1
        self._parts.schedule.visit(learner_version)
        return collect(members, self._parts.shelf, infos)

    def _refuse_if_closed(self) -> None:
        if self._closed:
            raise StoreClosedError("the replay store is closed, the run is ending: ask it for nothing more")
