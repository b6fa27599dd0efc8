"""Payloads that are gone with a node: what leaves the store, and what goes on."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from opd_ray.errors import PayloadLostError
from opd_ray.replay.cohort import SampledBatch
from opd_ray.replay.spill import SpillSpace
from opd_ray.replay.staleness import StoreConfig
from opd_ray.types import SampleInfo
from tests.unit.replay.store_driver import Payload, WaitingStore, at_once, receipt

LOST = b"lost"


async def fetch(payload: Payload) -> bytes:
    await asyncio.sleep(0)
    if payload.data == LOST:
        raise PayloadLostError("a payload is gone with a node: have it made again")
    return payload.data


def payload_of(data: Any) -> Payload:
    return Payload(bytes(data))


async def filled(config: StoreConfig, payloads: list[bytes], spill: SpillSpace | None = None) -> WaitingStore:
    """A store with two trajectories in each payload."""
    store = WaitingStore(config, spill=spill)
    for data in payloads:
        slots = await at_once(store.acquire_slots(2))
        store.append(receipt(slots), [Payload(data)])
    return store


def test_a_lost_payload_takes_all_its_trajectories_and_nothing_else() -> None:
    async def scenario() -> None:
        store = await filled(StoreConfig(2, 1, 2), [b"a", b"b", b"c"])
        store.lose([3, 99])
        assert store.ledger() | {"evicted/payload_lost": 2, "in_store": 4, "started": 6} == store.ledger()
        assert store.state()["acquirable"] == 2, "admission makes up for it"
        batch = await at_once(store.sample(2, 0))
        assert batch is not None and batch.slots == (0, 1)

    asyncio.run(scenario())


def test_a_cohort_goes_on_with_what_is_left_and_ends_when_nothing_is() -> None:
    async def scenario() -> None:
        store = await filled(StoreConfig(4, 2, 2), [b"a", b"b", b"c", b"d"])
        first = await at_once(store.sample(4, 0))
        store.lose([0])
        assert first is not None
        store.release(first.slots, 1)
        second = await at_once(store.sample(4, 1))
        assert second is not None and second.slots == (2, 3)
        store.lose([2])
        store.release(second.slots, 1)  # no step was made
        third = await at_once(store.sample(4, 1))
        assert third is not None and third.slots == (4, 5, 6, 7)
        assert [info.visits for info in third.infos] == [1, 1, 1, 1]
        assert store.ledger()["evicted/payload_lost"] == 4

    asyncio.run(scenario())


def test_a_snapshot_is_of_the_store_without_what_is_lost(tmp_path: Path) -> None:
    async def scenario() -> None:
        config = StoreConfig(2, 2, 4)
        store = await filled(config, [b"a", LOST, b"c"])
        await store.snapshot(tmp_path / "shot", fetch)
        assert store.ledger()["evicted/payload_lost"] == 2
        restored = WaitingStore(config)
        await restored.restore(tmp_path / "shot", payload_of)
        assert restored.ledger() == store.ledger()
        slots = []
        for version in (0, 2):
            batch = await at_once(restored.sample(2, version))
            assert batch is not None
            slots.append(batch.slots)
            restored.release(batch.slots, version + 1)
            again = await at_once(restored.sample(2, version + 1))
            assert again is not None
            restored.release(again.slots, version + 2)
        assert slots == [(0, 1), (4, 5)]

    asyncio.run(scenario())


def test_what_is_lost_is_not_spilled_and_the_rest_is(tmp_path: Path) -> None:
    async def scenario() -> None:
        spill = SpillSpace(250, fetch, payload_of, tmp_path)
        store = await filled(StoreConfig(2, 1, 9), [b"a", LOST], spill)
        store.append(receipt(await store.acquire_slots(2)), [Payload(b"c")])
        await store.acquire_slots(2)
        assert store.state()["payloads"] == 3
        assert store.state()["memory_bytes"] == 200

    asyncio.run(scenario())


def test_a_batch_without_lost_payloads_keeps_order_rows_and_references() -> None:
    infos = tuple(SampleInfo(slot, 0, 1, 0.0, 3, 5) for slot in range(5))
    batch = SampledBatch(("a", "b", "c"), ((0, 0), (1, 0), (1, 1), (2, 0), (0, 1)), infos)
    left = batch.without([2])
    assert left.slots == (0, 3, 4)
    assert [(left.refs[ref], row) for ref, row in left.rows] == [("a", 0), ("c", 0), ("a", 1)]
    assert left.refs == ("a", "c")
    assert batch.without([]) == batch
    assert batch.without([0, 1, 3]).slots == ()
