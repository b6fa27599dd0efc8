"""A store that continues from a checkpoint: same batches, same books; what is refused."""

from __future__ import annotations

import asyncio
import gc
import hashlib
import json
import shutil
import weakref
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from opd_ray.config.choices import ReplayOrder, StalePolicy
from opd_ray.errors import CheckpointError, LedgerError, StoreError
from opd_ray.replay.checkpoint import INDEX
from opd_ray.replay.staleness import StoreConfig
from opd_ray.replay.store import ReplayStore
from opd_ray.trajectory.codec import decode
from opd_ray.trajectory.schema import BatchSpec
from tests.unit.replay.batches import FINGERPRINT, scored_buffer
from tests.unit.replay.store_driver import MemoryPayloads, Payload, at_once, make_store, meta, snapshot

MODES = [
    StoreConfig(2, 2, 4),
    StoreConfig(2, 2, 4, stale=StalePolicy.drop),
    StoreConfig(2, 2, 4, stale=StalePolicy.drop, order=ReplayOrder.freshest),
    StoreConfig(2, 1, 3, stale=StalePolicy.gate, hard_staleness=6, order=ReplayOrder.weighted, seed=3),
    StoreConfig(2, 2, 4, max_bytes=500),
]


async def crashed(store: ReplayStore, config: StoreConfig, folder: Path) -> ReplayStore:
    """Another store, from what `store` left on disk."""
    shutil.rmtree(folder, ignore_errors=True)
    await snapshot(store, folder)
    restored = make_store(config)
    await restored.restore(folder)
    return restored


async def history(config: StoreConfig, folder: Path, crash_at: set[int]) -> list[Any]:
    """What a run of 8 steps saw, with a crash after some of them; two trajectories are always slow."""
    store = make_store(config)
    seen: list[Any] = []
    for version in range(8):
        trajectory_ids = await at_once(store.acquire(99)) if store.counts()["acquirable"] else ()
        store.assign(trajectory_ids, [f"prompt-{trajectory_id}" for trajectory_id in trajectory_ids])
        pending = list(store.pending())
        if len(pending) > 2:
            store.append(meta(pending[2:], version), Payload(b"payload %d" % version))
        elif pending:
            store.append(meta(pending, version), Payload(b"payload %d" % version))
        batch = (
            await at_once(store.sample(2, version)) if store.counts()["ready"] + store.counts()["in_training"] else None
        )
        if batch is None:
            break
        seen.append([(info.trajectory_id, info.staleness, info.num_uses) for info in batch.infos])
        seen.append([batch.refs[ref_index].data for ref_index, _ in batch.rows])
        store.release(batch.trajectory_ids, version + 1)
        if version in crash_at:
            store = await crashed(store, config, folder)
        seen.append((store.ledger(), store.counts(), store.lengths(), store.pending()))
    return seen


@pytest.mark.parametrize("config", MODES[1:4])
def test_a_run_with_crashes_sees_what_an_unbroken_one_sees(config: StoreConfig, tmp_path: Path) -> None:
    unbroken = asyncio.run(history(config, tmp_path / "a", set()))
    assert len(unbroken) == 3 * 8
    assert asyncio.run(history(config, tmp_path / "b", {0, 3, 4, 6})) == unbroken


@pytest.mark.parametrize("config", [MODES[0], MODES[4]])
def test_slots_in_flight_come_back_under_their_numbers(config: StoreConfig, tmp_path: Path) -> None:
    async def scenario() -> None:
        store = make_store(config)
        trajectory_ids = await at_once(store.acquire(4))
        store.assign(trajectory_ids[:-1], [f"prompt-{trajectory_id}" for trajectory_id in trajectory_ids[:-1]])
        store.append(meta([trajectory_ids[0]]), Payload(b"a"))
        restored = await crashed(store, config, tmp_path / "snapshot")
        pending = restored.pending()
        assert pending == store.pending()
        assert pending[trajectory_ids[-1]] is None and list(pending) == list(trajectory_ids[1:])
        restored.append(meta(trajectory_ids[1:]), Payload(b"b"))
        batch = await at_once(restored.sample(2, 0))
        assert batch is not None
        assert (batch.trajectory_ids, [ref.data for ref in batch.refs]) == ((0, 1), [b"a", b"b"])
        for ids_named, prompt_ids, error in (([0], ["prompt"], LedgerError), (trajectory_ids[1:], [], StoreError)):
            with pytest.raises(error):
                restored.assign(ids_named, prompt_ids)

    asyncio.run(scenario())


def test_visits_that_were_not_released_are_made_again(tmp_path: Path) -> None:
    async def scenario() -> None:
        config = StoreConfig(2, reuse=2, max_staleness=4)
        store = make_store(config)
        await at_once(store.acquire(6))
        store.append(meta([0, 1, 2, 3]), Payload(b"a"))
        batches = [await at_once(store.sample(2, version)) for version in range(3)]
        assert batches[0] is not None
        store.release(batches[0].trajectory_ids, 1)
        # Out: the second use of trajectories 0 and 1, the first of 2 and 3.
        restored = await crashed(store, config, tmp_path / "snapshot")
        assert restored.ledger() == store.ledger()
        seen = []
        for version in range(1, 4):
            batch = await at_once(restored.sample(2, version))
            assert batch is not None
            seen.append([(info.trajectory_id, info.num_uses, info.staleness) for info in batch.infos])
            restored.release(batch.trajectory_ids, version + 1)
        assert seen == [[(0, 2, 1), (1, 2, 1)], [(2, 1, 2), (3, 1, 2)], [(2, 2, 3), (3, 2, 3)]]
        assert restored.ledger()["trained"] == 4

    asyncio.run(scenario())


def test_a_running_cohort_that_is_evicted_after_a_restart_frees_its_uses(tmp_path: Path) -> None:
    async def scenario() -> None:
        config = StoreConfig(2, reuse=3)
        store = make_store(config)
        store.append(meta(await at_once(store.acquire(2))), Payload(b"a"))
        batch = await at_once(store.sample(2, 0))
        assert batch is not None
        store.release(batch.trajectory_ids, 1)
        restored = await crashed(store, config, tmp_path / "snapshot")
        for one in (store, restored):
            one.evict([0, 1], "test")
            assert await at_once(one.acquire(2)) == (2, 3)
        assert restored.counts() == store.counts()

    asyncio.run(scenario())


def test_payloads_are_arrow_streams_and_ages_continue(tmp_path: Path) -> None:
    async def scenario() -> None:
        config, spec = StoreConfig(2), BatchSpec(FINGERPRINT, top_k=4)
        buffer = scored_buffer([5, 6], spec)
        now = 100.0
        store = make_store(config, clock=lambda: now)
        await at_once(store.acquire(2))
        store.append(meta([0, 1]), Payload(buffer.to_pybytes()))
        now = 103.0
        await snapshot(store, tmp_path / "store")
        with pa.memory_map(str(tmp_path / "store" / "payload-000000.arrows")) as file:
            assert decode(file.read_buffer(), expected=spec).num_rows == 2
        restored = make_store(config, clock=lambda: 7.0)
        await restored.restore(tmp_path / "store")
        batch = await at_once(restored.sample(2, 0))
        assert batch is not None
        assert batch.refs[0].data == buffer.to_pybytes()
        assert [info.age_s for info in batch.infos] == [3.0, 3.0]

    asyncio.run(scenario())


def test_an_image_is_of_one_instant_though_training_continues(tmp_path: Path) -> None:
    async def scenario() -> None:
        config = StoreConfig(2, max_staleness=1)

        async def train_meanwhile(payload: Payload) -> None:
            store.append(meta([2, 3]), Payload(b"b"))
            batch = await store.sample(2, 0)
            assert batch is not None
            store.release(batch.trajectory_ids, 1)

        store = make_store(config, MemoryPayloads(pause=train_meanwhile))
        await at_once(store.acquire(4))
        payload = Payload(b"a")
        watcher = weakref.ref(payload)
        store.append(meta([0, 1]), payload)
        del payload
        books, image = store.ledger(), store.freeze()
        (tmp_path / "store").mkdir()
        await store.write(image, tmp_path / "store")
        assert store.ledger()["trained"] == 2
        assert watcher() is not None, "the image pins what it needs"
        restored = make_store(config)
        await restored.restore(tmp_path / "store")
        assert restored.ledger() == books and list(restored.pending()) == [2, 3]
        batch = await at_once(restored.sample(2, 0)) if not restored.pending() else None
        assert batch is None
        del image
        gc.collect()
        assert watcher() is None

    asyncio.run(scenario())


async def written(folder: Path) -> None:
    store = make_store(StoreConfig(2, max_staleness=1))
    await at_once(store.acquire(4))
    store.append(meta([0, 1]), Payload(b"some bytes"))
    await snapshot(store, folder)


def damage(path: Path, old: str, new: str) -> None:
    content = path.read_text()
    assert old in content
    path.write_text(content.replace(old, new, 1))


DAMAGES: dict[str, Any] = {
    "holds no replay store": lambda folder: (folder / INDEX).unlink(),
    "index.json is damaged .wrong checksum": lambda folder: damage(folder / INDEX, '"started": 4', '"started": 5'),
    "index.json is damaged .JSON": lambda folder: damage(folder / INDEX, "{", ""),
    "index.json is damaged .Key": lambda folder: (folder / INDEX).write_text("{}"),
    "index.json is damaged .Type": lambda folder: (folder / INDEX).write_text("[]"),
    "payload-000000.arrows cannot be read": lambda folder: (folder / "payload-000000.arrows").unlink(),
    "payload-000000.arrows is damaged": lambda folder: damage(folder / "payload-000000.arrows", "some", "same"),
}


@pytest.mark.parametrize("message", DAMAGES)
def test_damaged_snapshots_end_in_one_line(message: str, tmp_path: Path) -> None:
    async def scenario() -> None:
        await written(tmp_path / "snapshot")
        DAMAGES[message](tmp_path / "snapshot")
        store = make_store(StoreConfig(2, max_staleness=1))
        with pytest.raises(CheckpointError, match=message) as caught:
            await store.restore(tmp_path / "snapshot")
        assert "\n" not in str(caught.value)
        assert store.ledger()["started"] == 0 and await at_once(store.acquire(9)) == (0, 1, 2, 3)

    asyncio.run(scenario())


def test_foreign_snapshots_and_used_stores_are_refused(tmp_path: Path) -> None:
    async def scenario() -> None:
        folder = tmp_path / "snapshot"
        await written(folder)
        with pytest.raises(CheckpointError, match="trajectories_per_step = 2 and the run 3"):
            await make_store(StoreConfig(3)).restore(folder)
        with pytest.raises(CheckpointError, match="reuse = 1 and the run 2"):
            await make_store(StoreConfig(2, reuse=2)).restore(folder)
        used = make_store(StoreConfig(2))
        await at_once(used.acquire(1))
        with pytest.raises(StoreError, match="was in use"):
            await used.restore(folder)
        assert list(used.pending()) == [0]

    asyncio.run(scenario())


def test_a_snapshot_of_another_format_is_refused(tmp_path: Path) -> None:
    async def scenario() -> None:
        folder = tmp_path / "snapshot"
        await written(folder)
        index = json.loads((folder / INDEX).read_text())["index"] | {"format": 1}
        checksum = hashlib.sha256(json.dumps(index, sort_keys=True).encode()).hexdigest()
        (folder / INDEX).write_text(json.dumps({"checksum": checksum, "index": index}))
        with pytest.raises(CheckpointError, match="another format than 2"):
            await make_store(StoreConfig(2)).restore(folder)

    asyncio.run(scenario())


def test_releases_out_of_order_cannot_be_told_from_a_snapshot(tmp_path: Path) -> None:
    async def scenario() -> None:
        store = make_store(StoreConfig(1, reuse=3, max_staleness=9))
        await at_once(store.acquire(2))
        store.append(meta([0, 1]), Payload(b"a"))
        batches = [await at_once(store.sample(1, version)) for version in range(4)]
        for batch in (batches[0], batches[1], batches[3]):
            assert batch is not None
            store.release(batch.trajectory_ids, 0)
        with pytest.raises(StoreError, match="out of order"):
            store.freeze()

    asyncio.run(scenario())


def test_a_folder_that_cannot_be_written_ends_in_one_line(tmp_path: Path) -> None:
    async def scenario() -> None:
        store = make_store(StoreConfig(1))
        await at_once(store.acquire(1))
        with pytest.raises(CheckpointError, match="cannot be written .*make room"):
            await store.write(store.freeze(), tmp_path / "missing")
        store.append(meta([0]), Payload(b"a"))
        with pytest.raises(CheckpointError, match="payload-000000.arrows cannot be written .*make room"):
            await store.write(store.freeze(), tmp_path / "missing")
        assert store.ledger()["in_store"] == 1

    asyncio.run(scenario())


def test_a_steps_end_and_its_image_are_one_instant(tmp_path: Path) -> None:
    async def scenario() -> None:
        config = StoreConfig(2)
        store = make_store(config)
        store.append(meta(await at_once(store.acquire(2))), Payload(b"a"))
        batch = await at_once(store.sample(2, 0))
        assert batch is not None
        waiting = asyncio.ensure_future(store.acquire(2))
        await asyncio.sleep(0)
        store.release(batch.trajectory_ids, 1)
        image = store.freeze()
        (tmp_path / "store").mkdir()
        await store.write(image, tmp_path / "store")
        assert await waiting == (2, 3) and store.ledger()["in_flight"] == 2  # it continued meanwhile
        restored = make_store(config)
        await restored.restore(tmp_path / "store")
        assert restored.pending() == {}
        books = restored.ledger()
        assert (books["started"], books["trained"], restored.counts()["version"]) == (2, 2, 1)
        assert await at_once(restored.acquire(2)) == (2, 3)

    asyncio.run(scenario())
