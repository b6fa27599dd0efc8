"""The driver's end of the line to a store: what is one message, who gets which answer, and what becomes of errors."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import pytest

from opd_ray.actors.store_line import StoreLine
from opd_ray.errors import ActorDiedError, DeadlineError, LedgerError
from opd_ray.replay.desk import Call, Reply, StoreDesk
from opd_ray.replay.spill import SpillSpace
from opd_ray.replay.staleness import StoreConfig
from opd_ray.replay.store import ReplayStore
from tests.unit.fake_actors import FarHandle, Handle
from tests.unit.replay.store_driver import receipt
from tests.unit.scenario import run


class CountingDesk(StoreDesk):
    """Keeps the methods of each message."""

    def __init__(self, store: ReplayStore) -> None:
        super().__init__(store)
        self.messages: list[list[str]] = []
        self.reliefs = 0

    async def do(self, calls: Sequence[Call]) -> Reply:
        self.messages.append([call.method for call in calls])
        return await super().do(calls)

    async def relieve(self) -> Reply:
        self.reliefs += 1
        await asyncio.sleep(0)
        return await super().relieve()


def line_to(store: ReplayStore, deadline_s: float = 20.0) -> tuple[StoreLine, CountingDesk, Handle]:
    desk = CountingDesk(store)
    handle = Handle(desk, "replay-store")
    return StoreLine(FarHandle(handle), "replay-store", deadline_s), desk, handle


def test_calls_made_together_are_one_message_and_a_posted_one_goes_with_the_next() -> None:
    async def scenario() -> None:
        line, desk, _ = line_to(ReplayStore(StoreConfig(2, max_staleness=1)))
        state, slots = await asyncio.gather(line.call("state"), line.call("acquire_slots", 2))
        assert (state["ledger/started"], slots) == (0, (0, 1))
        line.post("assign", slots, ["a", "b"])
        await asyncio.sleep(0.01)
        assert desk.messages == [["state", "acquire_slots"]]
        assert await line.call("pending") == {0: "a", 1: "b"}
        assert desk.messages[1:] == [["assign", "pending"]]

    run(scenario())


def test_a_call_that_stands_alone_goes_after_those_before_it(tmp_path: Path) -> None:
    async def scenario() -> None:
        store = ReplayStore(StoreConfig(4, max_staleness=1))
        line, desk, _ = line_to(store)
        first = asyncio.create_task(line.call("acquire_slots", 2))
        while not desk.messages:
            await asyncio.sleep(0)
        second = asyncio.create_task(line.call("state"))
        await asyncio.sleep(0)
        line.post("assign", (0, 1), ["a", "b"])
        await line.call("snapshot", tmp_path / "snapshot")
        await asyncio.gather(first, second)
        assert desk.messages == [["acquire_slots"], ["state", "assign"], ["snapshot"]]

    run(scenario())


def test_a_call_that_waits_costs_no_message_of_its_own() -> None:
    async def scenario() -> None:
        line, desk, _ = line_to(ReplayStore(StoreConfig(2)))
        slots = await line.call("acquire_slots", 2)
        batch = asyncio.create_task(line.call("sample", 2, 0))
        more = asyncio.create_task(line.call("acquire_slots", 2))
        await asyncio.sleep(0.01)
        await line.call("append", receipt(slots), ["payload"])
        assert (await batch).slots == (0, 1)
        await line.call("release", (0, 1), 1)
        assert await more == (2, 3)
        assert desk.messages == [["acquire_slots"], ["sample", "acquire_slots"], ["append"], ["release"]]

    run(scenario())


def test_an_error_is_that_of_its_call_and_a_posted_ones_of_all_later_calls() -> None:
    async def scenario() -> None:
        line, _, _ = line_to(ReplayStore(StoreConfig(2)))
        found = await asyncio.gather(line.call("state"), line.call("fail", [7], "why"), return_exceptions=True)
        assert isinstance(found[1], LedgerError) and not isinstance(found[0], BaseException)
        line.post("assign", [7], ["a"])
        await line.call("state")
        with pytest.raises(LedgerError):
            await line.call("state")

    run(scenario())


def test_a_death_ends_the_calls_that_wait_too() -> None:
    async def scenario() -> None:
        line, _, handle = line_to(ReplayStore(StoreConfig(2)))
        waiting = asyncio.create_task(line.call("sample", 2, 0))
        await asyncio.sleep(0.01)
        handle.kill()
        found = await asyncio.gather(line.call("state"), waiting, return_exceptions=True)
        assert [type(error) for error in found] == [ActorDiedError, ActorDiedError]
        line.post("assign", [7], ["a"])  # The dead store's, and nobody's error.
        with pytest.raises(ActorDiedError):
            await line.call("state")

    run(scenario())


def test_a_message_has_a_deadline_and_what_waits_has_none() -> None:
    async def scenario() -> None:
        store = ReplayStore(StoreConfig(2))
        line, _, _ = line_to(store, deadline_s=0.05)
        waiting = asyncio.create_task(line.call("sample", 2, 0))
        await asyncio.sleep(0.1)
        assert not waiting.done()
        store.lengths = lambda: asyncio.sleep(3600)  # type: ignore[method-assign,assignment,return-value]
        with pytest.raises(DeadlineError, match=r"actor replay-store gave no answer in 0.05 s"):
            await line.call("lengths")
        waiting.cancel()

    run(scenario())


def test_what_reads_or_writes_files_keeps_nobody_waiting() -> None:
    async def scenario() -> None:
        store = ReplayStore(StoreConfig(2))
        line, desk, _ = line_to(store)
        written = asyncio.Event()

        async def snapshot(fetch: object) -> int:
            await written.wait()
            return 5

        store.snapshot = snapshot  # type: ignore[method-assign,assignment]
        line.post("assign", (), ())
        slow = asyncio.create_task(line.call("snapshot"))
        await asyncio.sleep(0)
        await line.call("state")
        assert not slow.done() and desk.messages == [["assign"], ["snapshot"], ["state"]]
        written.set()
        assert await slow == 5
        gone = asyncio.create_task(line.call("snapshot"))
        await asyncio.sleep(0.01)
        gone.cancel()
        await asyncio.gather(gone, return_exceptions=True)
        assert not line._open

    run(scenario())


def test_relief_comes_in_its_own_message_and_its_error_is_the_acquisitions() -> None:
    async def scenario() -> None:
        def full(_: bytes) -> bytes:
            raise OSError("no space left")

        for fetch in (bytes, full):
            store = ReplayStore(StoreConfig(1, max_staleness=3), spill=SpillSpace(0, fetch, bytes))
            line, desk, _ = line_to(store)
            await line.call("append", receipt(await line.call("acquire_slots", 1)), [b"payload"])
            acquired = asyncio.create_task(line.call("acquire_slots", 1))
            await line.call("state")
            if fetch is full:
                with pytest.raises(Exception, match="no space left"):
                    await acquired
            else:
                assert await acquired == (1,)
            assert desk.reliefs == 1

    run(scenario())
