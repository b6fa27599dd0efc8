"""Helpers for tests of the store: metadata, and calls that must not wait."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any, TypeVar

from opd_ray.errors import CheckpointError, PayloadLostError
from opd_ray.replay.payload_io import PayloadFile, read_payload, write_payload
from opd_ray.replay.staleness import StoreConfig
from opd_ray.replay.store import ReplayStore
from opd_ray.types import BatchMeta, TrajectoryMeta

Result = TypeVar("Result")
LOST = b"lost"


class Payload:
    """An opaque payload that weak references can watch."""

    def __init__(self, data: bytes = b"") -> None:
        self.data = data


def meta(trajectory_ids: tuple[int, ...] | list[int], versions: dict[int, int] | int = 0) -> BatchMeta:
    """Metadata whose rows are in the order of the ids; `versions`: oldest token, by trajectory or for all."""
    return BatchMeta(
        trajectories=tuple(
            TrajectoryMeta(
                trajectory_id=trajectory_id,
                prompt_id=f"p{trajectory_id}",
                row=row,
                num_prompt_tokens=3,
                num_response_tokens=10 + trajectory_id,
                oldest_version=versions if isinstance(versions, int) else versions[trajectory_id],
                newest_version=versions if isinstance(versions, int) else versions[trajectory_id],
                finish_reason="stop",
            )
            for row, trajectory_id in enumerate(trajectory_ids)
        ),
        worker="teacher-0",
        busy_s=0.1,
        num_bytes=100 * len(trajectory_ids),
    )


class MemoryPayloads:
    """A `PayloadIO` for payloads that have `data`; those that are `LOST` were lost with a node.

    `pause` is awaited before each payload is written; `make` makes a payload of bytes.
    """

    def __init__(
        self,
        make: Callable[[bytes], Any] = Payload,
        pause: Callable[[Any], Awaitable[None]] = lambda payload: asyncio.sleep(0),
    ) -> None:
        self._make = make
        self._pause = pause

    async def write(self, refs: Sequence[Any], paths: Sequence[Path]) -> list[str | None]:
        checksums = []
        for ref, path in zip(refs, paths, strict=True):
            await self._pause(ref)
            checksums.append(None if ref.data == LOST else write_payload(ref.data, path))
        return checksums

    async def read(self, files: Sequence[PayloadFile]) -> list[Any]:
        await asyncio.sleep(0)
        try:
            return self.read_later(files)
        except PayloadLostError as error:
            raise CheckpointError(str(error)) from error

    def read_later(self, files: Sequence[PayloadFile]) -> list[Any]:
        return [self._make(bytes(read_payload(file))) for file in files]


def make_store(config: StoreConfig, io: MemoryPayloads | None = None, **options: Any) -> ReplayStore:
    """A store whose payloads are in this process."""
    return ReplayStore(config, io or MemoryPayloads(), **options)


async def snapshot(store: ReplayStore, folder: Path) -> None:
    """Write the store of this instant into a new folder."""
    folder.mkdir(parents=True)
    await store.write(store.freeze(), folder)


class WaitsError(Exception):
    """The call did not return at once."""


async def at_once(call: Coroutine[Any, Any, Result], is_busy: Callable[[], bool] = lambda: False) -> Result:
    """The call's result; raises `WaitsError`, and cancels it, if it has none yet though nothing is busy."""
    task = asyncio.ensure_future(call)
    for _ in range(5):
        await asyncio.sleep(0)
    while not task.done() and is_busy():
        await asyncio.sleep(0.0002)
    if not task.done():
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        raise WaitsError
    return task.result()
