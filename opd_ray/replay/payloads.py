"""Holds payload references until no row of theirs is needed any more."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(slots=True)
class _Payload:
    ref: Any
    num_bytes: int
    rows_left: int


class PayloadShelf:
    """Payload references by number; a reference is let go together with its last row.

    References are opaque: an `ObjectRef`, a path or the bytes themselves. `num_bytes` is of all payloads that are held,
    `memory_bytes` of those that were not spilled.
    """

    def __init__(self) -> None:
        self._payloads: dict[int, _Payload] = {}
        self._in_memory: set[int] = set()
        self._next_id = 0
        self.num_bytes = 0
        self.memory_bytes = 0

    def __len__(self) -> int:
        return len(self._payloads)

    def newest_in_memory(self) -> list[int]:
        """Numbers of the payloads that were not spilled, the last that came in first."""
        return sorted(self._in_memory, reverse=True)

    def holds(self, payload_id: int) -> bool:
        """Whether a row of that payload is still needed."""
        return payload_id in self._payloads

    def spill(self, payload_id: int, spilled: Any) -> None:
        """Let go of a payload's reference; `spilled` stands for it."""
        self._payloads[payload_id].ref = spilled
        self._leave_memory(payload_id)

    def recall(self, payload_id: int, ref: Any) -> None:
        """A spilled payload is in memory again, as `ref`."""
        self._payloads[payload_id].ref = ref
        self._enter_memory(payload_id)

    def put(self, ref: Any, num_bytes: int, num_rows: int) -> int:
        """Hold `ref` for `num_rows` rows; returns its number."""
        payload_id = self._next_id
        self._next_id += 1
        self._payloads[payload_id] = _Payload(ref, num_bytes, num_rows)
        self.num_bytes += num_bytes
        self._enter_memory(payload_id)
        return payload_id

    def ref(self, payload_id: int) -> Any:
        """The reference of a payload that is held."""
        return self._payloads[payload_id].ref

    def size(self, payload_id: int) -> int:
        """Bytes of a payload that is held."""
        return self._payloads[payload_id].num_bytes

    def drop_row(self, payload_id: int) -> None:
        """One row is not needed any more."""
        payload = self._payloads[payload_id]
        payload.rows_left -= 1
        if payload.rows_left == 0:
            self.num_bytes -= payload.num_bytes
            self._leave_memory(payload_id)
            del self._payloads[payload_id]

    def _enter_memory(self, payload_id: int) -> None:
        if payload_id not in self._in_memory:
            self._in_memory.add(payload_id)
            self.memory_bytes += self.size(payload_id)

    def _leave_memory(self, payload_id: int) -> None:
        if payload_id in self._in_memory:
            self._in_memory.remove(payload_id)
            self.memory_bytes -= self.size(payload_id)
