"""Actors that die at any moment: fakes around the real loops, groups' bookkeeping, journal and store."""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opd_ray.config import RunConfig
from opd_ray.errors import ActorDiedError, DeadlineError
from tests.unit.fake_actors import Run, World, config


def small(max_staleness: int, reuse: int, num_steps: int = 8) -> RunConfig:
    """Two engines, two teachers, any number of deaths."""
    cfg = config(max_staleness, reuse, num_steps, 2)
    cfg.teacher.num_workers = 2
    cfg.faults.max_restarts, cfg.faults.max_attempts = 50, 3
    cfg.checkpoint.every = 2
    return cfg


async def train_with_deaths(run: Run, deaths: list[tuple[int, str]]) -> Run:
    """Kill one actor of the named kind after so many turns of the event loop, one after the other."""
    task = asyncio.create_task(run.train())
    for turns, kind in deaths:
        for _ in range(turns):
            await asyncio.sleep(0)
        if task.done():
            break
        victims = {
            "rollout": run.engines.workers[-1:],
            "rollouts": run.engines.workers,
            "teacher": run.teachers.workers[:1],
            "store": run.handles[-1:],
            "learner": [run.learner],
        }[kind]
        for victim in victims:
            victim.kill()
    async with asyncio.timeout(20):
        return await task


def assert_sound(run: Run, max_staleness: int, reuse: int) -> None:
    """The bound, each step once, no trajectory too often, and the books."""
    assert [step for step, _ in run.trained] == list(range(1, run.cfg.num_steps + 1))
    visits = Counter(slot for _, slots in run.trained for slot in slots)
    assert max(visits.values()) <= reuse
    assert all(
        info.staleness <= max_staleness + info.visits - 1 for _, batch in run.world.batches for info in batch.infos
    )
    books = run.books
    ended = books["trained"] + books["evicted"] + books["failed"]
    assert books["started"] == ended + books["in_store"] + books["in_flight"]
    # What the store counts as trained had all its visits, in steps that count.
    assert books["trained"] <= sum(count == reuse for count in visits.values())


KINDS = st.sampled_from(["rollout", "rollouts", "teacher", "store"])


@given(
    st.integers(0, 3), st.integers(1, 2), st.lists(st.tuples(st.integers(0, 40), KINDS), max_size=6), st.integers(0, 99)
)
@settings(max_examples=60, deadline=None)
def test_workers_and_stores_that_die_cost_no_step(
    max_staleness: int, reuse: int, deaths: list[tuple[int, str]], seed: int
) -> None:
    async def scenario() -> Run:
        return await train_with_deaths(Run(small(max_staleness, reuse), World(seed, 6)), deaths)

    run = asyncio.run(scenario())
    assert_sound(run, max_staleness, reuse)
    store_deaths = len(run.stores) - 1
    assert store_deaths == run.store.num_restarts <= sum(kind == "store" for _, kind in deaths)
    if not store_deaths:
        assert run.books["evicted"] == 0
        assert [step for step, _ in run.world.batches] == list(range(8))


@given(
    st.integers(0, 3),
    st.integers(1, 2),
    st.lists(st.tuples(st.integers(0, 60), KINDS | st.just("learner")), min_size=1, max_size=5),
    st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_a_lost_learner_takes_the_run_back_to_its_checkpoint(
    max_staleness: int, reuse: int, deaths: list[tuple[int, str]], seed: int
) -> None:
    async def scenario(folder: Path) -> Run:
        return await train_with_deaths(Run(small(max_staleness, reuse), World(seed, 6), folder), deaths)

    with TemporaryDirectory() as folder:
        run = asyncio.run(scenario(Path(folder)))
    assert_sound(run, max_staleness, reuse)
    assert len(run.rolled_back) == run.learner.num_restarts
    assert all(version % 2 == 0 for version in run.rolled_back)


def test_without_checkpoints_a_lost_learner_ends_the_run() -> None:
    async def scenario() -> None:
        await train_with_deaths(Run(small(1, 1, 1000), World(1, 6)), [(30, "learner")])

    with pytest.raises(ActorDiedError, match=r"learner-0 died"):
        asyncio.run(scenario())


@pytest.mark.parametrize("kind", ["rollout", "teacher", "store"])
def test_restarts_are_bounded(kind: str) -> None:
    cfg = small(1, 1, 1000)
    cfg.faults.max_restarts = 2

    async def scenario() -> None:
        await train_with_deaths(Run(cfg, World(1, 6)), [(60, kind)] * 30)

    with pytest.raises(ActorDiedError, match=r"faults.max_restarts=2: mend the cause"):
        asyncio.run(scenario())


def test_slots_fail_when_all_attempts_did() -> None:
    cfg = small(1, 1, 6)
    cfg.faults.max_attempts = 1
    deaths = [(25, "teacher")] * 4

    async def scenario() -> Run:
        return await train_with_deaths(Run(cfg, World(5, {"teacher": 30})), deaths)

    run = asyncio.run(scenario())
    assert_sound(run, 1, 1)
    assert run.books["failed/worker_died"] > 0


def test_a_new_engine_serves_with_the_published_weights() -> None:
    """A new engine starts with the model's own weights; before it serves it has the others'."""
    cfg = small(2, 1, 12)

    async def scenario() -> Run:
        return await train_with_deaths(Run(cfg, World(2, 8)), [(120, "rollouts"), (60, "rollout")])

    run = asyncio.run(scenario())
    assert run.engines.num_restarts == 3
    oldest = [info.staleness for _, batch in run.world.batches for info in batch.infos]
    assert run.books["evicted"] == 0 and max(oldest) <= 2


@pytest.mark.parametrize("hangs", [False, True])
def test_waiting_for_others_is_no_hang_but_a_store_that_answers_nothing_is(hangs: bool) -> None:
    """The learner takes longer than the deadline between two acquisitions; nobody but a hanging store is to blame."""
    cfg = small(0, 4, 4)
    cfg.deadline_s = 0.05

    async def scenario() -> Run:
        run = Run(cfg, World(1, 2))
        answer = run.stores[0].state

        async def slow_step(*args: Any) -> Any:
            await asyncio.sleep(0.03)
            if hangs:
                run.stores[0].state = never  # type: ignore[method-assign,assignment]
            return await step(*args)

        async def never() -> object:
            await asyncio.sleep(3600)
            return answer()

        step, run.learner.train_step = run.learner.train_step, slow_step  # type: ignore[method-assign,assignment]
        async with asyncio.timeout(20):
            return await run.train()

    if hangs:
        with pytest.raises(DeadlineError, match=r"actor replay-store gave no answer in 0.05 s"):
            asyncio.run(scenario())
    else:
        assert len(asyncio.run(scenario()).steps) == 4
