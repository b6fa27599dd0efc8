"""Payloads in files: what the store holds beyond a number of bytes leaves memory until it is trained on."""

from __future__ import annotations

import asyncio
import inspect
import mmap
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from opd_ray.errors import PayloadLostError, StoreError
from opd_ray.replay.parts import StoreParts


@dataclass(frozen=True, slots=True)
class Spilled:
    """A payload's bytes, an Arrow IPC stream, mapped from a file without a name.

    The file has no name from the start: its space is given back with the last view of it, whatever ends the process.
    """

    data: pa.Buffer


def as_is(value: Any) -> Any:
    """`value`."""
    return value


@dataclass(slots=True)
class SpillSpace:
    """Moves payloads to files while those in memory have more than `max_memory_bytes`.

    `fetch` makes bytes, or an awaitable of them, of a payload reference, and `put` a reference of a `pyarrow.Buffer`;
    left out they give what they get. The files are in `folder` (None: where temporary files go on the store's machine).
    """

    max_memory_bytes: int
    fetch: Callable[[Any], Any] = as_is
    put: Callable[[pa.Buffer], Any] = as_is
    folder: Path | None = None
    is_busy: bool = False

    def is_needed(self, parts: StoreParts) -> bool:
        """Whether payloads have more memory than they may, and nobody moves them yet."""
        return not self.is_busy and parts.shelf.memory_bytes > self.max_memory_bytes

    async def relieve(self, parts: StoreParts) -> None:
        """Spill what was stored last, and is not drafted, until the rest fits; raises `StoreError` on a full disk."""
        if not self.is_needed(parts):
            return
        self.is_busy = True
        try:
            for payload_id in parts.shelf.newest_in_memory():
                if parts.shelf.memory_bytes <= self.max_memory_bytes:
                    return
                if parts.is_drafted(payload_id) or not parts.shelf.holds(payload_id):
                    continue
                try:
                    data = memoryview(await settled(self.fetch(parts.shelf.ref(payload_id))))
                except PayloadLostError:
                    # Its rows are evicted by whoever needs them next.
                    continue
                spilled = await asyncio.to_thread(self._write, data)
                # It may have been drafted or dropped meanwhile.
                if parts.shelf.holds(payload_id) and not parts.is_drafted(payload_id):
                    parts.shelf.spill(payload_id, spilled)
        finally:
            self.is_busy = False

    def recall(self, parts: StoreParts) -> None:
        """Bring the running cohort's payloads back into memory."""
        for payload_id in sorted({member.payload_id for member in parts.drafted.cohort()}):
            if parts.shelf.holds(payload_id) and isinstance(spilled := parts.shelf.ref(payload_id), Spilled):
                parts.shelf.recall(payload_id, self.put(spilled.data))

    def _write(self, data: memoryview) -> Spilled:
        try:
            with tempfile.TemporaryFile(dir=self.folder) as file:
                file.write(data)
                file.flush()
                return Spilled(pa.py_buffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)))
        except OSError as error:
            raise StoreError(
                f"a payload of {data.nbytes} bytes cannot be spilled ({error}): make room where temporary files go "
                "(TMPDIR), or set replay.max_bytes"
            ) from error


async def settled(value: Any) -> Any:
    """`value`, or what it comes to if it can be awaited."""
    return await value if inspect.isawaitable(value) else value
