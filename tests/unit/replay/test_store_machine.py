"""Any order of the store's calls: books balanced, bound held, payloads let go, no deadlock."""

from __future__ import annotations

import asyncio
import gc
import weakref

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from opd_ray.replay.staleness import StoreConfig
from opd_ray.replay.store import ReplayStore
from tests.unit.replay.store_driver import Payload, WaitsError, at_once, receipt


class StoreMachine(RuleBasedStateMachine):
    """Plays rollout, teacher and learner against one store, with books of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()

    def teardown(self) -> None:
        self.loop.close()

    @initialize(size=st.integers(1, 4), reuse=st.integers(1, 3), bound=st.integers(0, 3))
    def start(self, size: int, reuse: int, bound: int) -> None:
        self.config = StoreConfig(size, reuse, bound)
        self.store = ReplayStore(self.config)
        self.learner = 0  # completed steps
        self.published = 0
        self.acquired_at: dict[int, int] = {}
        self.in_flight: list[int] = []
        self.stored: set[int] = set()
        self.visits: dict[int, int] = {}
        self.out: list[tuple[int, ...]] = []  # sampled and not released
        self.payload_of: dict[int, weakref.ref[Payload]] = {}
        self.trained = self.evicted = self.failed = 0

    @rule(count=st.integers(1, 6))
    def acquire(self, count: int) -> None:
        try:
            slots = self.loop.run_until_complete(at_once(self.store.acquire_slots(count)))
        except WaitsError:
            assert self.store.state()["acquirable"] == 0
            return
        assert 1 <= len(slots) <= count
        self.acquired_at |= dict.fromkeys(slots, self.published)
        self.in_flight += slots

    def pick(self, data: st.DataObject, slots: list[int]) -> list[int]:
        return data.draw(st.lists(st.sampled_from(slots), min_size=1, max_size=4, unique=True))

    @precondition(lambda self: self.in_flight)
    @rule(data=st.data())
    def append(self, data: st.DataObject) -> None:
        self.take_in(self.pick(data, self.in_flight))

    def take_in(self, slots: list[int]) -> None:
        # A token's version is the one published when its slot was acquired, the oldest that the proof allows.
        payload = Payload()
        self.store.append(receipt(slots, {slot: self.acquired_at[slot] for slot in slots}), [payload])
        for slot in slots:
            self.in_flight.remove(slot)
            self.stored.add(slot)
            self.visits[slot] = 0
            self.payload_of[slot] = weakref.ref(payload)

    @precondition(lambda self: self.in_flight)
    @rule(data=st.data())
    def fail(self, data: st.DataObject) -> None:
        slots = self.pick(data, self.in_flight)
        self.store.fail(slots, "test")
        self.failed += len(slots)
        self.in_flight = [slot for slot in self.in_flight if slot not in slots]

    @precondition(lambda self: self.stored)
    @rule(data=st.data())
    def evict(self, data: st.DataObject) -> None:
        slots = self.pick(data, sorted(self.stored))
        self.store.evict(slots, "test")
        self.evicted += len(slots)
        self.stored.difference_update(slots)

    @rule()
    def sample(self) -> None:
        self.try_sample()

    def try_sample(self) -> bool:
        if self.learner - self.published >= 2:
            return False
        size = self.config.trajectories_per_step
        try:
            batch = self.loop.run_until_complete(at_once(self.store.sample(size, self.learner)))
        except WaitsError:
            return False
        assert batch is not None
        assert list(batch.slots) == sorted(batch.slots)
        assert 1 <= len(batch.slots) <= size
        for info, (ref_index, _) in zip(batch.infos, batch.rows, strict=True):
            self.visits[info.slot] += 1
            assert info.visits == self.visits[info.slot] <= self.config.reuse
            assert info.staleness == self.learner - self.acquired_at[info.slot]
            assert info.staleness <= self.config.max_staleness + info.visits - 1
            assert batch.refs[ref_index] is self.payload_of[info.slot]()
        if batch.infos[0].visits == 1:
            assert len(batch.slots) == size
            unvisited = [slot for slot in (*self.in_flight, *self.stored) if not self.visits.get(slot)]
            assert all(slot > batch.slots[-1] for slot in unvisited), "an older slot was overtaken"
        self.out.append(batch.slots)
        self.learner += 1
        return True

    @precondition(lambda self: self.out)
    @rule()
    def release(self) -> None:
        slots = self.out.pop(0)
        self.published += 1
        self.store.release(slots, self.published)
        outstanding = {slot for batch in self.out for slot in batch}
        done = {
            slot
            for slot in slots
            if slot in self.stored and self.visits[slot] == self.config.reuse and slot not in outstanding
        }
        self.trained += len(done)
        self.stored -= done

    @rule()
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
        assert (books["trained"], books["evicted"], books["failed"]) == (
            self.trained,
            self.evicted,
            self.failed,
        )
        assert "evicted/stale" not in books, "the proof says that nothing gets too old"
        assert books["started"] == sum(books[key] for key in ("trained", "evicted", "failed", "in_store", "in_flight"))
        alive = {id(self.payload_of[slot]()) for slot in self.stored}
        assert self.store.state()["payloads"] == len(alive)
        gc.collect(0)
        for slot, payload in self.payload_of.items():
            held = any(self.payload_of[other] == payload for other in self.stored)
            assert (payload() is not None) == held, f"payload of slot {slot}"


TestStoreMachine = StoreMachine.TestCase
TestStoreMachine.settings = settings(max_examples=60, stateful_step_count=50, deadline=None)
