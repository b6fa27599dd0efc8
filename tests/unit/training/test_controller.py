"""The controller's protocol with fake actors around the real loops and store: order, bounds, errors."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opd_ray.config.choices import ReplayOrder, StalePolicy
from opd_ray.errors import ActorError
from tests.unit.fake_actors import Run, World, config, train


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 4),
    st.integers(1, 3),
    st.integers(1, 9),
    st.integers(1, 3),
    st.integers(0, 12),
    st.integers(0, 10**6),
)
def test_any_timing_keeps_the_bound_and_the_books(
    max_staleness: int, reuse: int, num_steps: int, num_engines: int, max_delay: int, seed: int
) -> None:
    world = World(seed, max_delay)
    done = train(config(max_staleness, reuse, num_steps, num_engines), world)
    assert len(done.steps) == num_steps
    for _, batch in world.batches:
        assert all(info.staleness <= max_staleness + info.num_uses - 1 for info in batch.infos)
        assert len({info.num_uses for info in batch.infos}) == 1
    books = done.books
    assert books["started"] == 6 * -(-num_steps // reuse)
    assert books["in_flight"] == 0 and books["started"] == books["trained"] + books["in_store"]
    assert [engine._target.version for engine in done.engines.workers] == [num_steps] * num_engines


MODES = [
    (ReplayOrder.fifo, StalePolicy.drop),
    (ReplayOrder.freshest, StalePolicy.drop),
    (ReplayOrder.weighted, StalePolicy.drop),
    (ReplayOrder.fifo, StalePolicy.gate),
    (ReplayOrder.freshest, StalePolicy.gate),
    (ReplayOrder.weighted, StalePolicy.gate),
]


@given(st.sampled_from(MODES), st.integers(1, 3), st.integers(1, 2), st.integers(0, 12), st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_every_order_keeps_its_bound_and_the_books(
    mode: tuple[ReplayOrder, StalePolicy], max_staleness: int, reuse: int, max_delay: int, seed: int
) -> None:
    cfg = config(max_staleness, reuse, 8, 2)
    cfg.replay.order, cfg.replay.stale = mode
    cfg.replay.hard_staleness = max_staleness + 2 if mode[1] is StalePolicy.gate else 0
    world = World(seed, max_delay)
    done = train(cfg, world)
    bound = cfg.replay.hard_staleness or max_staleness
    assert len(done.steps) == 8
    assert all(info.staleness <= bound + info.num_uses - 1 for _, batch in world.batches for info in batch.infos)
    books = done.books
    evicted = sum(number for name, number in books.items() if name.startswith("evicted/"))
    assert books["started"] == books["trained"] + evicted + books["in_store"] + books["in_flight"]


@given(
    st.sampled_from(["rollout", "teacher", "learner", "load"]), st.integers(1, 4), st.integers(1, 2), st.integers(0, 99)
)
@settings(max_examples=60, deadline=None)
def test_a_slow_group_keeps_the_bound(slow: str, max_staleness: int, reuse: int, seed: int) -> None:
    """One group takes up to 60 turns of the event loop where the others take up to 2."""
    world = World(seed, {slow: 60})
    done = train(config(max_staleness, reuse, 8, 2), world)
    assert len(done.steps) == 8
    assert all(
        info.staleness <= max_staleness + info.num_uses - 1 for _, batch in world.batches for info in batch.infos
    )
    books = done.books
    assert books["started"] == books["trained"] + books["in_store"] + books["in_flight"]


@given(st.integers(1, 3), st.integers(0, 10**6))
@settings(max_examples=20, deadline=None)
def test_in_lock_step_the_groups_take_turns(reuse: int, seed: int) -> None:
    world = World(seed, 8)
    train(config(0, reuse, 6), world)
    assert not [busy for busy in world.together if "learner" in busy and len(busy) > 1]


def test_with_a_larger_bound_they_overlap() -> None:
    world = World(1, 8)
    train(config(2, 2, 12), world)
    assert [busy for busy in world.together if "learner" in busy and len(busy) > 1]
    assert max(info.staleness for _, batch in world.batches for info in batch.infos if info.num_uses == 1) > 0


def test_an_error_in_a_group_ends_the_run_with_that_error() -> None:
    world = World(3, 2)
    world.teacher_fails_at = 3
    with pytest.raises(ActorError, match="teacher-0 failed"):
        train(config(2, 1, 50), world)


@pytest.mark.parametrize("first", range(0, 400, 50))
def test_an_interrupt_at_any_moment_ends_everything(first: int) -> None:
    """A cancellation that met a result was once swallowed, and the run continued without its rollout loop."""

    async def interrupted(moment: int) -> set[asyncio.Task[Any]]:
        task = asyncio.create_task(Run(config(1, 2, 10_000, 2), World(moment, 3)).train())
        for _ in range(moment):
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            async with asyncio.timeout(5):
                await task
        # What the fake actors still do is theirs; the controller's own tasks must be gone.
        return {t for t in asyncio.all_tasks() if "Loop" in repr(t.get_coro())}

    for moment in range(first, first + 50):
        assert asyncio.run(interrupted(moment)) == set()


def test_finite_prompts_drain() -> None:
    world = World(5, 4)
    cfg = config(1, 1, 100)
    cfg.data.epochs = 1
    done = train(cfg, world, num_prompts=7)
    assert len(done.steps) == 2
    assert done.books["trained"] == 12
    assert done.books["evicted/drained"] == 2
    assert done.books["in_flight"] == 0
