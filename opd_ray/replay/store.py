"""The replay store: who may roll out, what is ready, which trajectories train next, and what became of each.

A plain class on one event loop: `ray.remote(ReplayStore)` makes it an async actor, ``asyncio.run`` tests it.
It keeps payload references of any type and never looks inside. `staleness` explains the protocol and proves
its bound.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from opd_ray.errors import LedgerError, StoreClosedError, StoreError
from opd_ray.replay.cohort import SampledBatch, StoredTrajectory, collect
from opd_ray.replay.ledger import Ledger
from opd_ray.replay.payloads import PayloadShelf
from opd_ray.replay.queue import SlotQueue
from opd_ray.replay.staleness import StoreConfig, num_acquirable
from opd_ray.types import BatchReceipt

STALE = "stale"
DRAINED = "drained"


class ReplayStore:
    """Slots, ready trajectories, the running cohort and the ledger; only two methods ever wait.

    `version` is the policy version that all engines have at the start; `clock` gives seconds.
    """

    def __init__(self, config: StoreConfig, version: int = 0, clock: Callable[[], float] = time.monotonic) -> None:
        self._config = config
        self._clock = clock
        self._version = version
        self._next_version = version
        self._queue = SlotQueue()
        self._drafted: dict[int, StoredTrajectory] = {}  # members of cohorts, until their last release
        self._cohort: list[int] = []  # slots of the cohort that has visits left
        self._visits_left = 0
        self._last_visit_version = version
        self._dropped: dict[int, int] = {}  # evicted while the learner had them: releases still to come
        self._shelf = PayloadShelf()
        self._ledger = Ledger()
        self._data_ended = False
        self._drained = False
        self._sampling = False
        self._closed = False
        self._change = asyncio.Event()

    async def acquire_slots(self, num_slots: int) -> tuple[int, ...]:
        """Wait for room, then return `num_slots` new slot numbers, in ascending order.

        Fewer are returned (at least one) when fewer are missing: failures and evictions leave gaps smaller
        than a group, and waiting for a whole group's room would wait forever. Without them, and with groups
        that divide `trajectories_per_step`, groups are always whole. Raises `StoreClosedError` once the store
        is closed or the data have ended.
        """
        if num_slots < 1:
            raise StoreError(f"{num_slots} slots were asked for: ask for at least 1")
        while True:
            self._refuse_if_closed()
            if self._data_ended:
                raise StoreClosedError("the data have ended: acquire no slot after end_of_data()")
            count = min(num_slots, self._num_acquirable())
            if count > 0:
                self._ledger.start(count)
                return self._queue.give(count)
            await self._change.wait()

    def append(self, receipt: BatchReceipt, refs: list[Any]) -> None:
        """Take in scored trajectories; `refs` is a list, which Ray leaves alone, of one payload reference.

        Raises `LedgerError` when a slot is not in flight, `StoreError` on a receipt that cannot be right; the
        store is then unchanged.
        """
        slots = [trajectory.slot for trajectory in receipt.trajectories]
        if len(refs) != 1 or not slots:
            raise StoreError(f"append got {len(refs)} references and {len(slots)} trajectories: give 1 and at least 1")
        self._require(slots, self._queue.in_flight, "append", "in flight")
        now_s = self._clock()
        payload_id = self._shelf.put(refs[0], receipt.num_bytes, len(slots))
        for trajectory in receipt.trajectories:
            self._queue.land(StoredTrajectory(trajectory, payload_id, now_s))
        self._ledger.store(len(slots))
        if self._drained:
            self._evict_ready(slots, DRAINED)
        self._changed()

    async def sample(self, num_trajectories: int, learner_version: int) -> SampledBatch | None:
        """Wait for the batch of the optimizer step that starts from `learner_version`, and count its visit.

        The running cohort again while it has visits left (smaller if members were evicted), else the next
        one, once the `num_trajectories` oldest slots are all ready. None when the data have ended and no
        cohort can be filled any more; the leftovers are evicted as ``drained``. Raises `StoreError` when the
        request does not fit the protocol, `StaleBatchError` when a trajectory would be used above its bound,
        `StoreClosedError` when closed.
        """
        if num_trajectories != self._config.trajectories_per_step:
            raise StoreError(
                f"{num_trajectories} trajectories were asked for and a cohort has "
                f"{self._config.trajectories_per_step}: ask for trajectories_per_step"
            )
        if learner_version < self._version:
            raise StoreError(
                f"the learner asks at version {learner_version} and version {self._version} is published: "
                "restore learner and store from the same checkpoint"
            )
        if self._sampling:
            raise StoreError("a batch was asked for while another request waits: the learner samples once a step")
        self._sampling = True
        try:
            while not self._drained:
                self._refuse_if_closed()
                if self._visits_left == 0:
                    self._anchor(learner_version)
                    self._sweep(learner_version)
                    self._form_cohort()
                if self._visits_left > 0:
                    return self._visit(learner_version)
                if not self._drained:
                    await self._change.wait()
            return None
        finally:
            self._sampling = False

    def release(self, slots: Sequence[int], policy_version: int) -> None:
        """The step on `slots` is done, `policy_version` published: retire those that had all their visits.

        Slots evicted since they were sampled are passed over. Raises `LedgerError` for a slot that is not
        out, `StoreError` for a version below the published one; the store is then unchanged.
        """
        self._refuse_older(policy_version)
        self._refuse_repeated(slots, "release")
        for slot in slots:
            member = self._drafted.get(slot)
            if slot not in self._dropped and (member is None or member.num_releases >= member.num_visits):
                raise LedgerError(
                    f"slot {slot} was released and is not out for training: release what was sampled, once"
                )
        for slot in slots:
            if slot in self._dropped:
                self._forget_dropped(slot)
                continue
            member = self._drafted[slot]
            member.num_releases += 1
            if member.num_releases == self._config.reuse:
                del self._drafted[slot]
                self._shelf.drop_row(member.payload_id)
                self._ledger.train(1)
        self.set_version(policy_version)

    def set_version(self, policy_version: int) -> None:
        """All engines have confirmed `policy_version`; raises `StoreError` when versions go back."""
        self._refuse_older(policy_version)
        self._version = policy_version
        self._next_version = max(self._next_version, policy_version + self._visits_left)
        self._changed()

    def fail(self, slots: Sequence[int], reason: str) -> None:
        """Slots in flight ended without a trajectory; raises `LedgerError` if one is not in flight."""
        self._require(slots, self._queue.in_flight, "fail", "in flight")
        for slot in slots:
            del self._queue.in_flight[slot]
        self._ledger.fail(len(slots), reason)
        self._changed()

    def evict(self, slots: Sequence[int], reason: str) -> None:
        """Drop stored trajectories, the learner's too; raises `LedgerError` if one is not in the store."""
        self._require(slots, self._queue.ready.keys() | self._drafted.keys(), "evict", "in the store")
        self._evict_ready([slot for slot in slots if slot in self._queue.ready], reason)
        for slot in slots:
            member = self._drafted.pop(slot, None)
            if member is None:
                continue
            if member.num_visits > member.num_releases:
                self._dropped[slot] = member.num_visits - member.num_releases
            self._shelf.drop_row(member.payload_id)
            self._ledger.evict(1, reason)
        self._cohort = [slot for slot in self._cohort if slot in self._drafted]
        if self._visits_left > 0 and not self._cohort:
            self._visits_left = 0
            self._next_version = max(self._last_visit_version + 1, self._version)
        self._changed()

    def end_of_data(self) -> None:
        """No slot will be acquired any more: `sample` drains what is left and then returns None."""
        self._data_ended = True
        self._changed()

    def close(self) -> None:
        """End all waiting and later `acquire_slots` and `sample` calls with `StoreClosedError`."""
        self._closed = True
        self._changed()

    def ledger(self) -> dict[str, int]:
        """The books (`Ledger.as_dict`), compared with what is here; raises `LedgerError` if they differ."""
        self._ledger.check(in_flight=len(self._queue.in_flight), in_store=len(self._queue.ready) + len(self._drafted))
        return self._ledger.as_dict()

    def state(self) -> dict[str, int]:
        """Fill counts, flat and JSON-able: trajectories, payloads, bytes, versions, slots acquirable now."""
        stored = [*self._queue.ready.values(), *self._drafted.values()]
        return {
            "version": self._version,
            "next_version": self._next_version,
            "in_flight": len(self._queue.in_flight),
            "ready": len(self._queue.ready),
            "drafted": len(self._drafted),
            "visits_left": self._visits_left,
            "acquirable": self._num_acquirable(),
            "payloads": len(self._shelf),
            "payload_bytes": self._shelf.num_bytes,
            "response_tokens": sum(member.receipt.num_response_tokens for member in stored),
        }

    def _num_acquirable(self) -> int:
        return num_acquirable(len(self._queue), self._next_version, self._version, self._config)

    def _anchor(self, learner_version: int) -> None:
        if self._next_version != learner_version:
            self._next_version = learner_version
            self._changed()

    def _sweep(self, learner_version: int) -> None:
        stale = self._queue.older_than(learner_version - self._config.max_staleness)
        if stale:
            self._evict_ready(stale, STALE)
            self._changed()

    def _form_cohort(self) -> None:
        """Draft the n oldest slots if all are ready; drain if the data have ended and n cannot be filled."""
        size = self._config.trajectories_per_step
        head = self._queue.head(size)
        if head:
            self._drafted.update({slot: self._queue.ready.pop(slot) for slot in head})
            self._cohort, self._visits_left = head, self._config.reuse
        elif self._data_ended and len(self._queue) < size:
            self._drained = True
            self._evict_ready(list(self._queue.ready), DRAINED)

    def _visit(self, learner_version: int) -> SampledBatch:
        members = [self._drafted[slot] for slot in self._cohort]
        now_s = self._clock()
        infos = tuple(member.info(learner_version, self._config.max_staleness, now_s) for member in members)
        for member in members:
            member.num_visits += 1
        self._visits_left -= 1
        self._last_visit_version = learner_version
        self._next_version = learner_version + 1 + self._visits_left
        self._changed()
        return collect(members, self._shelf, infos)

    def _evict_ready(self, slots: Iterable[int], reason: str) -> None:
        for slot in slots:
            self._shelf.drop_row(self._queue.ready.pop(slot).payload_id)
            self._ledger.evict(1, reason)

    def _forget_dropped(self, slot: int) -> None:
        self._dropped[slot] -= 1
        if self._dropped[slot] == 0:
            del self._dropped[slot]

    def _require(self, slots: Sequence[int], where: Iterable[int], verb: str, state: str) -> None:
        self._refuse_repeated(slots, verb)
        missing = sorted(set(slots).difference(where))
        if missing:
            raise LedgerError(
                f"{verb} names {len(missing)} slots that are not {state} (first: {missing[:4]}; "
                f"{self._queue.num_given} were given out): each slot ends once"
            )

    def _refuse_repeated(self, slots: Sequence[int], verb: str) -> None:
        if len(set(slots)) != len(slots):
            raise LedgerError(f"{verb} names a slot twice among {len(slots)}: name each slot once")

    def _refuse_older(self, policy_version: int) -> None:
        if policy_version < self._version:
            raise StoreError(f"policy version {policy_version} is below the published {self._version}: never go back")

    def _refuse_if_closed(self) -> None:
        if self._closed:
            raise StoreClosedError("the replay store is closed: the run is ending")

    def _changed(self) -> None:
        """Wake everyone who waits; each looks again for itself, in the order of waiting."""
        self._change.set()
        self._change = asyncio.Event()
