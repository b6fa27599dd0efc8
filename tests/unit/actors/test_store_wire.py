"""The socket between driver and store: real ends of it in one process, without Ray."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from opd_ray.actors.store_server import StoreServer
from opd_ray.actors.store_wire import StoreWire
from opd_ray.errors import ActorDiedError, ActorError, LedgerError, PayloadLostError, StoreError
from opd_ray.replay.desk import Call, Reply, StoreDesk
from opd_ray.replay.spill import SpillSpace
from opd_ray.replay.staleness import StoreConfig
from opd_ray.replay.store import ReplayStore
from opd_ray.replay.tickets import TicketOffice
from tests.unit.fake_actors import Handle
from tests.unit.replay.store_driver import receipt
from tests.unit.scenario import run


class Line:
    """A wire to a server of payloads that are `Ref`s; `killed` has what the wire killed."""

    def __init__(self, config: StoreConfig, spill_bytes: int = 0) -> None:
        def desk(office: TicketOffice) -> StoreDesk:
            spill = SpillSpace(spill_bytes, office.data, office.make) if spill_bytes else None
            self.store = ReplayStore(config, spill=spill)
            return StoreDesk(self.store, office.data, office.make)

        self.server = StoreServer(desk, fetch, lambda data: Ref(bytes(data)))
        self.handle = Handle(self.server, "replay-store")
        self.killed: list[Any] = []
        self.wire = StoreWire(self.handle, "replay-store", self.killed.append)
        self._count = 0

    async def do(self, *calls: tuple[Any, ...]) -> list[Any]:
        """The answers' values; raises the first error."""
        made = [Call(self._count + place, str(method), args) for place, (method, *args) in enumerate(calls)]  # type: ignore[arg-type]
        self._count += len(made)
        return values(await self.wire.do(made))

    async def cut(self) -> None:
        """The server's end of the connection goes."""
        await self.do(("state",))
        assert self.server._writer is not None
        self.server._writer.close()


class Ref:
    """A reference that comes to its own bytes unless it `is_lost`."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.is_lost = False


def fetch(ref: Ref) -> bytes:
    if ref.is_lost:
        raise PayloadLostError("a payload is gone with a node: have it made again")
    return ref.data


def values(reply: Reply) -> list[Any]:
    for answer in reply.answers:
        if answer.error is not None:
            raise answer.error
    return [answer.value for answer in reply.answers]


def on_a_line(config: StoreConfig, test: Callable[[Line], Awaitable[None]], spill_bytes: int = 0) -> None:
    async def scenario() -> None:
        line = Line(config, spill_bytes)
        await test(line)
        line.wire.close()
        assert line.handle in line.killed

    run(scenario())


async def store_one(line: Line, data: bytes) -> tuple[int, Ref]:
    ((slot,),) = await line.do(("acquire_slots", 1))
    ref = Ref(data)
    await line.do(("append", receipt([slot]), [ref]))
    return slot, ref


def test_payload_references_stay_with_the_driver_as_long_as_the_store_needs_them() -> None:
    async def test(line: Line) -> None:
        slot, ref = await store_one(line, b"payload")
        assert line.wire.num_payloads == 1
        (batch,) = await line.do(("sample", 1, 0))
        assert batch.refs == (ref,) and batch.slots == (slot,)
        await line.do(("release", batch.slots, 1))
        await line.do(("state",))
        assert line.wire.num_payloads == 0

    on_a_line(StoreConfig(1), test)


def test_messages_arrive_in_the_order_in_which_they_were_handed_over() -> None:
    async def test(line: Line) -> None:
        messages = [line.do(("acquire_slots", 1)) for _ in range(5)]
        slots = await asyncio.gather(*messages)
        assert slots == [[(slot,)] for slot in range(5)]

    on_a_line(StoreConfig(5), test)


def test_an_opd_error_is_its_calls_and_any_other_is_the_actors_failure() -> None:
    async def test(line: Line) -> None:
        with pytest.raises(LedgerError, match="in flight"):
            await line.do(("append", receipt([7]), [Ref(b"")]))
        with pytest.raises(ActorError, match=r"replay-store failed with AttributeError: .*no_such.*start again"):
            await line.do(("no_such",))
        # Both go on; the refused payload is not kept.
        await line.do(("state",))
        assert line.wire.num_payloads == 0

    on_a_line(StoreConfig(1), test)


def test_a_snapshot_borrows_what_it_writes_and_a_restored_store_owns_what_it_read(tmp_path: Path) -> None:
    async def write(line: Line) -> None:
        for number in range(3):
            await store_one(line, b"payload %d" % number)
        await line.do(("snapshot", tmp_path / "shot"))

    async def read(line: Line) -> None:
        await line.do(("restore", tmp_path / "shot"))
        assert line.wire.num_payloads == 0
        (batch,) = await line.do(("sample", 3, 0))
        assert [ref.data for ref in batch.refs] == [b"payload 0", b"payload 1", b"payload 2"]
        await line.do(("release", batch.slots, 1))
        await line.do(("state",))
        assert line.wire.num_payloads == 0 and not line.server._office._refs

    on_a_line(StoreConfig(3), write)
    on_a_line(StoreConfig(3), read)


def test_a_snapshot_is_written_without_what_is_lost(tmp_path: Path) -> None:
    async def test(line: Line) -> None:
        refs = [(await store_one(line, b"%d" % number))[1] for number in range(3)]
        refs[1].is_lost = True
        await line.do(("snapshot", tmp_path / "shot"))
        (state,) = await line.do(("state",))
        assert state["ledger/evicted/payload_lost"] == 1 and line.wire.num_payloads == 2

    on_a_line(StoreConfig(3), test)


def test_spilled_payloads_leave_the_driver_and_come_back_from_files() -> None:
    async def test(line: Line) -> None:
        (slots,) = await line.do(("acquire_slots", 3))
        for slot in slots:
            await line.do(("append", receipt([slot]), [Ref(b"payload %d" % slot)]))
        await line.wire.relieve()
        await line.do(("state",))
        assert line.wire.num_payloads == 0
        (batch,) = await line.do(("sample", 3, 0))
        assert [ref.data for ref in batch.refs] == [b"payload 0", b"payload 1", b"payload 2"]

    on_a_line(StoreConfig(3), test, spill_bytes=1)


def test_a_death_ends_all_that_wait_and_all_that_comes_later() -> None:
    async def test(line: Line) -> None:
        await line.cut()
        waiting = asyncio.ensure_future(line.do(("state",)))
        line.handle.kill()
        for message in (waiting, line.do(("state",))):
            with pytest.raises(ActorDiedError, match=r"replay-store died \(killed\): start again"):
                await message
        assert line.wire.num_payloads == 0

    on_a_line(StoreConfig(1), test)


def test_an_actor_whose_connection_broke_is_ended() -> None:
    async def test(line: Line) -> None:
        await line.cut()
        with pytest.raises(ActorDiedError, match="cannot be reached"):
            await line.do(("state",))
        assert line.killed == [line.handle]

    on_a_line(StoreConfig(1), test)


def test_the_socket_is_its_users_alone_and_gone_once_the_driver_has_come() -> None:
    async def test(line: Line) -> None:
        path = Path(await line.server.listen())
        assert path.parent.stat().st_mode & 0o777 == 0o700
        reader, writer = await asyncio.open_unix_connection(path)
        while path.parent.exists():
            await asyncio.sleep(0.01)
        writer.close()

    on_a_line(StoreConfig(1), test)


def test_a_folder_whose_path_is_too_long_for_a_socket_is_one_clear_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = tmp_path / ("x" * 120)
    long.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(long))

    async def test(line: Line) -> None:
        with pytest.raises(StoreError, match="set TMPDIR to a short path"):
            await line.do(("state",))
        assert os.listdir(long) == []

    on_a_line(StoreConfig(1), test)


def test_a_lent_reference_that_nobody_needs_any_more_is_let_go() -> None:
    asked: list[int] = []
    office = TicketOffice(lambda ref: ref, lambda data: data, asked.append)

    async def scenario() -> Sequence[Any]:
        first, second = office.issue(0), office.issue(1)
        both = asyncio.gather(office.data(second), office.data(second))
        await asyncio.sleep(0)
        assert asked == [1]
        del first
        office.lend(0, "nobody's")
        office.lend(1, "ref")
        return await both

    found: list[Any] = []

    async def keep() -> None:
        found.extend(await scenario())

    run(keep())
    assert found == ["ref", "ref"]
    assert office.take_dropped() == (0, 1) and office.take_dropped() == () and not office._refs
