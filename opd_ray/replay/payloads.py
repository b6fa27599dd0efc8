"""Holds payload references until no row of theirs is needed any more."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(slots=True)
class _Payload:
    ref: Any
    num_bytes: int
    rows_left: int
    in_memory: bool = True


class PayloadShelf:
    """Payload references by number; a reference is let go together with its last row.

    References are opaque: an `ObjectRef`, a path or the bytes themselves.
    """

    def __init__(self) -> None:
        self._payloads: dict[int, _Payload] = {}
        self._next_id = 0

    def __len__(self) -> int:
        return len(self._payloads)

    @property
    def num_bytes(self) -> int:
        """Bytes of all payloads that are held."""
        return sum(payload.num_bytes for payload in self._payloads.values())

    @property
    def memory_bytes(self) -> int:
        """Bytes of the payloads that were not spilled."""
        return sum(payload.num_bytes for payload in self._payloads.values() if payload.in_memory)

    def newest_in_memory(self) -> list[int]:
        """Numbers of the payloads that were not spilled, the last that came in first."""
        return [payload_id for payload_id in reversed(self._payloads) if self._payloads[payload_id].in_memory]

    def holds(self, payload_id: int) -> bool:
        """Whether a row of that payload is still needed."""
        return payload_id in self._payloads

    def spill(self, payload_id: int, spilled: Any) -> None:
        """Let go of a payload's reference; `spilled` stands for it."""
        payload = self._payloads[payload_id]
        payload.ref, payload.in_memory = spilled, False

    def recall(self, payload_id: int, ref: Any) -> None:
        """A spilled payload is in memory again, as `ref`."""
        payload = self._payloads[payload_id]
        payload.ref, payload.in_memory = ref, True

    def put(self, ref: Any, num_bytes: int, num_rows: int) -> int:
        """Hold `ref` for `num_rows` rows; returns its number."""
        payload_id = self._next_id
        self._next_id += 1
        self._payloads[payload_id] = _Payload(ref, num_bytes, num_rows)
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
            del self._payloads[payload_id]
