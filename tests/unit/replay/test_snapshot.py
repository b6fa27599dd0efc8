"""A store that goes on from its snapshot: same cohorts, same books; what is refused."""

from __future__ import annotations

import asyncio
import hashlib
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from opd_ray.config.choices import ReplayOrder, StalePolicy
from opd_ray.errors import LedgerError, SnapshotError, StoreError
from opd_ray.replay.snapshot_files import INDEX
from opd_ray.replay.staleness import StoreConfig
from opd_ray.trajectory.codec import decode
from opd_ray.trajectory.schema import BatchSpec
from tests.unit.replay.batches import FINGERPRINT, scored_buffer
from tests.unit.replay.store_driver import WaitingStore, at_once, receipt

MODES = [
    StoreConfig(2, 2, 4),
    StoreConfig(2, 2, 4, stale=StalePolicy.drop),
    StoreConfig(2, 2, 4, stale=StalePolicy.drop, order=ReplayOrder.freshest),
    StoreConfig(2, 1, 3, stale=StalePolicy.gate, hard_staleness=6, order=ReplayOrder.weighted, seed=3),
    StoreConfig(2, 2, 4, max_bytes=500),
]


def identity(value: Any) -> Any:
    return value


def text(data: pa.Buffer) -> bytes:
    return bytes(data)


async def crashed(store: WaitingStore, config: StoreConfig, folder: Path) -> WaitingStore:
    """Another store, from what `store` left on disk."""
    await store.snapshot(folder, identity)
    restored = WaitingStore(config)
    await restored.restore(folder, text)
    return restored


async def history(config: StoreConfig, folder: Path, crash_at: set[int]) -> list[Any]:
    """What a run of 8 steps saw, with a crash after some of them; two slots are always slow."""
    store = WaitingStore(config)
    seen: list[Any] = []
    for version in range(8):
        slots = await at_once(store.acquire_slots(99)) if store.state()["acquirable"] else ()
        store.assign(slots, [f"prompt-{slot}" for slot in slots])
        pending = list(store.pending())
        if len(pending) > 2:
            store.append(receipt(pending[2:], version), [f"payload {version}".encode()])
        elif pending:
            store.append(receipt(pending, version), [f"payload {version}".encode()])
        batch = await at_once(store.sample(2, version)) if store.state()["ready"] + store.state()["drafted"] else None
        if batch is None:
            break
        seen.append([(info.slot, info.staleness, info.visits) for info in batch.infos])
        seen.append([batch.refs[ref_index] for ref_index, _ in batch.rows])
        store.release(batch.slots, version + 1)
        if version in crash_at:
            store = await crashed(store, config, folder)
        seen.append((store.ledger(), store.state(), store.lengths(), store.pending()))
    return seen


@pytest.mark.parametrize("config", MODES[1:4])
def test_a_run_with_crashes_sees_what_an_unbroken_one_sees(config: StoreConfig, tmp_path: Path) -> None:
    unbroken = asyncio.run(history(config, tmp_path / "a", set()))
    assert len(unbroken) == 3 * 8
    assert asyncio.run(history(config, tmp_path / "b", {0, 3, 4, 6})) == unbroken


@pytest.mark.parametrize("config", [MODES[0], MODES[4]])
def test_slots_in_flight_come_back_under_their_numbers(config: StoreConfig, tmp_path: Path) -> None:
    async def scenario() -> None:
        store = WaitingStore(config)
        slots = await at_once(store.acquire_slots(4))
        store.assign(slots[:-1], [f"prompt-{slot}" for slot in slots[:-1]])
        store.append(receipt([slots[0]]), [b"a"])
        restored = await crashed(store, config, tmp_path / "snapshot")
        pending = restored.pending()
        assert pending == store.pending()
        assert pending[slots[-1]] is None and list(pending) == list(slots[1:])
        restored.append(receipt(slots[1:]), [b"b"])
        batch = await at_once(restored.sample(2, 0))
        assert batch is not None
        assert (batch.slots, batch.refs) == ((0, 1), (b"a", b"b"))
        for slots_named, prompt_ids, error in (([0], ["prompt"], LedgerError), (slots[1:], [], StoreError)):
            with pytest.raises(error):
                restored.assign(slots_named, prompt_ids)

    asyncio.run(scenario())


def test_visits_that_were_not_released_are_made_again(tmp_path: Path) -> None:
    async def scenario() -> None:
        config = StoreConfig(2, reuse=2, max_staleness=4)
        store = WaitingStore(config)
        await at_once(store.acquire_slots(6))
        store.append(receipt([0, 1, 2, 3]), [b"a"])
        batches = [await at_once(store.sample(2, version)) for version in range(3)]
        assert batches[0] is not None
        store.release(batches[0].slots, 1)
        # Out: the second visit of slots 0 and 1, the first of 2 and 3.
        restored = await crashed(store, config, tmp_path / "snapshot")
        assert restored.ledger() == store.ledger()
        seen = []
        for version in range(1, 4):
            batch = await at_once(restored.sample(2, version))
            assert batch is not None
            seen.append([(info.slot, info.visits, info.staleness) for info in batch.infos])
            restored.release(batch.slots, version + 1)
        assert seen == [[(0, 2, 1), (1, 2, 1)], [(2, 1, 2), (3, 1, 2)], [(2, 2, 3), (3, 2, 3)]]
        assert restored.ledger()["trained"] == 4

    asyncio.run(scenario())


def test_a_running_cohort_that_is_evicted_after_a_restart_frees_its_visits(tmp_path: Path) -> None:
    async def scenario() -> None:
        config = StoreConfig(2, reuse=3)
        store = WaitingStore(config)
        store.append(receipt(await at_once(store.acquire_slots(2))), [b"a"])
        batch = await at_once(store.sample(2, 0))
        assert batch is not None
        store.release(batch.slots, 1)
        restored = await crashed(store, config, tmp_path / "snapshot")
        for one in (store, restored):
            one.evict([0, 1], "test")
            assert await at_once(one.acquire_slots(2)) == (2, 3)
        assert restored.state() == store.state()

    asyncio.run(scenario())


def test_payloads_are_arrow_streams_and_ages_go_on(tmp_path: Path) -> None:
    async def fetch(ref: pa.Buffer) -> pa.Buffer:
        await asyncio.sleep(0)
        return ref

    async def scenario() -> None:
        config, spec = StoreConfig(2), BatchSpec(FINGERPRINT, top_k=4)
        buffer = scored_buffer([5, 6], spec)
        store = WaitingStore(config, clock=lambda: 100.0)
        await at_once(store.acquire_slots(2))
        store.append(receipt([0, 1]), [buffer])
        await store.snapshot(tmp_path / "snapshot", fetch)
        with pa.memory_map(str(tmp_path / "snapshot" / "payload-000000.arrows")) as file:
            assert decode(file.read_buffer(), expected=spec).num_rows == 2
        restored = WaitingStore(config, clock=lambda: 7.0)
        await restored.restore(tmp_path / "snapshot", identity)
        batch = await at_once(restored.sample(2, 0))
        assert batch is not None
        assert batch.refs[0].equals(buffer)
        assert [info.age_s for info in batch.infos] == [0.0, 0.0]

    asyncio.run(scenario())


def test_a_snapshot_is_of_one_instant_though_the_store_goes_on(tmp_path: Path) -> None:
    async def scenario() -> None:
        store = WaitingStore(StoreConfig(2, max_staleness=1))
        await at_once(store.acquire_slots(4))
        store.append(receipt([0, 1]), [b"a"])
        books = store.ledger()

        async def fetch(ref: bytes) -> bytes:
            store.append(receipt([2, 3]), [b"b"])  # comes in between
            return ref

        await store.snapshot(tmp_path / "snapshot", fetch)
        restored = WaitingStore(StoreConfig(2, max_staleness=1))
        await restored.restore(tmp_path / "snapshot", text)
        assert restored.ledger() == books and list(restored.pending()) == [2, 3]

    asyncio.run(scenario())


async def written(folder: Path) -> None:
    store = WaitingStore(StoreConfig(2, max_staleness=1))
    await at_once(store.acquire_slots(4))
    store.append(receipt([0, 1]), [b"some bytes"])
    await store.snapshot(folder, identity)


def damage(path: Path, old: str, new: str) -> None:
    content = path.read_text()
    assert old in content
    path.write_text(content.replace(old, new, 1))


DAMAGES: dict[str, Any] = {
    "holds no snapshot": lambda folder: (folder / INDEX).unlink(),
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
        store = WaitingStore(StoreConfig(2, max_staleness=1))
        with pytest.raises(SnapshotError, match=message) as caught:
            await store.restore(tmp_path / "snapshot", text)
        assert "\n" not in str(caught.value)
        assert store.ledger()["started"] == 0 and await at_once(store.acquire_slots(9)) == (0, 1, 2, 3)

    asyncio.run(scenario())


def test_foreign_snapshots_and_used_stores_are_refused(tmp_path: Path) -> None:
    async def scenario() -> None:
        folder = tmp_path / "snapshot"
        await written(folder)
        with pytest.raises(SnapshotError, match="trajectories_per_step = 2 and the run 3"):
            await WaitingStore(StoreConfig(3)).restore(folder, text)
        with pytest.raises(SnapshotError, match="reuse = 1 and the run 2"):
            await WaitingStore(StoreConfig(2, reuse=2)).restore(folder, text)
        used = WaitingStore(StoreConfig(2))
        await at_once(used.acquire_slots(1))
        with pytest.raises(StoreError, match="was in use"):
            await used.restore(folder, text)
        assert list(used.pending()) == [0]

    asyncio.run(scenario())


def test_a_snapshot_of_another_format_is_refused(tmp_path: Path) -> None:
    async def scenario() -> None:
        folder = tmp_path / "snapshot"
        await written(folder)
        index = json.loads((folder / INDEX).read_text())["index"] | {"format": 2}
        checksum = hashlib.sha256(json.dumps(index, sort_keys=True).encode()).hexdigest()
        (folder / INDEX).write_text(json.dumps({"checksum": checksum, "index": index}))
        with pytest.raises(SnapshotError, match="another format than 1"):
            await WaitingStore(StoreConfig(2)).restore(folder, text)

    asyncio.run(scenario())


def test_releases_out_of_order_cannot_be_told_from_a_snapshot(tmp_path: Path) -> None:
    async def scenario() -> None:
        store = WaitingStore(StoreConfig(1, reuse=3, max_staleness=9))
        await at_once(store.acquire_slots(2))
        store.append(receipt([0, 1]), [b"a"])
        batches = [await at_once(store.sample(1, version)) for version in range(4)]
        for batch in (batches[0], batches[1], batches[3]):
            assert batch is not None
            store.release(batch.slots, 0)
        with pytest.raises(StoreError, match="out of order"):
            await store.snapshot(tmp_path / "snapshot", identity)

    asyncio.run(scenario())


def test_a_snapshot_that_fails_leaves_the_older_one(tmp_path: Path) -> None:
    async def scenario() -> None:
        await written(tmp_path / "snapshot")
        before = (tmp_path / "snapshot" / INDEX).read_text()
        store = WaitingStore(StoreConfig(1))
        await at_once(store.acquire_slots(1))
        store.append(receipt([0]), [b"a"])

        def lost(ref: bytes) -> bytes:
            raise RuntimeError("object lost")

        with pytest.raises(RuntimeError, match="object lost"):
            await store.snapshot(tmp_path / "snapshot", lost)
        assert (tmp_path / "snapshot" / INDEX).read_text() == before
        (tmp_path / "file").write_text("")
        with pytest.raises(SnapshotError, match="cannot be written"):
            await store.snapshot(tmp_path / "file" / "snapshot", identity)

    asyncio.run(scenario())


def test_a_steps_end_and_its_snapshot_are_one_instant(tmp_path: Path) -> None:
    async def scenario() -> None:
        config = StoreConfig(2)
        store = WaitingStore(config)
        store.append(receipt(await at_once(store.acquire_slots(2))), [b"a"])
        batch = await at_once(store.sample(2, 0))
        assert batch is not None
        waiting = asyncio.ensure_future(store.acquire_slots(2))
        await asyncio.sleep(0)
        assert await store.release_and_snapshot(batch.slots, 1, tmp_path / "snapshot", identity) == 2
        assert waiting.done() and store.ledger()["in_flight"] == 2  # it went on meanwhile
        restored = WaitingStore(config)
        assert await restored.restore(tmp_path / "snapshot", text) == 2
        assert restored.pending() == {}
        books = restored.ledger()
        assert (books["started"], books["trained"], restored.state()["version"]) == (2, 2, 1)
        assert await at_once(restored.acquire_slots(2)) == await waiting == (2, 3)

    asyncio.run(scenario())
