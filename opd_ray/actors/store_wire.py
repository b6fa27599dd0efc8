"""The driver's end of the socket to its store (`actors.store_server`), and the references of the payloads there."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from opd_ray.actors.store_frames import Failure, Message, Response, Wanted, frame, read_record
from opd_ray.cluster.remote_calls import actor_failed, remote_result
from opd_ray.errors import ActorDiedError, ActorError, OpdError
from opd_ray.replay.cohort import SampledBatch
from opd_ray.replay.desk import APPEND, Answer, Call, Reply

_PING_S = 10.0

logger = logging.getLogger(__name__)


class StoreWire:
    """A store's desk from the driver: messages arrive in the order in which they were handed over.

    `do` and `relieve` give what the desk gives, and raise `ActorDiedError` when the actor dies meanwhile or did before,
    `ActorError` when it failed over the message. `handle` is a `StoreServer` as a Ray actor, `kill` ends it. Payload
    references that `append` brings are kept here for as long as the store needs the payloads.
    """

    def __init__(self, handle: Any, name: str, kill: Callable[[Any], None]) -> None:
        self.handle = handle
        self._name = name
        self._kill = kill
        self._numbers = itertools.count()
        self._open: dict[int, asyncio.Future[Reply]] = {}
        self._unsent: list[bytes] = []
        self._writer: asyncio.StreamWriter | None = None
        self._reading: asyncio.Task[None] | None = None
        self._collecting: set[asyncio.Task[None]] = set()
        self._error: OpdError | None = None
        self._payload_numbers = itertools.count()
        self._refs: dict[int, Any] = {}

    @property
    def num_payloads(self) -> int:
        """References that are kept here."""
        return len(self._refs)

    def do(self, calls: Sequence[Call]) -> asyncio.Future[Reply]:
        """See `StoreDesk.do`; the message is on its way when this returns."""
        return self._send([self._without_ref(call) for call in calls])

    def relieve(self) -> asyncio.Future[Reply]:
        """See `StoreDesk.relieve`."""
        return self._send(None)

    def close(self) -> None:
        """End the store."""
        self._end(ActorDiedError(f"actor {self._name} was ended: start again"))
        if self._reading is not None:
            self._reading.cancel()
        self._kill(self.handle)

    def _without_ref(self, call: Call) -> Call:
        if call.method != APPEND:
            return call
        receipt, (ref,) = call.args
        number = next(self._payload_numbers)
        self._refs[number] = ref
        return Call(call.number, call.method, (receipt, number))

    def _send(self, calls: Sequence[Call] | None) -> asyncio.Future[Reply]:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Reply] = loop.create_future()
        future.add_done_callback(_look_at)
        if self._error is not None:
            future.set_exception(self._error)
            return future
        message = Message(next(self._numbers), calls)
        self._open[message.number] = future
        data = frame(message)
        if self._writer is None:
            self._unsent.append(data)
        else:
            self._writer.write(data)
        if self._reading is None:
            self._reading = loop.create_task(self._read())
        return future

    async def _read(self) -> None:
        """Connect, and take in responses until the connection ends, whatever ends it."""
        try:
            path = await remote_result(self.handle.listen.remote(), self._name, None)
            reader, self._writer = await asyncio.open_unix_connection(path)
            with contextlib.closing(self._writer):
                self._writer.writelines(self._unsent)
                while True:
                    record = await read_record(reader)
                    if isinstance(record, Wanted):
                        self.handle.lend.remote(record.number, [self._refs[record.number]])
                    else:
                        self._take(record)
        except OpdError as error:
            self._end(error)
        except (OSError, asyncio.IncompleteReadError) as error:
            self._writer = None
            self._end(await self._cause(error))

    async def _cause(self, error: Exception) -> ActorDiedError:
        """Why the connection ended; an actor that is still there is of no use without it."""
        try:
            await remote_result(self.handle.ping.remote(), self._name, _PING_S)
        except ActorDiedError as death:
            return death
        except ActorError as failure:
            logger.warning("%s", failure)
        self._kill(self.handle)
        return ActorDiedError(f"actor {self._name} cannot be reached ({error}): start again")

    def _take(self, response: Response) -> None:
        for number in response.dropped:
            self._refs.pop(number, None)
        future = self._open.pop(response.number, None)
        if future is None or future.done():
            return
        if isinstance(response.outcome, Failure):
            future.set_exception(actor_failed(self._name, *response.outcome))
        elif missing := self._missing(response.outcome):
            collecting = asyncio.create_task(self._collect(missing, response.outcome, future))
            self._collecting.add(collecting)
            collecting.add_done_callback(self._collecting.discard)
        else:
            future.set_result(self._with_refs(response.outcome))

    def _missing(self, reply: Reply) -> list[int]:
        """Numbers of payloads in `reply` which the store made of files."""
        return [ticket.number for ticket in _tickets(reply.answers) if ticket.number not in self._refs]

    async def _collect(self, numbers: list[int], reply: Reply, future: asyncio.Future[Reply]) -> None:
        """Have Ray bring the store's own references, then give the reply."""
        try:
            refs = await remote_result(self.handle.made.remote(numbers), self._name, None)
            self._refs |= dict(zip(numbers, refs, strict=True))
        except OpdError as error:
            if not future.done():
                future.set_exception(error)
        else:
            if not future.done():
                future.set_result(self._with_refs(reply))

    def _with_refs(self, reply: Reply) -> Reply:
        answers = tuple(
            dataclasses.replace(answer, value=self._batch(answer.value))
            if isinstance(answer.value, SampledBatch)
            else answer
            for answer in reply.answers
        )
        return dataclasses.replace(reply, answers=answers)

    def _batch(self, batch: SampledBatch) -> SampledBatch:
        return dataclasses.replace(batch, refs=tuple(self._refs[ticket.number] for ticket in batch.refs))

    def _end(self, error: OpdError) -> None:
        if self._error is None:
            self._error = error
        for future in self._open.values():
            if not future.done():
                future.set_exception(self._error)
        self._open.clear()
        self._refs.clear()


def _tickets(answers: Iterable[Answer]) -> Iterable[Any]:
    return (ref for answer in answers if isinstance(answer.value, SampledBatch) for ref in answer.value.refs)


def _look_at(future: asyncio.Future[Reply]) -> None:
    """Whoever waited for it may be gone: then nobody else asks for its error."""
    if not future.cancelled():
        future.exception()
