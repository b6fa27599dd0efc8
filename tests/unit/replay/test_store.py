"""The replay store on one event loop, without Ray."""

from __future__ import annotations

import ast
import asyncio
import gc
import inspect
import json
import random
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from opd_ray.errors import LedgerError, StaleBatchError, StoreClosedError, StoreError
from opd_ray.replay.batch import SampledBatch
from opd_ray.replay.staleness import StoreConfig
from opd_ray.replay.store import ReplayStore
from tests.unit.replay.store_driver import Payload, WaitsError, at_once, make_store, meta
from tests.unit.scenario import run


def store_of(size: int, reuse: int = 1, max_staleness: int = 0, **options: Any) -> ReplayStore:
    return make_store(StoreConfig(size, reuse, max_staleness), **options)


async def sample(store: ReplayStore, size: int, version: int) -> SampledBatch:
    batch = await at_once(store.sample(size, version))
    assert batch is not None
    return batch


def test_lock_step_gives_the_next_slots_only_after_publishing() -> None:
    async def scenario() -> None:
        store = store_of(4)
        assert await at_once(store.acquire(2)) == (0, 1)
        assert await at_once(store.acquire(2)) == (2, 3)
        with pytest.raises(WaitsError):
            await at_once(store.acquire(2))
        store.append(meta([0, 1, 2, 3]), "payload")
        batch = await sample(store, 4, 0)
        with pytest.raises(WaitsError):
            await at_once(store.acquire(2))
        waiting = asyncio.ensure_future(store.acquire(2))
        await asyncio.sleep(0)
        store.release(batch.trajectory_ids, policy_version=1)
        assert await waiting == (4, 5)

    run(scenario())


def test_cohorts_are_in_slot_order_whatever_the_order_of_arrival() -> None:
    async def scenario() -> None:
        store = store_of(2, max_staleness=2)
        assert await at_once(store.acquire(6)) == (0, 1, 2, 3, 4, 5)
        store.append(meta([5, 2]), "a")
        store.append(meta([3, 1]), "b")
        with pytest.raises(WaitsError):  # trajectory 0 is waited for, not overtaken
            await at_once(store.sample(2, 0))
        store.append(meta([4, 0]), "c")
        batch = await sample(store, 2, 0)
        assert (batch.trajectory_ids, batch.refs, batch.rows) == ((0, 1), ("c", "b"), ((0, 1), (1, 1)))
        batch = await sample(store, 2, 1)
        assert (batch.trajectory_ids, batch.refs, batch.rows) == ((2, 3), ("a", "b"), ((0, 1), (1, 0)))
        assert [info.staleness for info in batch.infos] == [1, 1]

    run(scenario())


def test_a_cohort_is_given_out_reuse_times_then_retired() -> None:
    async def scenario() -> None:
        now = 100.0
        store = store_of(2, reuse=2, clock=lambda: now)
        await at_once(store.acquire(2))
        store.append(meta([1, 0]), "payload")
        now = 103.0
        first = await sample(store, 2, 0)
        assert first.refs == ("payload",)
        assert first.rows == ((0, 1), (0, 0))
        assert [(i.trajectory_id, i.staleness, i.num_uses, i.age_s) for i in first.infos] == [
            (0, 0, 1, 3.0),
            (1, 0, 1, 3.0),
        ]
        assert [(i.num_prompt_tokens, i.num_response_tokens) for i in first.infos] == [(3, 10), (3, 11)]
        store.release(first.trajectory_ids, 1)
        with pytest.raises(LedgerError, match="trajectory 0 was released and is not out"):
            store.release(first.trajectory_ids, 1)
        assert store.ledger()["trained"] == 0
        second = await sample(store, 2, 1)
        assert [(i.trajectory_id, i.staleness, i.num_uses) for i in second.infos] == [(0, 1, 2), (1, 1, 2)]
        assert store.counts()["payloads"] == 1
        store.release(second.trajectory_ids, 2)
        assert store.ledger() == {
            "started": 2,
            "trained": 2,
            "evicted": 0,
            "failed": 0,
            "in_store": 0,
            "in_flight": 0,
        }
        assert store.counts()["payloads"] == 0

    run(scenario())


def test_the_next_batch_may_be_fetched_before_the_last_is_released() -> None:
    async def scenario() -> None:
        store = store_of(2, reuse=2, max_staleness=3)
        await at_once(store.acquire(4))
        store.append(meta([0, 1, 2, 3]), "payload")
        versions = [await sample(store, 2, version) for version in range(3)]
        assert [batch.trajectory_ids for batch in versions] == [(0, 1), (0, 1), (2, 3)]
        store.release(versions[0].trajectory_ids, 1)
        assert store.ledger()["trained"] == 0  # its second step is still running
        store.release(versions[1].trajectory_ids, 2)
        assert store.ledger()["trained"] == 2
        with pytest.raises(LedgerError, match="trajectory 0 was released"):
            store.release(versions[1].trajectory_ids, 3)
        assert store.counts()["version"] == 2

    run(scenario())


def test_a_sample_waits_until_the_last_trajectory_comes() -> None:
    async def scenario() -> None:
        store = store_of(3)
        await at_once(store.acquire(3))
        store.append(meta([0, 1]), "a")
        waiting = asyncio.ensure_future(store.sample(3, 0))
        await asyncio.sleep(0)
        store.append(meta([2]), "b")
        batch = await waiting
        assert batch is not None
        assert batch.trajectory_ids == (0, 1, 2)

    run(scenario())


def test_failed_slots_leave_room_at_once_even_for_less_than_a_group() -> None:
    async def scenario() -> None:
        store = store_of(8)
        await at_once(store.acquire(8))
        store.append(meta([0, 1, 2, 4, 5, 6, 7]), "a")
        waiting = asyncio.ensure_future(store.acquire(8))
        await asyncio.sleep(0)
        store.fail([3], "engine_died")
        assert await waiting == (8,)  # a whole group would wait forever here
        store.append(meta([8]), "b")
        assert (await sample(store, 8, 0)).trajectory_ids == (0, 1, 2, 4, 5, 6, 7, 8)
        assert store.ledger()["failed/engine_died"] == 1

    run(scenario())


def test_over_stale_trajectories_are_swept_and_replaced() -> None:
    async def scenario() -> None:
        store = store_of(2, max_staleness=1, version=5)
        await at_once(store.acquire(4))
        # An engine with old weights: the version at acquisition was 5.
        store.append(meta([0, 1, 2, 3], {0: 5, 1: 3, 2: 4, 3: 5}), "a")
        batch = await sample(store, 2, 5)
        assert batch.trajectory_ids == (0, 2)
        assert [info.staleness for info in batch.infos] == [0, 1]
        assert store.ledger()["evicted/stale"] == 1
        assert store.counts()["acquirable"] == 1

    run(scenario())


def test_a_late_arrival_is_swept_while_the_learner_waits() -> None:
    async def scenario() -> None:
        store = store_of(1, version=5)
        await at_once(store.acquire(1))
        waiting = asyncio.ensure_future(store.sample(1, 5))
        await asyncio.sleep(0)
        store.append(meta([0], 4), "old")
        assert await store.acquire(1) == (1,)
        store.append(meta([1], 5), "new")
        batch = await waiting
        assert batch is not None
        assert batch.refs == ("new",)

    run(scenario())


def test_use_above_the_bound_is_an_error() -> None:
    async def scenario() -> None:
        store = store_of(1, reuse=2, max_staleness=0)
        await at_once(store.acquire(1))
        store.append(meta([0]), "a")
        await sample(store, 1, 0)
        with pytest.raises(StaleBatchError, match="2 steps old at use 2, bound 1"):
            await at_once(store.sample(1, 2))
        assert (await sample(store, 1, 1)).infos[0].num_uses == 2  # the store is unchanged

    run(scenario())


def test_a_resumed_learner_goes_on_from_its_version() -> None:
    async def scenario() -> None:
        store = store_of(2, reuse=2, max_staleness=0, version=10)
        assert await at_once(store.acquire(2)) == (0, 1)
        store.append(meta([0, 1], 10), "a")
        assert [info.staleness for info in (await sample(store, 2, 10)).infos] == [0, 0]
        store.set_version(40)
        assert store.counts()["next_version"] == 41
        with pytest.raises(StoreError, match="below the published 40"):
            store.set_version(39)

    run(scenario())


def test_a_step_that_makes_no_version_does_not_block_the_store() -> None:
    async def scenario() -> None:
        store = store_of(1)
        for trajectory_id in range(3):
            assert await at_once(store.acquire(1)) == (trajectory_id,)
            store.append(meta([trajectory_id]), "a")
            batch = await sample(store, 1, 0)
            store.release(batch.trajectory_ids, 0)
            with pytest.raises(WaitsError):
                await at_once(store.sample(1, 0))  # asking again at version 0 makes room

    run(scenario())


def test_evicting_a_whole_cohort_frees_its_uses() -> None:
    async def scenario() -> None:
        store = store_of(2, reuse=3)
        await at_once(store.acquire(2))
        store.append(meta([0, 1]), "a")
        batch = await sample(store, 2, 0)
        store.evict([1], "too_long")
        store.release(batch.trajectory_ids, 1)  # trajectory 1 is passed over
        assert (await sample(store, 2, 1)).trajectory_ids == (0,)
        store.evict([0], "too_long")
        store.release([0], 2)
        assert store.ledger() == {
            "started": 2,
            "trained": 0,
            "evicted": 2,
            "failed": 0,
            "in_store": 0,
            "in_flight": 0,
            "evicted/too_long": 2,
        }
        assert await at_once(store.acquire(2)) == (2, 3)
        with pytest.raises(LedgerError):
            store.release([0], 2)

    run(scenario())


def test_an_eviction_inside_a_running_cohort_does_not_admit_too_early() -> None:
    async def scenario() -> None:
        store = store_of(4, reuse=2, max_staleness=0)
        await at_once(store.acquire(4))
        store.append(meta([0, 1, 2, 3]), "a")
        batch = await sample(store, 4, 0)
        store.evict([2], "too_long")
        # Its place in the batch is used up: a trajectory acquired now would first train at version 2.
        assert store.counts()["acquirable"] == 0
        store.release([trajectory_id for trajectory_id in batch.trajectory_ids if trajectory_id != 2], 1)
        assert store.counts()["acquirable"] == 0

    run(scenario())


def test_payloads_are_let_go_with_their_last_row() -> None:
    async def scenario() -> None:
        store = store_of(2, max_staleness=1)
        await at_once(store.acquire(4))
        payloads = [Payload(), Payload()]
        watchers = [weakref.ref(payload) for payload in payloads]
        store.append(meta([0, 3]), [payloads[0]])
        store.append(meta([1, 2]), [payloads[1]])
        assert store.counts()["payload_bytes"] == 400
        assert store.counts()["response_tokens"] == 10 + 11 + 12 + 13
        del payloads
        batch: SampledBatch | None = await sample(store, 2, 0)
        store.release((0, 1), 1)
        store.evict([2], "test")
        batch = None
        gc.collect()
        assert [watcher() is None for watcher in watchers] == [False, True]
        assert batch is None
        store.evict([3], "test")
        gc.collect()
        assert watchers[0]() is None
        assert store.counts()["payload_bytes"] == 0

    run(scenario())


def test_finite_data_drain() -> None:
    async def scenario() -> None:
        store = store_of(2, reuse=2, max_staleness=4)
        await at_once(store.acquire(5))
        store.append(meta([0, 1, 2]), "a")
        store.end_of_data()
        with pytest.raises(StoreClosedError, match="data have ended"):
            await at_once(store.acquire(1))
        for version, trajectory_ids in enumerate([(0, 1), (0, 1)]):
            batch = await sample(store, 2, version)
            assert batch.trajectory_ids == trajectory_ids
            store.release(batch.trajectory_ids, version + 1)
        with pytest.raises(WaitsError):  # trajectories 3 and 4 can still make a batch
            await at_once(store.sample(2, 2))
        store.fail([3, 4], "engine_died")
        assert await at_once(store.sample(2, 2)) is None
        assert store.ledger() == {
            "started": 5,
            "trained": 2,
            "evicted": 1,
            "failed": 2,
            "in_store": 0,
            "in_flight": 0,
            "evicted/drained": 1,
            "failed/engine_died": 2,
        }

    run(scenario())


def test_what_comes_in_after_the_drain_is_drained_too() -> None:
    async def scenario() -> None:
        store = store_of(2)
        await at_once(store.acquire(1))
        waiting = asyncio.ensure_future(store.sample(2, 0))
        await asyncio.sleep(0)
        store.end_of_data()
        assert await waiting is None
        store.append(meta([0]), "a")
        assert store.ledger()["evicted/drained"] == 1
        assert store.counts()["payloads"] == 0

    run(scenario())


def test_closing_ends_every_wait() -> None:
    async def scenario() -> None:
        store = store_of(2)
        await at_once(store.acquire(2))
        waits = [
            asyncio.ensure_future(store.acquire(1)),
            asyncio.ensure_future(store.acquire(2)),
            asyncio.ensure_future(store.sample(2, 0)),
        ]
        await asyncio.sleep(0)
        store.close()
        for result in await asyncio.gather(*waits, return_exceptions=True):
            assert isinstance(result, StoreClosedError)
        store.fail([0, 1], "shutdown")  # the books can still be closed
        assert store.ledger()["failed"] == 2

    run(scenario())


def test_calls_that_cannot_be_right_change_nothing() -> None:
    async def scenario() -> None:
        store = store_of(2, max_staleness=1)
        await at_once(store.acquire(4))
        store.append(meta([0, 1]), "a")
        before = (store.counts(), store.ledger())
        wrong: list[tuple[type[Exception], Callable[[], object]]] = [
            (LedgerError, lambda: store.append(meta([2, 1]), "b")),  # 1 is in already
            (LedgerError, lambda: store.append(meta([2, 2]), "b")),
            (LedgerError, lambda: store.append(meta([9]), "b")),
            (StoreError, lambda: store.append(meta([]), "b")),
            (LedgerError, lambda: store.fail([2, 0], "x")),
            (LedgerError, lambda: store.evict([0, 2], "x")),
            (LedgerError, lambda: store.release([0], 1)),
        ]
        for error, call in wrong:
            with pytest.raises(error):
                call()
            assert (store.counts(), store.ledger()) == before
        for request in (store.sample(3, 0), store.acquire(0)):
            with pytest.raises(StoreError):
                await at_once(request)
        store.set_version(1)
        with pytest.raises(StoreError, match="asks at version 0 and version 1 is published"):
            await at_once(store.sample(2, 0))
        json.dumps(store.counts())

    run(scenario())


def test_a_waiter_that_is_cancelled_leaks_no_permit() -> None:
    async def scenario() -> None:
        rng = random.Random(7)
        store = store_of(4, max_staleness=1)
        given: list[int] = []

        async def take(count: int) -> None:
            given.extend(await store.acquire(count))

        waiting: list[asyncio.Task[None]] = []
        for _ in range(300):
            waiting.append(asyncio.create_task(take(rng.randint(1, 5))))
            if rng.random() < 0.5:
                await asyncio.sleep(0)
            if rng.random() < 0.5:
                rng.choice(waiting).cancel()
            if given and rng.random() < 0.4:
                store.fail([given.pop(rng.randrange(len(given)))], "test")
            if rng.random() < 0.3:
                rng.choice(waiting).cancel()
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        assert store.ledger()["in_flight"] == len(given) == len(store.pending())
        assert store.counts()["acquirable"] == 8 - len(given)

    run(scenario())


def test_a_cancelled_sample_takes_no_batch() -> None:
    async def scenario() -> None:
        store = store_of(2)
        await at_once(store.acquire(2))
        waiting = asyncio.create_task(store.sample(2, 0))
        await asyncio.sleep(0)
        with pytest.raises(StoreError, match="another request waits"):
            await at_once(store.sample(2, 0))
        store.append(meta([0, 1]), "a")
        waiting.cancel()  # it was woken, and has not run yet
        await asyncio.gather(waiting, return_exceptions=True)
        assert store.counts()["in_training"] == 0
        assert (await sample(store, 2, 0)).infos[0].num_uses == 1

    run(scenario())


def test_completions_of_before_a_reset_are_dropped() -> None:
    async def scenario() -> None:
        store = store_of(2)
        generation = store.generation
        assert await at_once(store.acquire(2)) == (0, 1)
        waits = [asyncio.ensure_future(store.acquire(1)), asyncio.ensure_future(store.sample(2, 0))]
        await asyncio.sleep(0)
        store.reset()
        for result in await asyncio.gather(*waits, return_exceptions=True):
            assert isinstance(result, StoreClosedError)
        # The same ids are given out again; what was started for them before must not be taken for it.
        assert await at_once(store.acquire(2)) == (0, 1)
        payload = Payload()
        watcher = weakref.ref(payload)
        assert not store.append(meta([0, 1]), payload, generation=generation)
        assert not store.fail([0], "worker_died", generation=generation)
        del payload
        gc.collect()
        assert watcher() is None and store.num_stale_completions == 2
        assert store.ledger() | {"in_flight": 2, "started": 2} == store.ledger()
        assert store.append(meta([0, 1]), "b", generation=store.generation)
        assert (await sample(store, 2, 0)).refs == ("b",)

    run(scenario())


def test_no_await_stands_between_a_check_and_its_change() -> None:
    """The two calls that wait change the store in plain methods only; all others are plain."""
    tree = ast.parse(Path(inspect.getfile(ReplayStore)).read_text())
    store = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "ReplayStore")
    waiting = {node.name for node in store.body if isinstance(node, ast.AsyncFunctionDef)}
    assert waiting == {"acquire", "sample", "write", "restore", "_relieve"}
    for name in ("acquire", "sample"):
        method = next(node for node in store.body if getattr(node, "name", "") == name)
        awaited = {ast.unparse(node.value) for node in ast.walk(method) if isinstance(node, ast.Await)}
        assert awaited <= {"self._changed.wait()", "self._relieve(self._spill)"}
