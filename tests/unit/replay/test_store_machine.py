"""Any order of the store's calls: books balanced, bound held, payloads let go, no deadlock."""

from __future__ import annotations

import asyncio
import gc
import tempfile
import weakref
from pathlib import Path
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from opd_ray.choices import ReplayOrder, StalePolicy
from opd_ray.replay.staleness import StoreConfig
from opd_ray.replay.store import ReplayStore
from tests.unit.replay.store_driver import Payload, WaitsError, at_once, receipt

MODES = [(StalePolicy.wait, ReplayOrder.fifo), (StalePolicy.wait, ReplayOrder.fifo)] + [
    (stale, order) for stale in (StalePolicy.drop, StalePolicy.gate) for order in ReplayOrder
]


class StoreMachine(RuleBasedStateMachine):
    """Plays rollout, teacher and learner against one store, with books of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()

    def teardown(self) -> None:
        if hasattr(self, "store"):
            self.everything_pending_completes()
            self.nothing_is_lost()
        self.loop.close()

    @initialize(
        size=st.integers(1, 4),
        reuse=st.integers(1, 3),
        bound=st.integers(0, 5),
        mode=st.sampled_from(MODES),
        margin=st.integers(1, 2),
        max_bytes=st.sampled_from([0, 0, 0, 0, 350, 900]),
    )
    def start(
        self, size: int, reuse: int, bound: int, mode: tuple[StalePolicy, ReplayOrder], margin: int, max_bytes: int
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
        self.store = ReplayStore(self.config)
        self.learner = 0  # completed steps
        self.published = 0
        self.acquired_at: dict[int, int] = {}
        self.in_flight: list[int] = []
        self.stored: set[int] = set()
        self.visits: dict[int, int] = {}
        self.visits_left = 0  # of the running cohort
        self.running: tuple[int, ...] = ()
        self.out: list[tuple[int, ...]] = []  # sampled and not released
        self.payload_of: dict[int, weakref.ref[Payload]] = {}
        self.data_of: dict[int, bytes] = {}
        self.trained = self.evicted = self.stale = self.failed = 0

    @rule(count=st.integers(1, 6))
    def acquire(self, count: int) -> None:
        try:
            slots = self.loop.run_until_complete(at_once(self.store.acquire_slots(count)))
        except WaitsError:
            acquirable = self.store.state()["acquirable"]
            assert acquirable == 0 or (self.config.max_bytes and acquirable < count)
            return
        assert 1 <= len(slots) <= count
        self.acquired_at |= dict.fromkeys(slots, self.published)
        self.in_flight += slots
        queued = len(self.in_flight) + len(self.ready())
        assert queued <= (self.config.max_staleness + 1) * self.config.trajectories_per_step
        expected_bytes = self.store.state()["payload_bytes"] + 100 * len(self.in_flight)
        is_exception = len(self.ready()) == len(self.stored) and queued <= self.config.trajectories_per_step
        assert not self.config.max_bytes or expected_bytes <= self.config.max_bytes or is_exception

    def ready(self) -> set[int]:
        return {slot for slot in self.stored if not self.visits[slot]}

    def pick(self, data: st.DataObject, slots: list[int]) -> list[int]:
        return data.draw(st.lists(st.sampled_from(slots), min_size=1, max_size=4, unique=True))

    @precondition(lambda self: self.in_flight)
    @rule(data=st.data())
    def append(self, data: st.DataObject) -> None:
        self.take_in(self.pick(data, self.in_flight))

    def take_in(self, slots: list[int]) -> None:
        # A token's version is the one published when its slot was acquired, the oldest that the proof allows.
        payload = Payload(f"payload of {slots}".encode())
        self.store.append(receipt(slots, {slot: self.acquired_at[slot] for slot in slots}), [payload])
        for slot in slots:
            self.in_flight.remove(slot)
            self.stored.add(slot)
            self.visits[slot] = 0
            self.payload_of[slot] = weakref.ref(payload)
            self.data_of[slot] = payload.data

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

    @rule()
    def crash_and_restore(self) -> None:
        """The learner goes on from what was published; what it had out is visited again."""
        payloads: list[Payload] = []

        def put(data: Any) -> Payload:
            payloads.append(Payload(data.to_pybytes()))
            return payloads[-1]

        state, lengths = self.store.state(), self.store.lengths()
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / "snapshot"
            self.loop.run_until_complete(self.store.snapshot(folder, lambda payload: payload.data))
            self.store = ReplayStore(self.config)
            self.loop.run_until_complete(self.store.restore(folder, put))
        assert list(self.store.pending()) == sorted(self.in_flight)
        assert self.store.lengths() == lengths
        if not self.out:
            assert self.store.state() == state
        for batch in self.out:
            for slot in self.stored.intersection(batch):
                self.visits[slot] -= 1
        self.out.clear()
        self.learner = self.published
        self.running = tuple(sorted(slot for slot in self.stored if self.visits[slot]))
        self.visits_left = self.config.reuse - self.visits[self.running[0]] if self.running else 0
        by_data = {payload.data: payload for payload in payloads}
        for slot in self.stored:
            self.payload_of[slot] = weakref.ref(by_data[self.data_of[slot]])

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
            batch = self.loop.run_until_complete(at_once(self.store.sample(size, self.learner)))
        except WaitsError:
            assert self.waiting_is_right(), "the learner waits for nothing"
            return False
        assert batch is not None
        assert list(batch.slots) == sorted(batch.slots)
        assert 1 <= len(batch.slots) <= size
        for info, (ref_index, _) in zip(batch.infos, batch.rows, strict=True):
            self.visits[info.slot] += 1
            assert info.visits == self.visits[info.slot] <= self.config.reuse
            assert info.staleness == self.learner - self.acquired_at[info.slot]
            assert info.staleness <= self.config.sweep_bound + info.visits - 1
            assert batch.refs[ref_index] is self.payload_of[info.slot]()
        if batch.infos[0].visits == 1:
            assert len(batch.slots) == size
            self.check_order(batch.slots, ready)
            self.visits_left = self.config.reuse
        self.running = batch.slots
        self.visits_left -= 1
        self.out.append(batch.slots)
        self.learner += 1
        return True

    def sweep(self) -> None:
        """What the store is to drop before it forms a cohort."""
        stale = {slot for slot in self.ready() if self.learner - self.acquired_at[slot] > self.config.sweep_bound}
        assert not stale or self.config.overtakes, "the proof says that nothing gets too old"
        self.stored -= stale
        self.stale += len(stale)
        self.evicted += len(stale)

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
        assert books.get("evicted/stale", 0) == self.stale
        assert books["started"] == sum(books[key] for key in ("trained", "evicted", "failed", "in_store", "in_flight"))
        alive = {id(self.payload_of[slot]()) for slot in self.stored}
        assert self.store.state()["payloads"] == len(alive)
        gc.collect(0)
        for slot, payload in self.payload_of.items():
            held = any(self.payload_of[other] == payload for other in self.stored)
            assert (payload() is not None) == held, f"payload of slot {slot}"


TestStoreMachine = StoreMachine.TestCase
TestStoreMachine.settings = settings(max_examples=100, stateful_step_count=50, deadline=None)
