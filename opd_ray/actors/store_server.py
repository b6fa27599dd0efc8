"""The store's end of the socket to its driver: messages in, responses out (`actors.store_wire` is the other end).

A call of a Ray actor costs either side about a millisecond of processor time, ten times a message here. Ray starts and
ends the actor, and carries what only Ray can carry: references to payloads.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil
import tempfile
import traceback
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from opd_ray.actors.store_frames import Failure, Message, Response, Wanted, frame, read_record
from opd_ray.errors import StoreError
from opd_ray.replay.desk import APPEND, Call, StoreDesk
from opd_ray.replay.tickets import TicketOffice

logger = logging.getLogger(__name__)


class StoreServer:
    """Serves a desk to one driver, on one event loop.

    `make_desk` gets the office that issues tickets for the payloads that come in; `fetch` and `put` are the office's.
    """

    def __init__(
        self,
        make_desk: Callable[[TicketOffice], StoreDesk],
        fetch: Callable[[Any], Any],
        put: Callable[[Any], Any],
    ) -> None:
        self._office = TicketOffice(fetch, put, self._ask)
        self._desk = make_desk(self._office)
        self._writer: asyncio.StreamWriter | None = None
        self._answers: set[asyncio.Task[None]] = set()
        self._folder: Path | None = None
        self._server: asyncio.Server | None = None

    async def ping(self) -> None:
        """Answer, which proves that the actor is there."""

    async def listen(self) -> str:
        """Open the socket for one driver; returns its path, which is gone once the driver has come."""
        self._folder = Path(tempfile.mkdtemp(prefix="opd-ray-"))
        path = str(self._folder / "store")
        try:
            self._server = await asyncio.start_unix_server(self._serve, path)
        except OSError as error:
            self._stop_listening()
            raise StoreError(
                f"the store cannot open its socket {path} ({error}): set TMPDIR to a short path of a local disk"
            ) from error
        return path

    async def lend(self, number: int, refs: Sequence[Any]) -> None:
        """See `TicketOffice.lend`; Ray carries the reference, in a list so that it does not fetch the payload."""
        self._office.lend(number, refs[0])

    async def made(self, numbers: Iterable[int]) -> list[Any]:
        """See `TicketOffice.made`."""
        return self._office.made(numbers)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._stop_listening()
        self._writer = writer
        with contextlib.closing(writer), contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                message: Message = await read_record(reader)
                # Tasks start in the order in which they are made.
                answer = asyncio.create_task(self._answer(message))
                self._answers.add(answer)
                answer.add_done_callback(self._answers.discard)

    async def _answer(self, message: Message) -> None:
        try:
            data = frame(Response(message.number, await self._reply(message), self._office.take_dropped()))
        except Exception as error:  # noqa: BLE001  (the driver raises it)
            logger.exception("message %d failed", message.number)
            failure = Failure(type(error).__name__, str(error), traceback.format_exc())
            data = frame(Response(message.number, failure, ()))
        self._write(data)

    async def _reply(self, message: Message) -> Any:
        if message.calls is None:
            return await self._desk.relieve()
        return await self._desk.do([self._with_ticket(call) for call in message.calls])

    def _with_ticket(self, call: Call) -> Call:
        if call.method != APPEND:
            return call
        receipt, number = call.args
        return Call(call.number, call.method, (receipt, [self._office.issue(number)]))

    def _ask(self, number: int) -> None:
        self._write(frame(Wanted(number)))

    def _write(self, data: bytes) -> None:
        # Without a driver nobody waits for it.
        if self._writer is not None and not self._writer.is_closing():
            self._writer.write(data)

    def _stop_listening(self) -> None:
        if self._server is not None:
            self._server.close()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
