"""The driver's end of the line to a store actor (`replay.desk`): calls made together are one message."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Collection, Sequence
from typing import Any, Protocol

from opd_ray.cluster.remote_calls import remote_result
from opd_ray.errors import ActorDiedError
from opd_ray.replay.desk import ACQUIRE, FETCHING, PUTTING, Call, Reply


class FarDesk(Protocol):
    """A `StoreDesk` in another process: what is handed over arrives in that order; awaited, it gives the reply."""

    def do(self, calls: Sequence[Call]) -> Awaitable[Reply]:
        """See `StoreDesk.do`."""
        ...

    def relieve(self) -> Awaitable[Reply]:
        """See `StoreDesk.relieve`."""
        ...

    def close(self) -> None:
        """End the store; whoever waits for a reply gets `ActorDiedError`."""
        ...


class StoreLine:
    """Calls of one store actor, which reach it in the order in which they were made.

    `call` raises what the store raised, `DeadlineError` when a message has no reply in time, and
    `ActorDiedError` when the actor died, also for the calls that wait there.
    """

    def __init__(self, desk: FarDesk, name: str, deadline_s: float) -> None:
        self.desk = desk
        self._name = name
        self._deadline_s = deadline_s
        self._numbers = itertools.count()
        self._outbox: list[Call] = []
        self._is_due = False
        self._open: dict[int, tuple[str, asyncio.Future[Any]]] = {}
        self._messages: set[asyncio.Task[None]] = set()
        self._is_relieving = False
        self._error: BaseException | None = None

    async def call(self, method: str, *args: Any) -> Any:
        """Send a call with those that are made in this turn of the event loop; returns its answer."""
        if self._error is not None:
            raise self._error
        # They read or write files: no other call waits for them.
        if method in (*FETCHING, *PUTTING):
            return await self._call_alone(method, args)
        future = self._add(method, args)
        if not self._is_due:
            self._is_due = True
            asyncio.get_running_loop().call_soon(self._send)
        return await future

    async def _call_alone(self, method: str, args: tuple[Any, ...]) -> Any:
        """In a message of its own, and in the caller's task: who is cancelled meanwhile gives up the message too."""
        self._send()
        future = self._add(method, args)
        calls, self._outbox = self._outbox, []
        try:
            await self._finish(self.desk.do(calls), [call.number for call in calls])
        finally:
            self._open.pop(calls[-1].number, None)
        return future.result()

    def post(self, method: str, *args: Any) -> None:
        """Send a call with the next message, whenever that is; an error that it meets is that of all later calls."""
        self._add(method, args).add_done_callback(self._posted)

    def _posted(self, future: asyncio.Future[Any]) -> None:
        error = None if future.cancelled() else future.exception()
        # A store that takes over is told of it in another way.
        if error is not None and not isinstance(error, ActorDiedError):
            self._error = error

    def _add(self, method: str, args: tuple[Any, ...]) -> asyncio.Future[Any]:
        call = Call(next(self._numbers), method, args)
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._open[call.number] = method, future
        self._outbox.append(call)
        return future

    def _send(self) -> None:
        self._is_due = False
        if self._outbox:
            calls, self._outbox = self._outbox, []
            # Sent here and not in the task, which starts later: order is kept.
            self._follow(self.desk.do(calls), [call.number for call in calls])

    def _follow(self, ref: Awaitable[Reply], numbers: Collection[int]) -> asyncio.Task[None]:
        message = asyncio.create_task(self._finish(ref, numbers))
        self._messages.add(message)
        message.add_done_callback(self._messages.discard)
        return message

    async def _finish(self, ref: Awaitable[Reply], numbers: Collection[int]) -> None:
        try:
            reply: Reply = await remote_result(ref, self._name, self._deadline_s)
        except ActorDiedError as error:
            self._fail(list(self._open), error)
        except Exception as error:  # noqa: BLE001  (whoever made the call gets it)
            self._fail(numbers, error)
        else:
            self._deliver(reply)

    def _deliver(self, reply: Reply) -> None:
        for answer in reply.answers:
            _, future = self._open.pop(answer.number)
            if future.done():
                continue  # Nobody waits for it any more.
            if answer.error is None:
                future.set_result(answer.value)
            else:
                future.set_exception(answer.error)
        if reply.wants_relief and not self._is_relieving:
            self._is_relieving = True
            acquiring = [number for number, (method, _) in self._open.items() if method == ACQUIRE]
            self._follow(self.desk.relieve(), acquiring).add_done_callback(self._relieved)

    def _relieved(self, _: asyncio.Task[None]) -> None:
        self._is_relieving = False

    def _fail(self, numbers: Collection[int], error: BaseException) -> None:
        for number in numbers:
            _, future = self._open.pop(number, ("", None))
            if future is not None and not future.done():
                future.set_exception(error)
