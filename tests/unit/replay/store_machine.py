"""Any order of the store's calls, and a model that knows what must come of it."""

from __future__ import annotations

import asyncio
import gc
import json
import tempfile
import weakref
from collections import Counter
from collections.abc import Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from opd_ray.config.choices import ReplayOrder, StalePolicy
from opd_ray.replay.spill import SpillSpace
from opd_ray.replay.staleness import StoreConfig
from opd_ray.replay.store import ReplayStore
from tests.unit.replay.store_driver import MemoryPayloads, Payload, WaitsError, at_once, make_store, receipt, snapshot

MODES = [(StalePolicy.wait, ReplayOrder.fifo), (StalePolicy.wait, ReplayOrder.fifo)] + [
    (stale, order) for stale in (StalePolicy.drop, StalePolicy.gate) for order in ReplayOrder
]


Result = TypeVar("Result")


@dataclass(frozen=True)
class Shot:
    """What a snapshot holds: stored slots with their visits that were released, and what had become of all others."""

    folder: Path | None = None
    stored: tuple[tuple[int, int], ...] = ()


class StoreMachine(RuleBasedStateMachine):
    """Plays rollout, teacher and learner against one store, with books of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.temporary = tempfile.TemporaryDirectory()
        self.num_shots = 0

    def teardown(self) -> None:
        if hasattr(self, "store"):
            self.everything_pending_completes()
            self.nothing_is_lost()
        self.loop.run_until_complete(self.loop.shutdown_default_executor())
        self.loop.close()
        self.temporary.cleanup()

    @initialize(
        size=st.integers(1, 4),
        reuse=st.integers(1, 3),
        bound=st.integers(0, 5),
        mode=st.sampled_from(MODES),
        margin=st.integers(1, 2),
        max_bytes=st.sampled_from([0, 0, 0, 0, 350, 900]),
        memory=st.sampled_from([None, None, 0, 150, 450]),
    )
    def start(  # noqa: PLR0913  (one argument a choice)
        self,
        size: int,
        reuse: int,
        bound: int,
        mode: tuple[StalePolicy, ReplayOrder],
        margin: int,
        max_bytes: int,
        memory: int | None,
    ) -> None:
        stale, order = mode
        self.config = StoreConfig(
            size,
            reuse,
            bound,
            stale=stale,
            order=order,
            hard_staleness=bound + margin if stale is StalePolicy.gate else 0,
            max_bytes=max_bytes,
        )
        self.memory = memory
        self.store = self.new_store()
        self.shot = Shot()
        self.learner = 0  # completed steps
        self.published = 0
        self.acquired_at: dict[int, int] = {}
        self.in_flight: list[int] = []
        self.stored: set[int] = set()
        self.visits: dict[int, int] = {}  # since it was stored, here or in the snapshot
        self.all_visits: Counter[int] = Counter()  # those that the learner keeps
        self.completed: set[int] = set()  # had the step of their last visit
        self.visits_left = 0  # of the running cohort
        self.running: tuple[int, ...] = ()
        self.out: list[tuple[tuple[int, ...], bool]] = []  # sampled and not released; whether for the last time
        self.payloads: weakref.WeakSet[Payload] = weakref.WeakSet()
        self.data_of: dict[int, bytes] = {}
        self.fate: dict[int, str] = {}  # of slots that ended

    def new_store(self) -> ReplayStore:
        folder = Path(self.temporary.name) / "spill"
        self.spill = None if self.memory is None else SpillSpace(self.memory, folder)
        return make_store(self.config, MemoryPayloads(self.put), spill=self.spill)

    def put(self, data: Any) -> Payload:
        payload = Payload(bytes(data))
        self.payloads.add(payload)
        return payload

    def call(self, call: Coroutine[Any, Any, Result]) -> Result:
        return self.loop.run_until_complete(at_once(call, lambda: self.spill is not None and self.spill.is_busy))

    @rule(count=st.integers(1, 6))
    def acquire(self, count: int) -> None:
        try:
            slots = self.call(self.store.acquire(count))
        except WaitsError:
            acquirable = self.store.counts()["acquirable"]
            assert acquirable == 0 or (self.config.max_bytes and acquirable < count)
            return
        assert 1 <= len(slots) <= count
        assert self.fate.keys().isdisjoint(slots), "a slot was given out twice"
        self.acquired_at |= dict.fromkeys(slots, self.published)
        self.in_flight += slots
        prompt_ids = [f"p{slot}" for slot in slots[1:]]
        self.store.assign(slots[1:], prompt_ids)
        queued = len(self.in_flight) + len(self.ready())
        assert queued <= (self.config.max_staleness + 1) * self.config.trajectories_per_step
        expected_bytes = self.store.counts()["payload_bytes"] + 100 * len(self.in_flight)
        is_exception = len(self.ready()) == len(self.stored) and queued <= self.config.trajectories_per_step
        assert not self.config.max_bytes or expected_bytes <= self.config.max_bytes or is_exception
        assert self.memory is None or self.unpinned_bytes() <= self.memory

    def unpinned_bytes(self) -> int:
        """Of payloads in memory that no cohort needs."""
        pinned = {self.data_of[slot] for slot in self.stored if self.visits[slot]}
        return sum(size_of(payload.data) for payload in self.payloads if payload.data not in pinned)

    def ready(self) -> set[int]:
        return {slot for slot in self.stored if not self.visits[slot]}

    def pick(self, data: st.DataObject, slots: list[int]) -> list[int]:
        return data.draw(st.lists(st.sampled_from(slots), min_size=1, max_size=4, unique=True))

    @precondition(lambda self: self.in_flight)
    @rule(data=st.data())
    def append(self, data: st.DataObject) -> None:
        self.take_in(self.pick(data, self.in_flight))

    def take_in(self, slots: list[int]) -> None:
        self.append_to_store(slots)
        for slot in slots:
            self.in_flight.remove(slot)
            self.stored.add(slot)
            self.visits[slot] = 0

    def append_to_store(self, slots: list[int]) -> None:
        # A token's version is the one published when its slot was acquired, the oldest that the proof allows.
        payload = self.put(json.dumps(slots).encode())
        self.store.append(receipt(slots, {slot: self.acquired_at[slot] for slot in slots}), payload)
        self.data_of |= dict.fromkeys(slots, payload.data)

    @precondition(lambda self: self.in_flight)
    @rule(data=st.data())
    def fail(self, data: st.DataObject) -> None:
        slots = self.pick(data, self.in_flight)
        self.store.fail(slots, "test")
        self.fate |= dict.fromkeys(slots, "failed/test")
        self.in_flight = [slot for slot in self.in_flight if slot not in slots]

    @precondition(lambda self: self.stored)
    @rule(data=st.data())
    def evict(self, data: st.DataObject) -> None:
        slots = self.pick(data, sorted(self.stored))
        self.store.evict(slots, "test")
        self.drop(slots, "evicted/test")

    @precondition(lambda self: self.stored)
    @rule(data=st.data())
    def drop_lost(self, data: st.DataObject) -> None:
        """The payloads of some slots are gone with a node; whoever says so may name slots that are not here."""
        slots = self.pick(data, sorted(self.stored))
        lost = {self.data_of[slot] for slot in slots}
        self.store.drop_lost([*slots, *self.fate, 10**6])
        self.drop([slot for slot in self.stored if self.data_of[slot] in lost], "evicted/payload_lost")

    def drop(self, slots: list[int], fate: str) -> None:
        self.fate |= dict.fromkeys(slots, fate)
        self.stored.difference_update(slots)
        self.running = tuple(slot for slot in self.running if slot in self.stored)
        if not self.running:
            self.visits_left = 0

    @rule(num_slow=st.integers(0, 3))
    def produce(self, num_slow: int) -> None:
        """Rollout runs as far ahead as it may; all but the slowest, the first, come in."""
        self.acquire(99)
        if self.in_flight[num_slow:]:
            self.take_in(self.in_flight[num_slow:])

    @rule(num_steps=st.integers(1, 4))
    def train(self, num_steps: int) -> None:
        for _ in range(num_steps):
            if self.try_sample():
                self.release()

    def shoot(self) -> Shot:
        """A snapshot of the store, and what it must hold."""
        self.num_shots += 1
        folder = Path(self.temporary.name) / str(self.num_shots)
        self.loop.run_until_complete(snapshot(self.store, folder))
        num_out = Counter(slot for slots, _ in self.out for slot in slots)
        return Shot(folder, tuple((slot, self.visits[slot] - num_out[slot]) for slot in sorted(self.stored)))

    @rule()
    def crash_and_restore(self) -> None:
        """The learner goes on from what was published; what it had out is visited again."""
        state, lengths = self.store.counts(), self.store.lengths()
        self.shot = self.shoot()
        assert self.shot.folder is not None
        self.store = self.new_store()
        self.loop.run_until_complete(self.store.restore(self.shot.folder))
        assert list(self.store.pending()) == sorted(self.in_flight)
        assert self.store.lengths() == lengths
        if not self.out:
            assert self.store.counts() | {"memory_bytes": 0} == state | {"memory_bytes": 0}
        for slots, _ in self.out:
            self.all_visits.subtract(slots)
        self.visits |= dict(self.shot.stored)
        self.out.clear()
        self.learner = self.published
        self.running = tuple(sorted(slot for slot in self.stored if self.visits[slot]))
        self.visits_left = self.config.reuse - self.visits[self.running[0]] if self.running else 0

    @rule()
    def sample(self) -> None:
        self.try_sample()

    def try_sample(self) -> bool:
        if self.learner - self.published >= 2:
            return False
        size = self.config.trajectories_per_step
        if not self.visits_left:
            self.sweep()
        ready = self.ready()
        try:
            batch = self.call(self.store.sample(size, self.learner))
        except WaitsError:
            assert self.waiting_is_right(), "the learner waits for nothing"
            return False
        assert batch is not None
        assert list(batch.slots) == sorted(batch.slots)
        assert 1 <= len(batch.slots) <= size
        for info, (ref_index, _) in zip(batch.infos, batch.rows, strict=True):
            self.visits[info.slot] += 1
            self.all_visits[info.slot] += 1
            assert self.all_visits[info.slot] <= self.config.reuse, "a visit was made twice"
            assert info.visits == self.visits[info.slot] <= self.config.reuse
            assert info.staleness == self.learner - self.acquired_at[info.slot]
            assert info.staleness <= self.config.sweep_bound + info.visits - 1
            ref = batch.refs[ref_index]
            assert isinstance(ref, Payload) and ref.data == self.data_of[info.slot]
        if batch.infos[0].visits == 1:
            assert len(batch.slots) == size
            self.check_order(batch.slots, ready)
            self.visits_left = self.config.reuse
        self.running = batch.slots
        self.visits_left -= 1
        self.out.append((batch.slots, self.visits_left == 0))
        self.learner += 1
        return True

    def sweep(self) -> None:
        """What the store is to drop before it forms a cohort."""
        stale = {slot for slot in self.ready() if self.learner - self.acquired_at[slot] > self.config.sweep_bound}
        assert not stale or self.config.overtakes, "the proof says that nothing gets too old"
        self.stored -= stale
        self.fate |= dict.fromkeys(stale, "evicted/stale")

    def waiting_is_right(self) -> bool:
        ready, size = sorted(self.ready()), self.config.trajectories_per_step
        overtaken = not self.config.overtakes and any(slot < max(ready[:size], default=0) for slot in self.in_flight)
        return not self.visits_left and (len(ready) < size or overtaken)

    def check_order(self, slots: tuple[int, ...], ready: set[int]) -> None:
        passed_over = ready.difference(slots)
        if self.config.order is ReplayOrder.fifo:
            behind = passed_over if self.config.overtakes else {*passed_over, *self.in_flight}
            assert all(slot > slots[-1] for slot in behind), "an older slot was overtaken"
        elif self.config.order is ReplayOrder.freshest:
            oldest = min(self.acquired_at[slot] for slot in slots)
            assert all(self.acquired_at[slot] <= oldest for slot in passed_over), "a fresher one was passed over"

    @precondition(lambda self: self.out)
    @rule()
    def release(self) -> None:
        """The learner is done with the batch that it has longest."""
        slots, is_last = self.out.pop(0)
        self.published += 1
        self.store.release(slots, self.published)
        if is_last:
            done = self.stored.intersection(slots)
            self.completed.update(slots)
            self.fate |= dict.fromkeys(done, "trained")
            self.stored -= done

    def everything_pending_completes(self) -> None:
        """From any state the learner gets its next batch: no deadlock."""
        for _ in range(self.config.trajectories_per_step + 2):
            while self.out:
                self.release()
            if self.in_flight:
                self.take_in(list(self.in_flight))
            if self.try_sample():
                return
            self.acquire(1)
        raise AssertionError("the store is stuck")

    @invariant()
    def nothing_is_lost(self) -> None:
        if not hasattr(self, "store"):
            return
        books = self.store.ledger()
        assert (books["in_flight"], books["in_store"]) == (len(self.in_flight), len(self.stored))
        fates = Counter(self.fate.values())
        assert {name: count for name, count in books.items() if "/" in name} == {
            name: count for name, count in fates.items() if name != "trained"
        }
        assert books["trained"] == fates["trained"]
        assert books["started"] == len(self.fate) + len(self.in_flight) + len(self.stored)
        needed = {self.data_of[slot] for slot in self.stored}
        gc.collect(0)
        assert {payload.data for payload in self.payloads} <= needed, "a payload was not let go"
        state = self.store.counts()
        assert state["payloads"] == len(needed)
        assert state["payload_bytes"] == sum(size_of(data) for data in needed)
        assert state["memory_bytes"] == sum(size_of(payload.data) for payload in self.payloads)


def size_of(data: bytes) -> int:
    """Bytes of a payload, as its receipt says."""
    return 100 * len(json.loads(data))
