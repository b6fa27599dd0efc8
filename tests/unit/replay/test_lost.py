"""Payloads that were lost with a node: what leaves the store, and what continues."""

from __future__ import annotations

import asyncio
from pathlib import Path

from opd_ray.replay.batch import SampledBatch
from opd_ray.replay.spill import SpillSpace
from opd_ray.replay.staleness import StoreConfig
from opd_ray.replay.store import ReplayStore
from opd_ray.types import SampleInfo
from tests.unit.replay.store_driver import LOST, Payload, at_once, make_store, meta, snapshot


async def filled(config: StoreConfig, payloads: list[bytes], spill: SpillSpace | None = None) -> ReplayStore:
    """A store with two trajectories in each payload."""
    store = make_store(config, spill=spill)
    for data in payloads:
        trajectory_ids = await store.acquire(2)
        store.append(meta(trajectory_ids), Payload(data))
    return store


def test_a_lost_payload_takes_all_its_trajectories_and_nothing_else() -> None:
    async def scenario() -> None:
        store = await filled(StoreConfig(2, 1, 2), [b"a", b"b", b"c"])
        store.drop_lost([3, 99])
        assert store.ledger() | {"evicted/payload_lost": 2, "in_store": 4, "started": 6} == store.ledger()
        assert store.counts()["acquirable"] == 2, "admission makes up for it"
        batch = await at_once(store.sample(2, 0))
        assert batch is not None and batch.trajectory_ids == (0, 1)

    asyncio.run(scenario())


def test_a_cohort_goes_on_with_what_is_left_and_ends_when_nothing_is() -> None:
    async def scenario() -> None:
        store = await filled(StoreConfig(4, 2, 2), [b"a", b"b", b"c", b"d"])
        first = await at_once(store.sample(4, 0))
        store.drop_lost([0])
        assert first is not None
        store.release(first.trajectory_ids, 1)
        second = await at_once(store.sample(4, 1))
        assert second is not None and second.trajectory_ids == (2, 3)
        store.drop_lost([2])
        store.release(second.trajectory_ids, 1)  # no step was made
        third = await at_once(store.sample(4, 1))
        assert third is not None and third.trajectory_ids == (4, 5, 6, 7)
        assert [info.num_uses for info in third.infos] == [1, 1, 1, 1]
        assert store.ledger()["evicted/payload_lost"] == 4

    asyncio.run(scenario())


def test_a_snapshot_is_of_the_store_without_what_is_lost(tmp_path: Path) -> None:
    async def scenario() -> None:
        config = StoreConfig(2, 2, 4)
        store = await filled(config, [b"a", LOST, b"c"])
        await snapshot(store, tmp_path / "shot")
        assert store.ledger()["evicted/payload_lost"] == 2
        restored = make_store(config)
        await restored.restore(tmp_path / "shot")
        assert restored.ledger() == store.ledger()
        trajectory_ids = []
        for version in (0, 2):
            batch = await at_once(restored.sample(2, version))
            assert batch is not None
            trajectory_ids.append(batch.trajectory_ids)
            restored.release(batch.trajectory_ids, version + 1)
            again = await at_once(restored.sample(2, version + 1))
            assert again is not None
            restored.release(again.trajectory_ids, version + 2)
        assert trajectory_ids == [(0, 1), (4, 5)]

    asyncio.run(scenario())


def test_an_image_without_its_lost_payloads_leaves_a_later_store_in_order(tmp_path: Path) -> None:
    """The store has trained on something else by the time the loss is found."""

    async def scenario() -> None:
        config = StoreConfig(2, 1, 4)
        store = await filled(config, [b"a", LOST, b"c", LOST])
        image = store.freeze()
        batch = await at_once(store.sample(2, 0))
        assert batch is not None
        store.release(batch.trajectory_ids, 1)
        store.drop_lost([2])
        (tmp_path / "shot").mkdir()
        await store.write(image, tmp_path / "shot")
        assert store.ledger() | {"trained": 2, "evicted/payload_lost": 4, "in_store": 2} == store.ledger()
        restored = make_store(config)
        await restored.restore(tmp_path / "shot")
        assert restored.ledger() | {"trained": 0, "evicted/payload_lost": 4, "in_store": 4} == restored.ledger()
        assert len([*(tmp_path / "shot").glob("*.arrows")]) == 2

    asyncio.run(scenario())


def test_what_is_lost_is_evicted_by_spilling_and_the_rest_is_spilled(tmp_path: Path) -> None:
    async def scenario() -> None:
        store = await filled(StoreConfig(2, 1, 9), [b"a", LOST], SpillSpace(250, tmp_path))
        store.append(meta(await store.acquire(2)), Payload(b"c"))
        await store.acquire(2)
        assert store.counts()["payloads"] == 2
        assert store.counts()["memory_bytes"] == 200
        assert store.ledger()["evicted/payload_lost"] == 2

    asyncio.run(scenario())


def test_a_batch_without_lost_payloads_keeps_order_rows_and_references() -> None:
    infos = tuple(SampleInfo(trajectory_id, 0, 1, 0.0, 3, 5) for trajectory_id in range(5))
    batch = SampledBatch(("a", "b", "c"), ((0, 0), (1, 0), (1, 1), (2, 0), (0, 1)), infos)
    left = batch.without([2])
    assert left.trajectory_ids == (0, 3, 4)
    assert [(left.refs[ref], row) for ref, row in left.rows] == [("a", 0), ("c", 0), ("a", 1)]
    assert left.refs == ("a", "c")
    assert batch.without([]) == batch
    assert batch.without([0, 1, 3]).trajectory_ids == ()
