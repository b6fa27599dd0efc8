"""The replay store as a Ray actor, and the driver's side of it: what its calls mean, and a new store where one died."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import ObjectLostError

from opd_ray.actors.store_line import FarDesk, StoreLine
from opd_ray.actors.store_server import StoreServer
from opd_ray.actors.store_wire import StoreWire
from opd_ray.cluster.placement import near_driver
from opd_ray.cluster.remote_calls import start_named
from opd_ray.config.schema import RunConfig
from opd_ray.errors import ActorDiedError, PayloadLostError
from opd_ray.replay.cohort import SampledBatch
from opd_ray.replay.desk import StoreDesk
from opd_ray.replay.journal import SlotJournal
from opd_ray.replay.spill import SpillSpace, settled
from opd_ray.replay.staleness import StoreConfig
from opd_ray.replay.store import ReplayStore
from opd_ray.replay.tickets import TicketOffice
from opd_ray.types import BatchReceipt, Histogram

NAME = "replay-store"

logger = logging.getLogger(__name__)


def store_config(cfg: RunConfig) -> StoreConfig:
    """What the store is told of a run."""
    replay = cfg.replay
    return StoreConfig(
        trajectories_per_step=cfg.trajectories_per_step,
        reuse=replay.reuse,
        max_staleness=replay.max_staleness,
        final_version=cfg.num_steps,
        order=replay.order,
        stale=replay.stale,
        hard_staleness=replay.hard_staleness,
        max_bytes=replay.max_bytes,
        seed=cfg.seed,
    )


class ReplayStoreActor(StoreServer):
    """The server of a store, as a Ray actor."""

    def __init__(self, config: StoreConfig, spill_bytes: int) -> None:
        def desk(office: TicketOffice) -> StoreDesk:
            spill = SpillSpace(spill_bytes, office.data, office.make) if spill_bytes else None
            return StoreDesk(ReplayStore(config, spill=spill), office.data, office.make)

        # References can be awaited; what comes back from a file is the store's own, so it outlives whoever made it.
        super().__init__(desk, payload_bytes, ray.put)


def start_store(cfg: RunConfig) -> StoreWire:
    """Start the store of a run."""
    store_class: Any = ray.remote(ReplayStoreActor)
    options = {"num_cpus": 0, "max_concurrency": 1000, "scheduling_strategy": near_driver()}
    handle = start_named(store_class, NAME, options, (store_config(cfg), cfg.replay.spill_bytes))
    return StoreWire(handle, NAME, ray.kill)


async def payload_bytes(ref: Any) -> Any:
    """The payload of a reference, in the store's process; raises `PayloadLostError` when it is gone with a node."""
    try:
        return await settled(ref)
    except ObjectLostError as error:
        raise PayloadLostError(f"a payload is gone with a node ({type(error).__name__}): have it made again") from error


class StoreClient:
    """The replay store of a run, called from the driver.

    When the store dies, a new one goes on from the last committed snapshot and from what was written down here since
    (`replay.journal`), and the call that met the death is made again; at most `faults.max_restarts` times in a run.
    `start` starts a store, and gives its desk.
    """

    def __init__(self, cfg: RunConfig, start: Callable[[RunConfig], FarDesk] = start_store) -> None:
        self._cfg = cfg
        self._start = start
        self._line = self._connect()
        self._mending = asyncio.Lock()
        self._journal = SlotJournal()
        self._snapshot: Path | None = None
        self._uncommitted: tuple[int, int] | None = None
        self._learner_version = 0
        self._dead: StoreLine | None = None
        self.num_restarts = 0
        # Awaited before a new store takes over: all engines must have the learner's weights then.
        self.before_going_on: Callable[[], Awaitable[None]] = _nothing_to_do

    async def acquire_slots(self, num_slots: int) -> tuple[int, ...]:
        """Wait for room for work; see `ReplayStore.acquire_slots`."""
        slots: tuple[int, ...] = await self._call("acquire_slots", num_slots)
        self._journal.acquired(slots)
        return slots

    def assign(self, slots: Sequence[int], prompt_ids: Sequence[str]) -> None:
        """Say which prompt each slot is for; the store learns of it with the next call, which comes first anyway."""
        self._line.post("assign", slots, prompt_ids)
        self._journal.assigned(slots, prompt_ids)

    async def append(self, receipt: BatchReceipt, payload: Any) -> None:
        """Hand over scored trajectories."""
        slots = [trajectory.slot for trajectory in receipt.trajectories]
        # What `sample` gave out meanwhile has landed, whatever became of this answer.
        await self._call("append", receipt, [payload], again=lambda: slots[0] in self._journal.in_flight)
        self._journal.landed(slots)

    async def fail(self, slots: Sequence[int], reason: str) -> None:
        """Slots ended without a trajectory."""
        await self._call("fail", slots, reason)
        self._journal.failed(slots, reason)

    async def end_of_data(self) -> None:
        """No slot will be acquired any more."""
        await self._call("end_of_data")
        self._journal.data_ended()

    async def sample(self, policy_version: int) -> SampledBatch | None:
        """Wait for the batch of the step that starts from `policy_version`; None when the data have ended."""
        batch: SampledBatch | None = await self._call("sample", self._cfg.trajectories_per_step, policy_version)
        if batch is not None:
            self._journal.sampled(batch.slots)
        return batch

    def stepped(self, batch: SampledBatch) -> None:
        """The learner has made its optimizer step on `batch`, or what was left of it, whatever becomes of the store."""
        visits = max(info.visits for info in batch.infos)
        self._journal.stepped(batch.slots, visits >= self._cfg.replay.reuse)
        self._learner_version += 1

    async def release(self, slots: Sequence[int], policy_version: int) -> None:
        """Give a batch back; the engines have `policy_version`, or do not sample before they do."""
        await self._call("release", slots, policy_version)
        self._journal.released(slots)

    async def release_into(self, folder: Path, slots: Sequence[int], policy_version: int) -> None:
        """`release`, with a snapshot of that instant in `folder`."""
        num_slots = None
        while num_slots is None:
            # A store that died over it comes back with other slots, from the mark before.
            mark = self._journal.mark()
            num_slots = await self._call("release_and_snapshot", slots, policy_version, folder, again=lambda: False)
        self._journal.released(slots)
        self._uncommitted = (mark, num_slots)

    def snapshot_committed(self, folder: Path) -> None:
        """The last snapshot is safe in `folder`: a new store goes on from there."""
        if self._uncommitted is not None:
            self._journal.snapshot_taken(*self._uncommitted)
            self._snapshot, self._uncommitted = folder, None

    async def lose(self, slots: Sequence[int]) -> None:
        """The payloads of `slots` are gone with a node: these, and what else lies in them, are trained on no more."""
        # A store that takes over meanwhile has none of the learner's batch.
        await self._call("lose", slots, again=lambda: False)

    async def give_up(self, batch: SampledBatch, policy_version: int) -> None:
        """Give back a batch of which nothing is left; the learner stays at `policy_version`, which the engines have."""
        self._journal.stepped((), is_last_visit=False)
        await self.release(batch.slots, policy_version)

    async def state(self) -> dict[str, int]:
        """See `ReplayStore.state`."""
        state: dict[str, int] = await self._call("state")
        return state

    async def lengths(self) -> dict[str, float | Histogram]:
        """See `ReplayStore.lengths`."""
        lengths: dict[str, float | Histogram] = await self._call("lengths")
        return lengths

    async def ledger(self) -> dict[str, int]:
        """See `ReplayStore.ledger`."""
        books: dict[str, int] = await self._call("ledger")
        return books

    async def restore(self, folder: Path, policy_version: int) -> dict[int, str | None]:
        """Go on from a snapshot in a store that was not used; returns the slots in flight with their prompts' ids."""
        num_given = await self._call("restore", folder)
        pending: dict[int, str | None] = await self._call("pending")
        self._journal = SlotJournal(num_given, pending)
        self._snapshot = folder
        self._learner_version = policy_version
        return pending

    def start_again(self) -> None:
        """End the store, and start an empty one that knows of nothing."""
        self._line.desk.close()
        self._line = self._connect()
        self._journal = SlotJournal()
        self._snapshot = self._uncommitted = None
        self._learner_version = 0

    def shutdown(self) -> None:
        """End the store."""
        self._line.desk.close()

    def _connect(self) -> StoreLine:
        return StoreLine(self._start(self._cfg), NAME, self._cfg.deadline_s)

    async def _call(self, method: str, *args: Any, again: Callable[[], bool] = lambda: True) -> Any:
        """A call's result; where the store died over it, that of the new store, or None if not `again`."""
        while True:
            line = self._line
            try:
                answer = await line.call(method, *args)
                if line is self._line and line is not self._dead:
                    return answer
                # What the dead store said last is not in the books of the new one.
                error = ActorDiedError(f"actor {NAME} died: start again")
            except ActorDiedError as died:
                error = died
            await self._mend(line, error)
            if not again():
                return None

    async def _mend(self, dead: StoreLine, error: ActorDiedError) -> None:
        async with self._mending:
            if self._line is not dead:
                return
            self._dead = dead
            while True:
                self._count_restart(error)
                line = self._connect()
                try:
                    await self.before_going_on()
                    death = await self._recover(line)
                except BaseException:
                    line.desk.close()
                    raise
                if death is None:
                    self._line = line
                    return
                error = death

    async def _recover(self, line: StoreLine) -> ActorDiedError | None:
        """Tell a new store of what went before; its death if it died over that."""
        since = self._journal.since(self._learner_version, self._learner_version)
        try:
            await line.call("recover", since, self._snapshot)
        except ActorDiedError as error:
            return error
        # What was assigned meanwhile went to the dead store.
        assigned = {
            slot: prompt_id
            for slot, prompt_id in self._journal.in_flight.items()
            if prompt_id is not None and since.in_flight.get(slot) is None
        }
        if assigned:
            line.post("assign", list(assigned), list(assigned.values()))
        return None

    def _count_restart(self, error: ActorDiedError) -> None:
        limit = self._cfg.faults.max_restarts
        if self.num_restarts >= limit:
            raise ActorDiedError(
                f"{error}; it was replaced {self.num_restarts} times before, faults.max_restarts={limit}: mend the "
                "cause, then start again with resume=auto"
            ) from error
        self.num_restarts += 1
        logger.warning("%s; a new store goes on from %s", error, self._snapshot or "what is known here")


async def _nothing_to_do() -> None:
    return
