"""Tasks that run on their own, thousands at a time, of which one that fails must be noticed at once."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Coroutine
from typing import Any, NoReturn


class TaskPool:
    """Tasks of one event loop; one that has ended is forgotten, whatever else runs, and the first error is kept."""

    def __init__(self) -> None:
        self._running: set[asyncio.Task[None]] = set()
        self._errors: list[BaseException] = []
        self._has_failed = asyncio.Event()

    @property
    def running(self) -> set[asyncio.Task[None]]:
        """The tasks that have not ended."""
        return set(self._running)

    def start(self, work: Coroutine[Any, Any, None]) -> None:
        """Run `work` as a task."""
        task = asyncio.create_task(work)
        self._running.add(task)
        task.add_done_callback(self._ended)

    async def failure(self) -> NoReturn:
        """Wait for the first task that fails; raises its error."""
        await self._has_failed.wait()
        raise self._errors[0]

    async def finish(self) -> None:
        """Wait until no task is left; raises the first error, then without waiting for the others."""
        while self._running and not self._errors:
            await asyncio.wait(self._running, return_when=asyncio.FIRST_EXCEPTION)
        if self._errors:
            raise self._errors[0]

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None:
            self._errors.append(error)
            self._has_failed.set()


async def first_failure_or(main: asyncio.Task[None], *pools: TaskPool) -> None:
    """Wait for `main`; an error in one of the pools is raised at once."""
    failures = {asyncio.create_task(pool.failure()) for pool in pools}
    try:
        await asyncio.wait({main} | failures, return_when=asyncio.FIRST_COMPLETED)
        for failure in failures:
            if failure.done():
                failure.result()
        main.result()
    finally:
        await end(failures)


async def end(tasks: Collection[asyncio.Task[Any]]) -> None:
    """Cancel tasks until they have ended, whatever they make of it; their results and errors are dropped."""
    running = {task for task in tasks if not task.done()}
    while running:
        for task in running:
            task.cancel()
        _, running = await asyncio.wait(running, timeout=1.0)
    await asyncio.gather(*tasks, return_exceptions=True)
