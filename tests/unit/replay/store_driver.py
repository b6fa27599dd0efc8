"""Helpers for tests of the store: receipts, and calls that must not wait."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from opd_ray.replay.cohort import SampledBatch
from opd_ray.replay.store import NOT_YET, ReplayStore
from opd_ray.types import BatchReceipt, TrajectoryReceipt

Result = TypeVar("Result")


class Payload:
    """An opaque payload that weak references can watch."""

    def __init__(self, data: bytes = b"") -> None:
        self.data = data


def receipt(slots: tuple[int, ...] | list[int], versions: dict[int, int] | int = 0) -> BatchReceipt:
    """A receipt whose rows are in the order of `slots`; `versions`: oldest token, by slot or for all."""
    return BatchReceipt(
        trajectories=tuple(
            TrajectoryReceipt(
                slot=slot,
                prompt_id=f"p{slot}",
                row=row,
                num_prompt_tokens=3,
                num_response_tokens=10 + slot,
                oldest_version=versions if isinstance(versions, int) else versions[slot],
                newest_version=versions if isinstance(versions, int) else versions[slot],
                finish_reason="stop",
            )
            for row, slot in enumerate(slots)
        ),
        worker="teacher-0",
        busy_s=0.1,
        num_bytes=100 * len(slots),
    )


class WaitingStore(ReplayStore):
    """The store with its two calls that wait, which look again at each turn of the event loop."""

    async def acquire_slots(self, num_slots: int) -> tuple[int, ...]:
        await self.relieve()
        while not (slots := self.acquire_now(num_slots)):
            await asyncio.sleep(0)
            await self.relieve()
        return slots

    async def sample(self, num_trajectories: int, learner_version: int) -> SampledBatch | None:
        while (batch := self.sample_now(num_trajectories, learner_version)) is NOT_YET:
            await asyncio.sleep(0)
        return batch


class WaitsError(Exception):
    """The call did not return at once."""


async def at_once(call: Coroutine[Any, Any, Result], is_busy: Callable[[], bool] = lambda: False) -> Result:
    """The call's result; raises `WaitsError`, and cancels it, if it has none yet though nothing is busy."""
    task = asyncio.ensure_future(call)
    for _ in range(3):
        await asyncio.sleep(0)
    while not task.done() and is_busy():
        await asyncio.sleep(0.0002)
    if not task.done():
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        raise WaitsError
    return task.result()
