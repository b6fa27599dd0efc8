"""What store and driver write to each other over their socket: a length of eight bytes, and a pickled record."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import Sequence
from typing import Any, NamedTuple

from opd_ray.replay.desk import Call, Reply

_LENGTH_BYTES = 8


class Message(NamedTuple):
    """The driver's: calls for the desk, or None for its `relieve`."""

    number: int
    calls: Sequence[Call] | None


class Failure(NamedTuple):
    """What a message came to that raised another error than an `OpdError`."""

    kind: str
    text: str
    traceback: str


class Response(NamedTuple):
    """The store's, to the message of that number; `dropped` are the payloads that it needs no more."""

    number: int
    outcome: Reply | Failure
    dropped: tuple[int, ...]


class Wanted(NamedTuple):
    """The store's: it has to look into a payload, so the driver lends it the reference."""

    number: int


def frame(record: Message | Response | Wanted) -> bytes:
    """The record as it is written."""
    data = pickle.dumps(record, protocol=5)
    return len(data).to_bytes(_LENGTH_BYTES, "little") + data


async def read_record(reader: asyncio.StreamReader) -> Any:
    """The next record; raises `asyncio.IncompleteReadError` at the end of the connection."""
    length = int.from_bytes(await reader.readexactly(_LENGTH_BYTES), "little")
    # Both ends are actors of one run, on one machine, over a socket that only its user can open.
    return pickle.loads(await reader.readexactly(length))
