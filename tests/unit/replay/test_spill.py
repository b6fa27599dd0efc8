"""Payloads that leave memory for files, and come back to be trained on."""

from __future__ import annotations

import asyncio
import gc
import json
import random
import tempfile
import weakref
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opd_ray.config.choices import ReplayOrder, StalePolicy
from opd_ray.errors import PayloadLostError, StoreError
from opd_ray.replay.spill import SpillSpace
from opd_ray.replay.staleness import StoreConfig
from opd_ray.replay.store import ReplayStore
from tests.unit.replay.store_driver import MemoryPayloads, Payload, make_store, meta, snapshot


def store_of(spill: SpillSpace, max_staleness: int = 9, io: MemoryPayloads | None = None) -> ReplayStore:
    return make_store(StoreConfig(2, reuse=2, max_staleness=max_staleness), io, spill=spill)


async def fill(store: ReplayStore, num_payloads: int) -> None:
    """Payloads of two trajectories, 200 bytes each as their metadata say."""
    for number in range(num_payloads):
        trajectory_ids = await store.acquire(2)
        store.append(meta(trajectory_ids), Payload(b"payload %d" % number))


@pytest.mark.parametrize(("max_memory_bytes", "in_memory"), [(0, 200), (199, 200), (400, 600), (10_000, 1000)])
def test_what_came_last_leaves_memory_before_more_is_made(
    max_memory_bytes: int, in_memory: int, tmp_path: Path
) -> None:
    async def scenario() -> None:
        store = store_of(SpillSpace(max_memory_bytes, tmp_path))
        await fill(store, 5)  # the last one came in after the last trajectories were given out
        assert (store.counts()["payload_bytes"], store.counts()["memory_bytes"]) == (1000, in_memory)

    asyncio.run(scenario())


def test_training_sees_what_was_stored(tmp_path: Path) -> None:
    async def scenario() -> None:
        store = store_of(SpillSpace(100, tmp_path))
        await fill(store, 4)
        for version in range(8):
            batch = await store.sample(2, version)
            assert batch is not None
            assert [ref.data for ref in batch.refs] == [b"payload %d" % (version // 2)]
            assert store.counts()["memory_bytes"] >= 200
            store.release(batch.trajectory_ids, version + 1)
        assert store.ledger()["trained"] == 8
        assert store.counts()["payload_bytes"] == store.counts()["memory_bytes"] == 0
        assert list(tmp_path.iterdir()) == []

    asyncio.run(scenario())


def test_a_spilled_payload_is_let_go_and_one_in_training_is_not(tmp_path: Path) -> None:
    async def scenario() -> None:
        store = store_of(SpillSpace(0, tmp_path))
        payloads = [Payload(b"a"), Payload(b"b")]
        watchers = [weakref.ref(payload) for payload in payloads]
        for payload in payloads:
            store.append(meta(await store.acquire(2)), payload)
            if payload is payloads[0]:
                batch = await store.sample(2, 0)
        del payload
        payloads.clear()
        await store.acquire(2)
        gc.collect()
        assert batch is not None
        assert [watcher() is None for watcher in watchers] == [False, True]
        assert store.counts()["memory_bytes"] == 200

    asyncio.run(scenario())


def test_what_happens_during_a_move_is_respected(tmp_path: Path) -> None:
    async def scenario() -> None:
        moved = []

        async def pause(payload: Payload) -> None:
            moved.append(payload.data)
            if payload.data == b"dropped":
                store.evict(trajectory_ids[2:4], "test")
            if payload.data == b"sampled":
                assert await store.sample(2, 0) is not None
            await asyncio.sleep(0)

        store = store_of(SpillSpace(0, tmp_path), io=MemoryPayloads(pause=pause))
        trajectory_ids = [trajectory_id for _ in range(3) for trajectory_id in await store.acquire(2)]
        for start, data in ((0, b"sampled"), (2, b"dropped"), (4, b"spilled")):
            store.append(meta(trajectory_ids[start : start + 2]), Payload(data))
        await store.acquire(2)
        assert moved == [b"spilled", b"dropped", b"sampled"]
        assert store.counts()["payload_bytes"] == 400
        assert store.counts()["memory_bytes"] == 200  # the one in training stays
        batch = await store.sample(2, 1)
        assert batch is not None and batch.refs[0].data == b"sampled"
        assert len([*tmp_path.iterdir()]) == 1

    asyncio.run(scenario())


def test_several_acquire_while_payloads_move(tmp_path: Path) -> None:
    """One moves payloads, the others wait for it, and one that is cancelled stops nobody."""

    async def scenario() -> None:
        store = store_of(SpillSpace(0, tmp_path))
        await fill(store, 2)
        waiting = [asyncio.create_task(store.acquire(2)) for _ in range(3)]
        await asyncio.sleep(0)
        waiting[0].cancel()
        done = await asyncio.wait_for(asyncio.gather(*waiting, return_exceptions=True), 5)
        assert isinstance(done[0], asyncio.CancelledError)
        assert done[1:] == [(4, 5), (6, 7)]
        assert store.counts()["memory_bytes"] == 0

    asyncio.run(scenario())


def test_a_payload_evicted_whole_gives_its_memory_back(tmp_path: Path) -> None:
    async def scenario() -> None:
        store = store_of(SpillSpace(0, tmp_path))
        await fill(store, 2)
        store.evict([0, 1, 2, 3], "test")
        assert store.counts()["payload_bytes"] == store.counts()["memory_bytes"] == 0

    asyncio.run(scenario())


def test_a_snapshot_has_what_was_spilled(tmp_path: Path) -> None:
    async def scenario() -> None:
        store = store_of(SpillSpace(0, tmp_path))
        await fill(store, 3)
        await snapshot(store, tmp_path / "checkpoint")
        restored = store_of(SpillSpace(10_000, tmp_path))
        await restored.restore(tmp_path / "checkpoint")
        store.evict(range(6), "test")
        gc.collect()
        assert [*tmp_path.glob("*.arrows")] == [], "a spill file goes with its payload"
        batch = await restored.sample(2, 0)
        assert batch is not None and batch.refs[0].data == b"payload 0"
        assert restored.counts()["memory_bytes"] == 600

    asyncio.run(scenario())


def test_a_disk_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    async def scenario() -> None:
        (tmp_path / "file").write_text("")
        store = store_of(SpillSpace(0, tmp_path / "file"))
        with pytest.raises(StoreError, match="payloads cannot be spilled .*replay.max_bytes"):
            await fill(store, 2)
        assert store.ledger()["in_store"] == 2

    asyncio.run(scenario())


def test_a_payload_that_cannot_be_read_back_is_lost(tmp_path: Path) -> None:
    async def scenario() -> None:
        store = store_of(SpillSpace(0, tmp_path))
        await fill(store, 2)
        await store.acquire(2)
        for path in tmp_path.iterdir():
            path.write_bytes(b"damaged")
        with pytest.raises(PayloadLostError, match="is damaged"):
            await store.sample(2, 0)

    asyncio.run(scenario())


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 1200),
    st.integers(0, 6),
    st.sampled_from([*StalePolicy]),
    st.sampled_from([*ReplayOrder]),
    st.integers(0, 10**6),
)
def test_any_timing_of_moves_trains_what_was_stored(
    max_memory_bytes: int, max_staleness: int, stale: StalePolicy, order: ReplayOrder, seed: int
) -> None:
    rng = random.Random(seed)

    async def pause() -> None:
        for _ in range(rng.randint(0, 4)):
            await asyncio.sleep(0)

    async def rollout(store: ReplayStore) -> None:
        while True:
            trajectory_ids = await store.acquire(2)
            await pause()
            store.append(meta(trajectory_ids, store.counts()["version"]), Payload(json.dumps(trajectory_ids).encode()))

    async def scenario() -> None:
        config = StoreConfig(
            2,
            reuse=2,
            max_staleness=max_staleness,
            order=ReplayOrder.fifo if stale is StalePolicy.wait else order,
            stale=stale,
            hard_staleness=max_staleness + 1 if stale is StalePolicy.gate else 0,
        )
        with tempfile.TemporaryDirectory() as folder:
            io = MemoryPayloads(pause=lambda payload: pause())
            await train(make_store(config, io, spill=SpillSpace(max_memory_bytes, Path(folder))))

    async def train(store: ReplayStore) -> None:
        producer = asyncio.create_task(rollout(store))
        for version in range(6):
            await pause()
            batch = await asyncio.wait_for(store.sample(2, version), timeout=20)
            assert batch is not None
            for trajectory_id, (ref_index, row) in zip(batch.trajectory_ids, batch.rows, strict=True):
                assert json.loads(batch.refs[ref_index].data)[row] == trajectory_id
            await pause()
            store.release(batch.trajectory_ids, version + 1)
        assert store.ledger()["trained"] == 6
        producer.cancel()

    asyncio.run(scenario())
