"""The byte budget: what is expected of payloads in flight, when generation waits, and that it never waits for ever."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opd_ray.replay.admission import Load, PayloadSize, num_in_budget
from opd_ray.replay.staleness import StoreConfig
from tests.unit.replay.store_driver import WaitsError, at_once, make_store, meta

SEEN = PayloadSize(window=100, mean_bytes=10.0, num_seen=5)


def test_the_mean_is_of_trajectories_and_forgets_after_its_window() -> None:
    size = PayloadSize(window=4)
    size.add(num_bytes=30, num_rows=3)
    assert (size.mean_bytes, size.num_seen) == (10.0, 3)
    size.add(50, 1)
    assert (size.mean_bytes, size.num_seen) == (20.0, 4)
    size.add(120, 2)  # half of the window
    assert (size.mean_bytes, size.num_seen) == (40.0, 4)
    size.add(800, 8)  # more than the window: nothing else counts
    assert (size.mean_bytes, size.num_seen) == (100.0, 8)


# Batches of 4, 10 bytes a trajectory.
@pytest.mark.parametrize(
    ("load", "max_bytes", "wanted", "expected"),
    [
        (Load(8, 0, 4, 120), 120, 1, 0),  # full
        (Load(8, 0, 4, 120), 129, 1, 0),  # one more would be above
        (Load(8, 0, 4, 120), 130, 1, 1),  # exactly full with one more
        (Load(8, 3, 4, 90), 130, 1, 1),  # what is in flight counts as if it were here
        (Load(8, 3, 4, 90), 159, 4, 0),  # a group of 4 waits until it fits whole
        (Load(8, 3, 4, 90), 160, 4, 4),
        (Load(2, 0, 4, 60), 50, 1, 0),  # above the budget while a batch is in training
        (Load(2, 0, 0, 60), 50, 4, 2),  # the learner has nothing: the next batch is filled all the same
        (Load(4, 0, 0, 60), 50, 1, 0),  # it is full
    ],
)
def test_slots_inside_the_budget(load: Load, max_bytes: int, wanted: int, expected: int) -> None:
    config = StoreConfig(4, max_staleness=3, max_bytes=max_bytes)
    assert num_in_budget(load, SEEN, wanted, config) == expected


def test_before_the_first_payload_there_is_room_for_one_batch() -> None:
    config = StoreConfig(4, max_staleness=3, max_bytes=10**9)
    assert num_in_budget(Load(0, 0, 0, 0), PayloadSize(8), 9, config) == 4
    assert num_in_budget(Load(4, 4, 0, 0), PayloadSize(8), 9, config) == 0
    assert num_in_budget(Load(4, 4, 0, 0), PayloadSize(8), 9, StoreConfig(4)) >= 9


@given(
    st.integers(0, 30),
    st.integers(0, 30),
    st.integers(0, 9),
    st.integers(0, 500),
    st.integers(1, 500),
    st.integers(1, 9),
)
def test_the_budget_holds_apart_from_the_next_batch(
    queued: int, in_flight: int, in_training: int, num_bytes: int, max_bytes: int, wanted: int
) -> None:
    load = Load(queued, min(in_flight, queued), in_training, num_bytes)
    count = num_in_budget(load, SEEN, wanted, StoreConfig(4, max_bytes=max_bytes))
    if in_training == 0:
        assert queued + count >= 4
    beyond = num_bytes + (load.num_in_flight + count) * SEEN.mean_bytes > max_bytes
    assert not beyond or count == 0 or (in_training == 0 and queued + count <= 4)


def test_when_the_learner_lags_generation_waits_for_bytes() -> None:
    async def scenario() -> None:
        # Payloads have 100 bytes a trajectory.
        store = make_store(StoreConfig(2, max_staleness=9, max_bytes=450))
        assert await at_once(store.acquire(2)) == (0, 1)
        with pytest.raises(WaitsError):  # nothing is known yet
            await at_once(store.acquire(2))
        store.append(meta([0, 1]), "a")
        assert await at_once(store.acquire(2)) == (2, 3)
        store.append(meta([2, 3]), "b")
        waiting = asyncio.ensure_future(store.acquire(2))
        batch = await at_once(store.sample(2, 0))
        assert batch is not None
        assert not waiting.done()  # what is in training still takes its place
        store.release(batch.trajectory_ids, 1)
        assert await waiting == (4, 5)
        assert store.counts()["payload_bytes"] == 200

    asyncio.run(scenario())


def test_a_budget_below_one_cohort_is_lock_step() -> None:
    async def scenario() -> None:
        store = make_store(StoreConfig(2, max_staleness=9, max_bytes=1))
        for version in range(4):
            trajectory_ids = await at_once(store.acquire(9))
            assert len(trajectory_ids) == 2
            store.append(meta(trajectory_ids, version), "a")
            batch = await at_once(store.sample(2, version))
            assert batch is not None and batch.infos[0].staleness == 0
            with pytest.raises(WaitsError):
                await at_once(store.acquire(1))
            store.release(batch.trajectory_ids, version + 1)

    asyncio.run(scenario())
