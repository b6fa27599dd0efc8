"""The store's end of the line to its driver: several calls in one message, and some that are answered later.

A message costs either side more than what the store does with it, and a call that waits is two of them: one there, one
back when its time has come. So the driver sends what it has to say in one turn of its event loop as one message, and
`acquire_slots` and `sample`, which wait for others, are kept here and answered with the first message after which they
can go on. Nothing is missed by that: the store changes only by what it is told, and it has one driver.
`actors.store_line` is the driver's end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from opd_ray.errors import OpdError, StoreError
from opd_ray.replay.spill import as_is, settled
from opd_ray.replay.store import NOT_YET, ReplayStore

ACQUIRE, SAMPLE, APPEND = "acquire_slots", "sample", "append"
WAITING = (SAMPLE, ACQUIRE)
"""In the order in which they are looked at: a sample's sweep makes room."""
FETCHING = ("snapshot", "release_and_snapshot")
"""They look into payloads; the desk adds `fetch` to their arguments."""
PUTTING = ("restore", "recover")
"""They make payloads of files; the desk adds `put` to their arguments."""


@dataclass(frozen=True, slots=True)
class Call:
    """A method of the store, its arguments, and the number under which it is answered."""

    number: int
    method: str
    args: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Answer:
    """What a call gave back, or the `OpdError` that it raised."""

    number: int
    value: Any = None
    error: OpdError | None = None


@dataclass(frozen=True, slots=True)
class Reply:
    """The answers that are known after a message; `wants_relief` asks for `relieve`, which may take long."""

    answers: tuple[Answer, ...]
    wants_relief: bool = False


class StoreDesk:
    """Takes the messages of one driver to a store; a plain class on one event loop, as the store is.

    `fetch` and `put` are what `ReplayStore.snapshot` and `ReplayStore.restore` need of payload references.
    """

    def __init__(
        self, store: ReplayStore, fetch: Callable[[Any], Any] = as_is, put: Callable[[Any], Any] = as_is
    ) -> None:
        self._store = store
        self._added = dict.fromkeys(FETCHING, (fetch,)) | dict.fromkeys(PUTTING, (put,))
        self._waiting: dict[int, Call] = {}

    async def do(self, calls: Sequence[Call]) -> Reply:
        """Make the calls, one after the other, and answer all that can be answered then, older calls too.

        An `OpdError` is the answer of its call alone; any other error is raised, and ends the run.
        """
        answers = []
        for call in calls:
            if call.method == SAMPLE and any(waiting.method == SAMPLE for waiting in self._waiting.values()):
                error = StoreError("a batch was asked for while another request waits: the learner samples once a step")
                answers.append(Answer(call.number, error=error))
            elif call.method in WAITING:
                self._waiting[call.number] = call
            else:
                answers.append(await self._answer(call))
        wants_relief = self._serve(answers, self._store.wants_relief)
        return Reply(tuple(answers), wants_relief)

    async def relieve(self) -> Reply:
        """Move payloads to files as far as memory needs it and they can be moved; then answer as `do`."""
        await self._store.relieve()
        answers: list[Answer] = []
        self._serve(answers, wants_relief=False)
        return Reply(tuple(answers))

    async def _answer(self, call: Call) -> Answer:
        try:
            args = (*call.args, *self._added.get(call.method, ()))
            return Answer(call.number, await settled(getattr(self._store, call.method)(*args)))
        except OpdError as error:
            return Answer(call.number, error=error)

    def _serve(self, answers: list[Answer], wants_relief: bool) -> bool:
        """Answer those that wait as long as there is one that can go on; whether one waits for relief only."""
        progress, kept_back = True, False
        while progress:
            progress = kept_back = False
            for call in sorted(self._waiting.values(), key=lambda call: (WAITING.index(call.method), call.number)):
                if call.method == ACQUIRE and wants_relief:
                    kept_back = True
                elif answer := self._try(call):
                    del self._waiting[call.number]
                    answers.append(answer)
                    progress = True
        return kept_back

    def _try(self, call: Call) -> Answer | None:
        try:
            if call.method == ACQUIRE:
                slots = self._store.acquire_now(*call.args)
                return Answer(call.number, slots) if slots else None
            batch = self._store.sample_now(*call.args)
            return None if batch is NOT_YET else Answer(call.number, batch)
        except OpdError as error:
            return Answer(call.number, error=error)
