"""What a store holds of a payload while its driver holds the reference: a ticket with a number.

A reference that two processes hold is counted by Ray in both, with messages from each to the other; that costs more
than what the store does with a whole batch. So the driver keeps the references of the payloads that it hands over, and
is told the numbers of those that are needed no more. The store asks for a reference only where it must look inside, for
a snapshot or to spill it, and keeps what it makes itself of a file.
"""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import pyarrow as pa

from opd_ray.replay.spill import settled


class Ticket:
    """Stands for a payload's reference; what has it needs the payload. Numbers below 0 are the store's own."""

    __slots__ = ("__weakref__", "number")

    def __init__(self, number: int) -> None:
        self.number = number

    def __reduce__(self) -> tuple[Any, ...]:
        return Ticket, (self.number,)


class TicketOffice:
    """The tickets of one store, on one event loop.

    `fetch` makes bytes, or an awaitable of them, of a reference, `put` a reference of a `pyarrow.Buffer`; `ask` sees to
    it that the driver's reference of a number is lent.
    """

    def __init__(
        self, fetch: Callable[[Any], Any], put: Callable[[pa.Buffer], Any], ask: Callable[[int], None]
    ) -> None:
        self._fetch, self._put, self._ask = fetch, put, ask
        self._held: set[int] = set()
        self._refs: dict[int, Any] = {}
        self._asked: dict[int, asyncio.Event] = {}
        self._dropped: list[int] = []
        self._num_made = 0

    def issue(self, number: int) -> Ticket:
        """A ticket for the driver's payload of that number, which comes once."""
        ticket = Ticket(number)
        self._held.add(number)
        weakref.finalize(ticket, self._drop, number).atexit = False
        return ticket

    def make(self, data: pa.Buffer) -> Ticket:
        """A ticket for a payload of the store's own."""
        self._num_made += 1
        self._refs[-self._num_made] = self._put(data)
        return self.issue(-self._num_made)

    def made(self, numbers: Iterable[int]) -> list[Any]:
        """The references of the store's own payloads."""
        return [self._refs[number] for number in numbers]

    def lend(self, number: int, ref: Any) -> None:
        """Take the driver's reference that was asked for, unless nobody needs its payload any more."""
        if number in self._held:
            self._refs[number] = ref
        if number in self._asked:
            self._asked.pop(number).set()

    async def data(self, ticket: Ticket) -> Any:
        """The bytes of a ticket's payload; raises what `fetch` does."""
        while ticket.number not in self._refs:
            if ticket.number not in self._asked:
                self._asked[ticket.number] = asyncio.Event()
                self._ask(ticket.number)
            await self._asked[ticket.number].wait()
        return await settled(self._fetch(self._refs[ticket.number]))

    def take_dropped(self) -> tuple[int, ...]:
        """Numbers that are needed no more, each told once."""
        dropped, self._dropped = self._dropped, []
        return tuple(dropped)

    def _drop(self, number: int) -> None:
        self._held.discard(number)
        self._refs.pop(number, None)
        self._dropped.append(number)
