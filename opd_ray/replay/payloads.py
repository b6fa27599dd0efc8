"""The table of stored payloads: a reference for each, until no row of it is needed any more."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from opd_ray.replay.payload_io import SpillFile


@dataclass(slots=True)
class Payload:
    """A reference, opaque to the store (an `ObjectRef`), or a file that it was spilled to, or both."""

    ref: Any | None
    num_bytes: int
    rows_left: int
    file: SpillFile | None = None


class PayloadTable:
    """Payloads by number; a reference is dropped together with its last row.

    `num_bytes` counts all payloads, `memory_bytes` those that are in memory.
    """

    def __init__(self) -> None:
        self._payloads: dict[int, Payload] = {}
        self._in_memory: set[int] = set()
        self._next_id = 0
        self.num_bytes = 0
        self.memory_bytes = 0

    def __len__(self) -> int:
        return len(self._payloads)

    def __contains__(self, payload_id: int) -> bool:
        return payload_id in self._payloads

    def __getitem__(self, payload_id: int) -> Payload:
        return self._payloads[payload_id]

    def newest_in_memory(self) -> list[int]:
        """Numbers of the payloads in memory, the last one stored first."""
        return sorted(self._in_memory, reverse=True)

    def put(self, ref: Any, num_bytes: int, num_rows: int) -> int:
        """Store `ref` for `num_rows` rows; returns its number."""
        payload_id = self._next_id
        self._next_id += 1
        self._payloads[payload_id] = Payload(None, num_bytes, num_rows)
        self.num_bytes += num_bytes
        self.load(payload_id, ref)
        return payload_id

    def load(self, payload_id: int, ref: Any) -> None:
        """The payload is in memory, as `ref`."""
        self._payloads[payload_id].ref = ref
        if payload_id not in self._in_memory:
            self._in_memory.add(payload_id)
            self.memory_bytes += self._payloads[payload_id].num_bytes

    def spill(self, payload_id: int, file: SpillFile) -> None:
        """The payload is in `file`: drop its reference."""
        payload = self._payloads[payload_id]
        payload.ref, payload.file = None, file
        self._leave_memory(payload_id)

    def drop_row(self, payload_id: int) -> None:
        """One row is not needed any more."""
        payload = self._payloads[payload_id]
        payload.rows_left -= 1
        if payload.rows_left == 0:
            self.num_bytes -= payload.num_bytes
            self._leave_memory(payload_id)
            del self._payloads[payload_id]

    def _leave_memory(self, payload_id: int) -> None:
        if payload_id in self._in_memory:
            self._in_memory.remove(payload_id)
            self.memory_bytes -= self._payloads[payload_id].num_bytes
