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
from tests.unit.replay.store_driver import MemoryPayloads, Payload, WaitsError, at_once, make_store, meta, snapshot

MODES = [(StalePolicy.wait, ReplayOrder.fifo), (StalePolicy.wait, ReplayOrder.fifo)] + [
    (stale, order) for stale in (StalePolicy.drop, StalePolicy.gate) for order in ReplayOrder
]


Result = TypeVar("Result")


@dataclass(frozen=True)
class Shot:
    """A checkpoint: the stored trajectories with their uses that were released."""

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
        self.num_uses: dict[int, int] = {}  # since it was stored, here or in the snapshot
        self.all_uses: Counter[int] = Counter()  # those that the learner keeps
        self.completed: set[int] = set()  # had the step of their last use
        self.uses_left = 0  # of the current batch
        self.running: tuple[int, ...] = ()
        self.out: list[tuple[tuple[int, ...], bool]] = []  # sampled and not released; whether for the last time
        self.payloads: weakref.WeakSet[Payload] = weakref.WeakSet()
        self.data_of: dict[int, bytes] = {}
        self.fate: dict[int, str] = {}  # of trajectories that ended

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
            trajectory_ids = self.call(self.store.acquire(count))
        except WaitsError:
            acquirable = self.store.counts()["acquirable"]
            assert acquirable == 0 or (self.config.max_bytes and acquirable < count)
            return
        assert 1 <= len(trajectory_ids) <= count
        assert self.fate.keys().isdisjoint(trajectory_ids), "a trajectory was given out twice"
        self.acquired_at |= dict.fromkeys(trajectory_ids, self.published)
        self.in_flight += trajectory_ids
        prompt_ids = [f"p{trajectory_id}" for trajectory_id in trajectory_ids[1:]]
        self.store.assign(trajectory_ids[1:], prompt_ids)
        queued = len(self.in_flight) + len(self.ready())
        assert queued <= (self.config.max_staleness + 1) * self.config.trajectories_per_step
        expected_bytes = self.store.counts()["payload_bytes"] + 100 * len(self.in_flight)
        is_exception = len(self.ready()) == len(self.stored) and queued <= self.config.trajectories_per_step
        assert not self.config.max_bytes or expected_bytes <= self.config.max_bytes or is_exception
        assert self.memory is None or self.unpinned_bytes() <= self.memory

    def unpinned_bytes(self) -> int:
        """Of payloads in memory that no batch needs."""
        pinned = {self.data_of[trajectory_id] for trajectory_id in self.stored if self.num_uses[trajectory_id]}
        return sum(size_of(payload.data) for payload in self.payloads if payload.data not in pinned)

    def ready(self) -> set[int]:
        return {trajectory_id for trajectory_id in self.stored if not self.num_uses[trajectory_id]}

    def pick(self, data: st.DataObject, trajectory_ids: list[int]) -> list[int]:
        return data.draw(st.lists(st.sampled_from(trajectory_ids), min_size=1, max_size=4, unique=True))

    @precondition(lambda self: self.in_flight)
    @rule(data=st.data())
    def append(self, data: st.DataObject) -> None:
        self.take_in(self.pick(data, self.in_flight))

    def take_in(self, trajectory_ids: list[int]) -> None:
        self.append_to_store(trajectory_ids)
        for trajectory_id in trajectory_ids:
            self.in_flight.remove(trajectory_id)
            self.stored.add(trajectory_id)
            self.num_uses[trajectory_id] = 0

    def append_to_store(self, trajectory_ids: list[int]) -> None:
        # A token's version is the one published when its trajectory was acquired, the oldest that the proof allows.
        payload = self.put(json.dumps(trajectory_ids).encode())
        self.store.append(
            meta(trajectory_ids, {trajectory_id: self.acquired_at[trajectory_id] for trajectory_id in trajectory_ids}),
            payload,
        )
        self.data_of |= dict.fromkeys(trajectory_ids, payload.data)

    @precondition(lambda self: self.in_flight)
    @rule(data=st.data())
    def fail(self, data: st.DataObject) -> None:
        trajectory_ids = self.pick(data, self.in_flight)
        self.store.fail(trajectory_ids, "test")
        self.fate |= dict.fromkeys(trajectory_ids, "failed/test")
        self.in_flight = [trajectory_id for trajectory_id in self.in_flight if trajectory_id not in trajectory_ids]

    @precondition(lambda self: self.stored)
    @rule(data=st.data())
    def evict(self, data: st.DataObject) -> None:
        trajectory_ids = self.pick(data, sorted(self.stored))
        self.store.evict(trajectory_ids, "test")
        self.drop(trajectory_ids, "evicted/test")

    @precondition(lambda self: self.stored)
    @rule(data=st.data())
    def drop_lost(self, data: st.DataObject) -> None:
        """The payloads of some trajectories were lost with a node; the call may name ids that are not here."""
        trajectory_ids = self.pick(data, sorted(self.stored))
        lost = {self.data_of[trajectory_id] for trajectory_id in trajectory_ids}
        self.store.drop_lost([*trajectory_ids, *self.fate, 10**6])
        self.drop(
            [trajectory_id for trajectory_id in self.stored if self.data_of[trajectory_id] in lost],
            "evicted/payload_lost",
        )

    def drop(self, trajectory_ids: list[int], fate: str) -> None:
        self.fate |= dict.fromkeys(trajectory_ids, fate)
        self.stored.difference_update(trajectory_ids)
        self.running = tuple(trajectory_id for trajectory_id in self.running if trajectory_id in self.stored)
        if not self.running:
            self.uses_left = 0

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
        num_out = Counter(trajectory_id for trajectory_ids, _ in self.out for trajectory_id in trajectory_ids)
        return Shot(
            folder,
            tuple(
                (trajectory_id, self.num_uses[trajectory_id] - num_out[trajectory_id])
                for trajectory_id in sorted(self.stored)
            ),
        )

    @rule()
    def crash_and_restore(self) -> None:
        """The learner continues from what was published; what it had out is used again."""
        state, lengths = self.store.counts(), self.store.lengths()
        self.shot = self.shoot()
        assert self.shot.folder is not None
        self.store = self.new_store()
        self.loop.run_until_complete(self.store.restore(self.shot.folder))
        assert list(self.store.pending()) == sorted(self.in_flight)
        assert self.store.lengths() == lengths
        if not self.out:
            assert self.store.counts() | {"memory_bytes": 0} == state | {"memory_bytes": 0}
        for trajectory_ids, _ in self.out:
            self.all_uses.subtract(trajectory_ids)
        self.num_uses |= dict(self.shot.stored)
        self.out.clear()
        self.learner = self.published
        self.running = tuple(sorted(trajectory_id for trajectory_id in self.stored if self.num_uses[trajectory_id]))
        self.uses_left = self.config.reuse - self.num_uses[self.running[0]] if self.running else 0

    @rule()
    def sample(self) -> None:
        self.try_sample()

    def try_sample(self) -> bool:
        if self.learner - self.published >= 2:
            return False
        size = self.config.trajectories_per_step
        if not self.uses_left:
            self.sweep()
        ready = self.ready()
        try:
            batch = self.call(self.store.sample(size, self.learner))
        except WaitsError:
            assert self.waiting_is_right(), "the learner waits for nothing"
            return False
        assert batch is not None
        assert list(batch.trajectory_ids) == sorted(batch.trajectory_ids)
        assert 1 <= len(batch.trajectory_ids) <= size
        for info, (ref_index, _) in zip(batch.infos, batch.rows, strict=True):
            self.num_uses[info.trajectory_id] += 1
            self.all_uses[info.trajectory_id] += 1
            assert self.all_uses[info.trajectory_id] <= self.config.reuse, "a use was made twice"
            assert info.num_uses == self.num_uses[info.trajectory_id] <= self.config.reuse
            assert info.staleness == self.learner - self.acquired_at[info.trajectory_id]
            assert info.staleness <= self.config.sweep_bound + info.num_uses - 1
            ref = batch.refs[ref_index]
            assert isinstance(ref, Payload) and ref.data == self.data_of[info.trajectory_id]
        if batch.infos[0].num_uses == 1:
            assert len(batch.trajectory_ids) == size
            self.check_order(batch.trajectory_ids, ready)
            self.uses_left = self.config.reuse
        self.running = batch.trajectory_ids
        self.uses_left -= 1
        self.out.append((batch.trajectory_ids, self.uses_left == 0))
        self.learner += 1
        return True

    def sweep(self) -> None:
        """What the store is to drop before it forms a batch."""
        stale = {
            trajectory_id
            for trajectory_id in self.ready()
            if self.learner - self.acquired_at[trajectory_id] > self.config.sweep_bound
        }
        assert not stale or self.config.overtakes, "the proof says that nothing gets too old"
        self.stored -= stale
        self.fate |= dict.fromkeys(stale, "evicted/stale")

    def waiting_is_right(self) -> bool:
        ready, size = sorted(self.ready()), self.config.trajectories_per_step
        overtaken = not self.config.overtakes and any(
            trajectory_id < max(ready[:size], default=0) for trajectory_id in self.in_flight
        )
        return not self.uses_left and (len(ready) < size or overtaken)

    def check_order(self, trajectory_ids: tuple[int, ...], ready: set[int]) -> None:
        passed_over = ready.difference(trajectory_ids)
        if self.config.order is ReplayOrder.fifo:
            behind = passed_over if self.config.overtakes else {*passed_over, *self.in_flight}
            assert all(trajectory_id > trajectory_ids[-1] for trajectory_id in behind), (
                "an older trajectory was overtaken"
            )
        elif self.config.order is ReplayOrder.freshest:
            oldest = min(self.acquired_at[trajectory_id] for trajectory_id in trajectory_ids)
            assert all(self.acquired_at[trajectory_id] <= oldest for trajectory_id in passed_over), (
                "a fresher one was passed over"
            )

    @precondition(lambda self: self.out)
    @rule()
    def release(self) -> None:
        """The learner is done with the batch that it has longest."""
        trajectory_ids, is_last = self.out.pop(0)
        self.published += 1
        self.store.release(trajectory_ids, self.published)
        if is_last:
            done = self.stored.intersection(trajectory_ids)
            self.completed.update(trajectory_ids)
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
        needed = {self.data_of[trajectory_id] for trajectory_id in self.stored}
        gc.collect(0)
        assert {payload.data for payload in self.payloads} <= needed, "a payload was not let go"
        state = self.store.counts()
        assert state["payloads"] == len(needed)
        assert state["payload_bytes"] == sum(size_of(data) for data in needed)
        assert state["memory_bytes"] == sum(size_of(payload.data) for payload in self.payloads)


def size_of(data: bytes) -> int:
    """Bytes of a payload, as its metadata says."""
    return 100 * len(json.loads(data))
