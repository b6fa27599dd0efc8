"""A store that died is recovered from its last snapshot and the controller's journal; hand-made cases."""

from __future__ import annotations

import asyncio
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest

from opd_ray.errors import LedgerError, SnapshotError, StoreError
from opd_ray.replay.journal import SlotJournal
from opd_ray.replay.recovery import SinceSnapshot
from opd_ray.replay.spill import as_is
from opd_ray.replay.staleness import StoreConfig
from tests.unit.replay.store_driver import WaitingStore, at_once, receipt


def text(data: Any) -> bytes:
    return bytes(data)


async def recovered(
    config: StoreConfig, journal: SlotJournal, versions: tuple[int, int], folder: Path | None
) -> WaitingStore:
    store = WaitingStore(config)
    since = pickle.loads(pickle.dumps(journal.since(*versions)))  # as it goes to an actor
    await store.recover(since, folder, text)
    return store


def test_without_a_snapshot_what_was_stored_is_lost_and_counted() -> None:
    async def scenario() -> None:
        config, journal = StoreConfig(2, max_staleness=9), SlotJournal()
        journal.acquired(range(10))
        journal.assigned([8, 9], ["a", "b"])
        journal.landed(range(7))
        journal.failed([7], "engine_died")
        for slots in ((0, 1), (2, 3)):
            journal.sampled(slots)
            journal.stepped(slots, is_last_visit=True)
            journal.released(slots)
        store = await recovered(config, journal, (2, 2), None)
        assert store.ledger() == {
            "started": 10,
            "trained": 4,
            "evicted": 3,
            "evicted/store_lost": 3,
            "failed": 1,
            "failed/engine_died": 1,
            "in_store": 0,
            "in_flight": 2,
        }
        assert store.pending() == {8: "a", 9: "b"}
        assert (await at_once(store.acquire_slots(1))) == (10,)
        assert store.state()["version"] == store.state()["next_version"] == 2

    asyncio.run(scenario())


def test_from_a_snapshot_untouched_rows_stay_and_the_running_cohort_is_given_up(tmp_path: Path) -> None:
    async def scenario() -> None:
        config = StoreConfig(2, reuse=2, max_staleness=9)
        store, journal = WaitingStore(config), SlotJournal()
        journal.acquired(await at_once(store.acquire_slots(8)))
        store.append(receipt([*range(6)]), [b"first"])
        journal.landed(range(6))
        num_snapshot = await store.snapshot(tmp_path / "snapshot", as_is)
        journal.snapshot_taken(journal.mark(), num_snapshot)
        for version in range(3):  # both visits of slots 0 and 1, the first one of 2 and 3
            batch = await at_once(store.sample(2, version))
            assert batch is not None
            journal.sampled(batch.slots)
            journal.stepped(batch.slots, is_last_visit=batch.infos[0].visits == 2)
            store.release(batch.slots, version + 1)
            journal.released(batch.slots)
        store.append(receipt([6]), [b"lost"])
        journal.landed([6])
        store = await recovered(config, journal, (3, 3), tmp_path / "snapshot")
        books = store.ledger()
        assert (books["started"], books["trained"], books["evicted/store_lost"]) == (8, 2, 3)
        assert list(store.pending()) == [7]
        batch = await at_once(store.sample(2, 3))
        assert batch is not None
        assert (batch.slots, batch.refs) == ((4, 5), (b"first",))
        assert [info.staleness for info in batch.infos] == [3, 3]

    asyncio.run(scenario())


def test_a_cohort_between_its_visits_goes_on_if_the_learner_did_not(tmp_path: Path) -> None:
    async def scenario() -> None:
        config = StoreConfig(2, reuse=2)
        store, journal = WaitingStore(config), SlotJournal()
        journal.acquired(await at_once(store.acquire_slots(2)))
        store.append(receipt([0, 1]), [b"a"])
        journal.landed([0, 1])
        batch = await at_once(store.sample(2, 0))
        assert batch is not None
        journal.sampled(batch.slots)
        journal.stepped(batch.slots, is_last_visit=False)
        mark = journal.mark()
        num_snapshot = await store.release_and_snapshot(batch.slots, 1, tmp_path / "snapshot", as_is)
        journal.released(batch.slots)
        journal.snapshot_taken(mark, num_snapshot)
        store = await recovered(config, journal, (1, 1), tmp_path / "snapshot")
        batch = await at_once(store.sample(2, 1))
        assert batch is not None
        assert [(info.slot, info.visits) for info in batch.infos] == [(0, 2), (1, 2)]

    asyncio.run(scenario())


def test_the_learners_release_of_a_lost_batch_is_passed_over_once() -> None:
    async def scenario() -> None:
        config, journal = StoreConfig(2, max_staleness=3), SlotJournal()
        journal.acquired(range(4))
        journal.landed(range(4))
        journal.sampled((0, 1))
        store = await recovered(config, journal, (0, 0), None)
        assert store.state()["next_version"] == 1  # after the step that is running
        store.release((0, 1), 1)
        with pytest.raises(LedgerError, match="not out for training"):
            store.release((0, 1), 2)
        assert store.ledger()["evicted/store_lost"] == 4

    asyncio.run(scenario())


def test_only_payloads_that_are_needed_are_read(tmp_path: Path) -> None:
    async def scenario() -> None:
        config = StoreConfig(1, max_staleness=3)
        store, journal = WaitingStore(config), SlotJournal()
        journal.acquired(await at_once(store.acquire_slots(2)))
        for slot in range(2):
            store.append(receipt([slot]), [b"%d" % slot])
        journal.landed([0, 1])
        journal.snapshot_taken(journal.mark(), await store.snapshot(tmp_path / "snapshot", as_is))
        journal.sampled((0,))
        journal.stepped((0,), is_last_visit=True)
        put: list[bytes] = []
        store = WaitingStore(config)
        await store.recover(journal.since(0, 1), tmp_path / "snapshot", lambda data: put.append(bytes(data)))
        assert put == [b"1"]
        assert store.state()["payloads"] == 1 and store.ledger()["trained"] == 1

    asyncio.run(scenario())


def test_a_row_that_failed_after_its_append_was_not_answered_stays_failed(tmp_path: Path) -> None:
    async def scenario() -> None:
        config, journal = StoreConfig(2, max_staleness=3), SlotJournal()
        store = WaitingStore(config)
        journal.acquired(await at_once(store.acquire_slots(2)))
        mark = journal.mark()
        store.append(receipt([0, 1]), [b"a"])  # the store dies over it, after a snapshot
        journal.snapshot_taken(mark, await store.snapshot(tmp_path / "snapshot", as_is))
        store = await recovered(config, journal, (0, 0), tmp_path / "snapshot")
        assert list(store.pending()) == [0, 1]
        store.append(receipt([0]), [b"a"])
        journal.landed([0])
        store.fail([1], "payload_lost")
        journal.failed([1], "payload_lost")
        store = await recovered(config, journal, (0, 0), tmp_path / "snapshot")
        books = store.ledger()
        assert (books["in_store"], books["failed/payload_lost"], books["evicted"]) == (1, 1, 0)

    asyncio.run(scenario())


def test_the_end_of_the_data_is_remembered() -> None:
    async def scenario() -> None:
        journal = SlotJournal()
        journal.acquired([0])
        journal.data_ended()
        store = await recovered(StoreConfig(2), journal, (0, 0), None)
        store.append(receipt([0]), [b"a"])
        assert await at_once(store.sample(2, 0)) is None
        assert store.ledger()["evicted/drained"] == 1

    asyncio.run(scenario())


def test_a_journal_does_not_grow_without_snapshots() -> None:
    journal = SlotJournal()
    sizes = []
    for step in range(300):
        slots = tuple(range(10 * step, 10 * step + 10))
        journal.acquired(slots)
        journal.failed(slots[:2], "test")
        journal.landed(slots[2:])
        journal.sampled(slots[2:])
        journal.stepped(slots[2:], is_last_visit=True)
        journal.released(slots[2:])
        sizes.append(len(pickle.dumps(journal)))
    assert max(sizes) < sizes[0] + 100
    since = journal.since(300, 300)
    assert (since.num_trained, since.num_failed, since.num_given) == (2400, {"test": 600}, 3000)
    assert not since.trained and not since.failed and not since.visited and sys.getsizeof(since.visited) < 1000


def test_a_journal_forgets_what_a_snapshot_holds_and_keeps_what_it_may_not() -> None:
    journal = SlotJournal()
    journal.acquired(range(6))
    journal.landed(range(6))
    for slots in ((0, 1), (2, 3)):
        journal.sampled(slots)
        journal.stepped(slots, is_last_visit=True)
    journal.released((0, 1))
    mark = journal.mark()
    journal.acquired([6, 7])  # 6 is in the snapshot, 7 came after it
    journal.failed([6, 7], "test")
    journal.snapshot_taken(mark, 7)
    since = journal.since(1, 2)
    assert (since.trained, since.visited, since.failed) == ({2, 3}, {2, 3}, {6: "test"})
    assert (since.num_snapshot, since.num_trained, since.num_failed, since.out) == (7, 0, {"test": 1}, (2, 3))


def test_a_journal_refuses_what_cannot_be() -> None:
    journal = SlotJournal()
    journal.acquired([0])
    with pytest.raises(LedgerError, match="slot 1 failed and is not in flight"):
        journal.failed([1], "test")
    with pytest.raises(LedgerError, match="no sampled batch"):
        journal.released((0,))
    first = journal.mark()
    journal.mark()
    with pytest.raises(StoreError, match="mark 1 was noted and the last mark is 2"):
        journal.snapshot_taken(first, 1)


@pytest.mark.parametrize(
    ("since", "error", "message"),
    [
        (SinceSnapshot(0, 0, num_snapshot=3, num_given=3), SnapshotError, "knows 0 slots and .* one that knows 3"),
        (SinceSnapshot(2, 1), SnapshotError, "2 is published and the learner is at 1"),
        (SinceSnapshot(0, 0, num_given=2, num_trained=3), LedgerError, "2 slots ended .* 3 were trained"),
    ],
)
def test_a_report_that_cannot_be_is_refused(since: SinceSnapshot, error: type[Exception], message: str) -> None:
    async def scenario() -> None:
        store = WaitingStore(StoreConfig(2))
        with pytest.raises(error, match=message):
            await store.recover(since)
        assert await at_once(store.acquire_slots(2)) == (0, 1)
        with pytest.raises(StoreError, match="gave out 2 slots"):
            await store.recover(SinceSnapshot(0, 0))

    asyncio.run(scenario())
