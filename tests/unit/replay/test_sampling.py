"""Which trajectories train next and which are dropped, for every order and every policy for stale ones."""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opd_ray.config.choices import ReplayOrder, StalePolicy
from opd_ray.errors import ConfigError, StaleBatchError
from opd_ray.replay.batch import StoredTrajectory
from opd_ray.replay.sampling import next_batch, sampling_key
from opd_ray.replay.staleness import StoreConfig
from opd_ray.replay.trajectories import Queue
from tests.unit.replay.store_driver import WaitsError, at_once, make_store, meta

FIFO, FRESHEST, WEIGHTED = ReplayOrder.fifo, ReplayOrder.freshest, ReplayOrder.weighted
WAIT, DROP, GATE = StalePolicy.wait, StalePolicy.drop, StalePolicy.gate


def queue_of(versions: dict[int, int], num_given: int) -> Queue:
    """`num_given` trajectories were given out; those in `versions` are ready, in that order of arrival."""
    queue = Queue()
    queue.give(num_given)
    for trajectory in meta(list(versions), versions).trajectories:
        queue.complete(StoredTrajectory(trajectory, payload_id=0, appended_s=0.0))
    return queue


def config_of(size: int, order: ReplayOrder, stale: StalePolicy = DROP, **options: Any) -> StoreConfig:
    return StoreConfig(size, max_staleness=3, order=order, stale=stale, **options)


@pytest.mark.parametrize(
    ("order", "stale", "expected"),
    [
        (FIFO, WAIT, []),  # trajectory 0 is in flight: it is waited for
        (FIFO, DROP, [1, 3]),
        (FRESHEST, DROP, [4, 5]),
        (FIFO, GATE, [1, 3]),
        (FRESHEST, GATE, [4, 5]),
    ],
)
def test_the_order_decides_among_the_ready(order: ReplayOrder, stale: StalePolicy, expected: list[int]) -> None:
    queue = queue_of({5: 2, 3: 1, 1: 0, 4: 2}, num_given=6)
    config = config_of(2, order, stale, hard_staleness=9 if stale is GATE else 0)
    assert next_batch(queue, config, learner_version=3) == expected


def test_equally_fresh_ones_go_by_slot_number() -> None:
    assert next_batch(queue_of({5: 1, 3: 1, 1: 1, 4: 0}, 6), config_of(2, FRESHEST), 3) == [1, 3]


@pytest.mark.parametrize("order", [FIFO, FRESHEST, WEIGHTED])
def test_fewer_ready_ones_than_a_cohort_are_waited_for(order: ReplayOrder) -> None:
    assert next_batch(queue_of({5: 2, 3: 1}, 6), config_of(3, order), 3) == []


@given(st.permutations(list(range(12))), st.sampled_from([FIFO, FRESHEST, WEIGHTED]), st.integers(0, 9))
@settings(max_examples=50, deadline=None)
def test_the_order_of_arrival_does_not_matter(arrival: list[int], order: ReplayOrder, seed: int) -> None:
    versions = {trajectory_id: trajectory_id // 3 for trajectory_id in range(12)}
    config = config_of(4, order, seed=seed)
    shuffled = {trajectory_id: versions[trajectory_id] for trajectory_id in arrival}
    assert next_batch(queue_of(shuffled, 12), config, 5) == next_batch(queue_of(versions, 12), config, 5)


def test_the_weighted_draw_falls_with_staleness_as_it_says() -> None:
    # One of three with staleness 0, 1 and 3: weights 1, 1/2 and 1/4.
    versions, draws = {0: 3, 1: 2, 2: 0}, 4000
    counts = Counter(
        next_batch(queue_of(versions, 3), config_of(1, WEIGHTED, seed=seed), 3)[0] for seed in range(draws)
    )
    for trajectory_id, weight in zip(range(3), (4 / 7, 2 / 7, 1 / 7), strict=True):
        deviation = math.sqrt(draws * weight * (1 - weight))
        assert abs(counts[trajectory_id] - draws * weight) < 4 * deviation


def test_every_cohort_is_a_new_draw_and_every_seed_another() -> None:
    config = config_of(1, WEIGHTED)
    assert sampling_key(7, 2, 3, config) == sampling_key(7, 2, 3, config)
    keys = {
        sampling_key(7, 2, 3, config),
        sampling_key(8, 2, 3, config),
        sampling_key(7, 3, 4, config),
        sampling_key(7, 2, 3, config_of(1, WEIGHTED, seed=1)),
    }
    assert len(keys) == 4


async def first_use(config: StoreConfig, token_version: int, learner_version: int) -> int | None:
    """Staleness at the first use of one trajectory; None if it was dropped as stale."""
    store = make_store(config)
    (trajectory_id,) = await at_once(store.acquire(1))
    store.append(meta([trajectory_id], token_version), "payload")
    try:
        batch = await at_once(store.sample(1, learner_version))
    except WaitsError:
        assert store.ledger()["evicted/stale"] == 1
        return None
    assert batch is not None and "evicted/stale" not in store.ledger()
    return batch.infos[0].staleness


# What becomes of a trajectory of version 2, by the learner's version 2, 3, 4, ... when it is first asked for.
@pytest.mark.parametrize(
    ("stale", "max_staleness", "hard_staleness", "expected"),
    [
        (DROP, 0, 0, [0, None, None, None, None]),
        (DROP, 1, 0, [0, 1, None, None, None]),
        (DROP, 2, 0, [0, 1, 2, None, None]),
        (GATE, 0, 1, [0, 1, None, None, None]),
        (GATE, 1, 3, [0, 1, 2, 3, None]),
        (WAIT, 1, 0, [0, 1, None, None, None]),  # only a fault can bring it there
    ],
)
@pytest.mark.parametrize("order", [FIFO, FRESHEST, WEIGHTED])
def test_the_bound_of_the_first_use(
    order: ReplayOrder, stale: StalePolicy, max_staleness: int, hard_staleness: int, expected: list[int | None]
) -> None:
    if stale is WAIT:
        order = FIFO
    config = StoreConfig(1, 2, max_staleness, order=order, stale=stale, hard_staleness=hard_staleness)
    assert [asyncio.run(first_use(config, 2, version)) for version in range(2, 7)] == expected


@pytest.mark.parametrize(("stale", "hard", "bound"), [(DROP, 0, 1), (GATE, 4, 4)])
def test_each_further_visit_may_be_one_older_and_no_more(stale: StalePolicy, hard: int, bound: int) -> None:
    async def second_use(version: int) -> int:
        store = make_store(StoreConfig(1, 2, 1, stale=stale, hard_staleness=hard))
        await at_once(store.acquire(1))
        store.append(meta([0]), "payload")
        assert await at_once(store.sample(1, bound)) is not None
        batch = await at_once(store.sample(1, version))
        assert batch is not None
        return batch.infos[0].staleness

    assert asyncio.run(second_use(bound + 1)) == bound + 1
    with pytest.raises(StaleBatchError, match=f"{bound + 2} steps old at use 2, bound {bound + 1}"):
        asyncio.run(second_use(bound + 2))


def test_a_slow_one_is_overtaken_and_then_dropped_or_kept() -> None:
    async def scenario(config: StoreConfig) -> tuple[list[tuple[int, ...]], int]:
        store = make_store(config)
        assert await at_once(store.acquire(4)) == (0, 1, 2, 3)
        store.append(meta([1, 2, 3]), "a")
        batches = []
        for version in range(3):
            batch = await at_once(store.sample(2, version))
            assert batch is not None
            batches.append(batch.trajectory_ids)
            store.release(batch.trajectory_ids, version + 1)
            fresh = await at_once(store.acquire(9))
            store.append(meta(fresh, version + 1), "b")
            if version == 1:
                store.append(meta([0]), "slow")
        return batches, store.ledger().get("evicted/stale", 0)

    # Trajectory 0 of version 0 comes in when the learner is at version 2, one above the bound of 1.
    assert asyncio.run(scenario(StoreConfig(2, max_staleness=1, stale=DROP))) == ([(1, 2), (3, 4), (5, 6)], 1)
    gated = StoreConfig(2, max_staleness=1, stale=GATE, hard_staleness=2)
    assert asyncio.run(scenario(gated)) == ([(1, 2), (3, 4), (0, 5)], 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": FRESHEST}, "order = freshest .* stale = wait"),
        ({"order": WEIGHTED}, "order = weighted .* stale = wait"),
        ({"stale": GATE}, "hard_staleness = 0 .* give at least 3"),
        ({"stale": GATE, "hard_staleness": 2}, "hard_staleness = 2 .* give at least 3"),
        ({"stale": DROP, "hard_staleness": 3}, "hard_staleness = 3 .* stale = drop: give 0"),
        ({"hard_staleness": -1}, "hard_staleness = -1"),
        ({"max_bytes": -1}, "max_bytes = -1"),
    ],
)
def test_modes_that_mean_nothing_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        StoreConfig(4, max_staleness=2, **options)
