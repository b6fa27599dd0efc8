"""Tasks in the background: the first failure is seen at once, and nothing runs on after the end."""

from __future__ import annotations

import asyncio

import pytest

from opd_ray.training.task_pool import TaskPool, end, first_failure_or
from tests.unit.scenario import run


async def fail_after(event: asyncio.Event) -> None:
    await event.wait()
    raise ValueError("broken")


def test_an_error_in_a_pool_ends_the_wait_and_leaves_main_to_its_owner() -> None:
    async def scenario() -> None:
        pool, other, now = TaskPool(), TaskPool(), asyncio.Event()
        before = asyncio.all_tasks()
        main = asyncio.create_task(asyncio.sleep(3600))
        waiting = asyncio.create_task(first_failure_or(main, other, pool))
        await asyncio.sleep(0.01)
        pool.start(asyncio.sleep(3600))
        pool.start(fail_after(now))
        await asyncio.sleep(0.01)
        assert not waiting.done()
        now.set()
        with pytest.raises(ValueError, match="broken"):
            await waiting
        assert not main.done() and len(pool.running) == 1
        await end(pool.running | {main})
        assert not pool.running and asyncio.all_tasks() == before

    run(scenario())


def test_mains_own_error_and_its_end_are_what_is_waited_for() -> None:
    async def scenario() -> None:
        pool, now = TaskPool(), asyncio.Event()
        pool.start(asyncio.sleep(3600))
        await first_failure_or(asyncio.create_task(asyncio.sleep(0)), pool)
        now.set()
        with pytest.raises(ValueError, match="broken"):
            await first_failure_or(asyncio.create_task(fail_after(now)), pool)
        await end(pool.running)

    run(scenario())


def test_tasks_that_ended_or_were_cancelled_are_forgotten_and_are_no_failure() -> None:
    async def scenario() -> None:
        pool = TaskPool()
        pool.start(asyncio.sleep(0))
        pool.start(asyncio.sleep(3600))
        await asyncio.sleep(0.01)
        (rest,) = pool.running
        rest.cancel()
        await pool.finish()
        assert not pool.running

    run(scenario())


def test_finish_waits_for_all_and_raises_the_first_error_without_waiting() -> None:
    async def scenario() -> None:
        pool, now = TaskPool(), asyncio.Event()
        done: list[int] = []

        async def work(number: int) -> None:
            await asyncio.sleep(0.01 * number)
            done.append(number)

        for number in range(3):
            pool.start(work(number))
        await pool.finish()
        assert done == [0, 1, 2]
        pool.start(fail_after(now))
        pool.start(asyncio.sleep(3600))
        now.set()
        with pytest.raises(ValueError, match="broken"):
            await pool.finish()
        assert len(pool.running) == 1
        await end(pool.running)

    run(scenario())


def test_who_waits_can_be_cancelled_and_leaves_no_task() -> None:
    async def scenario() -> None:
        pool, before = TaskPool(), asyncio.all_tasks()
        main = asyncio.create_task(asyncio.sleep(3600))
        waiting = asyncio.create_task(first_failure_or(main, pool))
        await asyncio.sleep(0.01)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        await end({main})
        assert asyncio.all_tasks() == before

    run(scenario())
