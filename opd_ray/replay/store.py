"""The replay store: who may roll out, what is ready, which trajectories train next, and what became of each.

An object of one event loop, in the controller's process, without Ray: it holds payload references of any type and never
looks inside one. `acquire` and `sample` wait; every other method is plain. What makes it safe: no ``await`` stands
between a check and the change that it allows; a waiter that is cancelled has changed nothing; and after `reset` what
was started before is of an older `generation` and is dropped. `staleness` explains the protocol and proves its bound.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, Literal

from opd_ray.errors import StoreClosedError, StoreError
from opd_ray.replay.admission import num_in_budget
from opd_ray.replay.batch import SampledBatch, StoredTrajectory
from opd_ray.replay.checkpoint import PAYLOAD_LOST, StoreImage, freeze, read_image, rebuild, write_image
from opd_ray.replay.checks import require, require_newer, require_once, require_whole_batch
from opd_ray.replay.payload_io import PayloadIO
from opd_ray.replay.sampling import next_batch
from opd_ray.replay.spill import SpillSpace
from opd_ray.replay.staleness import StoreConfig, num_acquirable
from opd_ray.replay.state import StoreState
from opd_ray.types import BatchMeta, Histogram

STALE = "stale"
DRAINED = "drained"


class _NotYet(Enum):
    NOT_YET = "not yet"


class ReplayStore:
    """Permits, ready trajectories, batches in training and the ledger.

    `version` is the policy version that all engines have at the start; `io` writes and reads payloads; `spill` is where
    payloads go that memory has no room for (None: nowhere); `clock` gives seconds.
    """

    def __init__(
        self,
        config: StoreConfig,
        io: PayloadIO,
        *,
        version: int = 0,
        spill: SpillSpace | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config = config
        self._io = io
        self._spill = spill
        self._clock = clock
        self._state = StoreState.fresh(config, version)
        self._drained = False
        self._closed = False
        self._changed = asyncio.Event()
        self._is_sampling = False
        self.generation = 0
        self.num_stale_completions = 0

    # ---- the two calls that wait ----------------------------------------------------------------------------

    async def acquire(self, count: int) -> tuple[int, ...]:
        """Wait for permits; returns `count` new trajectory ids, ascending. A permit is held until the last release.

        Fewer are returned (at least one) when fewer are missing: failures and evictions leave gaps smaller than a
        group, and waiting for a whole group's room would wait forever. Without them, and with groups that divide
        `trajectories_per_step`, groups are always whole; the byte budget is waited for as a whole, except when the
        learner has nothing. Raises `StoreClosedError` once the store is closed or reset, or the data have ended,
        and `StoreError` when payloads cannot be spilled.
        """
        if count < 1:
            raise StoreError(f"{count} permits were asked for: ask for at least 1")
        generation = self.generation
        while True:
            self._require_open(generation)
            if self._spill is not None and self._spill.is_needed(self._state):
                await self._relieve(self._spill)
            elif trajectory_ids := self._acquire_now(count):
                return trajectory_ids
            else:
                await self._changed.wait()

    async def sample(self, num_trajectories: int, learner_version: int) -> SampledBatch | None:
        """Wait for the batch of the optimizer step that starts from `learner_version`; its use is counted.

        The current batch again while it has uses left (smaller if members were evicted), else the next one, once
        `num_trajectories` are ready: with ``stale=wait`` the oldest, else as `order` says. None when the data have
        ended and no batch can be filled any more; the leftovers are evicted as ``drained``. Raises `StoreError` when
        the request does not fit the protocol, `StaleBatchError` when a trajectory would be used above its bound,
        `StoreClosedError` when closed or reset.
        """
        require_whole_batch(
            num_trajectories, self._config.trajectories_per_step, learner_version, self._state.schedule.version
        )
        if self._is_sampling:
            raise StoreError("a batch was asked for while another request waits: the learner samples once per step")
        generation = self.generation
        self._is_sampling = True
        try:
            while (batch := self._sample_now(learner_version, generation)) is _NotYet.NOT_YET:
                await self._changed.wait()
        finally:
            self._is_sampling = False
        return batch

    # ---- producers ------------------------------------------------------------------------------------------

    def assign(self, trajectory_ids: Sequence[int], prompt_ids: Sequence[str]) -> None:
        """Say which prompt each trajectory in flight is for, so that it can be started again (`pending`)."""
        if len(trajectory_ids) != len(prompt_ids):
            raise StoreError(
                f"assign got {len(trajectory_ids)} ids and {len(prompt_ids)} prompt ids: give one prompt id each"
            )
        require(trajectory_ids, self._state.queue.in_flight, "assign", "in flight")
        self._state.queue.in_flight.update(zip(trajectory_ids, prompt_ids, strict=True))

    def pending(self) -> dict[int, str | None]:
        """Trajectories in flight, ascending, with their prompts' ids; None where `assign` was not called.

        After `restore` each is to be started again under its id, or failed.
        """
        return dict(self._state.queue.in_flight)

    def append(self, meta: BatchMeta, ref: Any, *, generation: int | None = None) -> bool:
        """Store the scored trajectories of one payload; returns False, and stores nothing, for an older `generation`.

        Raises `LedgerError` when a trajectory is not in flight, `StoreError` on empty metadata; the store is then
        unchanged.
        """
        if self._is_stale(generation):
            return False
        trajectory_ids = [trajectory.trajectory_id for trajectory in meta.trajectories]
        if not trajectory_ids:
            raise StoreError("append got no trajectories: give at least 1")
        require(trajectory_ids, self._state.queue.in_flight, "append", "in flight")
        now_s = self._clock()
        payload_id = self._state.payloads.put(ref, meta.num_bytes, len(trajectory_ids))
        for trajectory in meta.trajectories:
            self._state.queue.complete(StoredTrajectory(trajectory, payload_id, now_s))
        self._state.payload_size.add(meta.num_bytes, len(trajectory_ids))
        self._state.ledger.store(len(trajectory_ids))
        if self._drained:
            self._state.evict(trajectory_ids, DRAINED)
        self._notify()
        return True

    def fail(self, trajectory_ids: Sequence[int], reason: str, *, generation: int | None = None) -> bool:
        """Trajectories in flight ended without a result; returns False for an older `generation`.

        Raises `LedgerError` if one is not in flight.
        """
        if self._is_stale(generation):
            return False
        require(trajectory_ids, self._state.queue.in_flight, "fail", "in flight")
        for trajectory_id in trajectory_ids:
            del self._state.queue.in_flight[trajectory_id]
        self._state.ledger.fail(len(trajectory_ids), reason)
        self._notify()
        return True

    def end_of_data(self) -> None:
        """No permit will be acquired any more: `sample` drains what is left and then returns None."""
        self._state.data_ended = True
        self._notify()

    # ---- the learner ----------------------------------------------------------------------------------------

    def release(self, trajectory_ids: Sequence[int], policy_version: int) -> None:
        """The step on `trajectory_ids` is done, `policy_version` published: retire those that had all their uses.

        Trajectories evicted since they were sampled are skipped. Raises `LedgerError` for one that is not out,
        `StoreError` for a version below the published one; the store is then unchanged.
        """
        require_newer(policy_version, self._state.schedule.version)
        require_once(trajectory_ids, "release")
        self._state.in_training.check_out(trajectory_ids)
        self._state.retire(self._state.in_training.give_back(trajectory_ids, self._config.reuse))
        self.set_version(policy_version)

    def set_version(self, policy_version: int) -> None:
        """All engines have confirmed `policy_version`; raises `StoreError` when versions decrease."""
        require_newer(policy_version, self._state.schedule.version)
        self._state.schedule.publish(policy_version)
        self._notify()

    def evict(self, trajectory_ids: Sequence[int], reason: str) -> None:
        """Drop stored trajectories, also the learner's; raises `LedgerError` if one is not in the store."""
        require(trajectory_ids, self._state.stored, "evict", "in the store")
        self._state.evict(trajectory_ids, reason)
        self._notify()

    def drop_lost(self, trajectory_ids: Sequence[int]) -> None:
        """Evict all that is in these trajectories' payloads, which were lost with a node; unknown ids are skipped."""
        stored = self._state.stored
        lost = {stored[trajectory_id].payload_id for trajectory_id in trajectory_ids if trajectory_id in stored}
        self._state.evict(self._state.in_payloads(lost), PAYLOAD_LOST)
        self._notify()

    # ---- checkpoints ----------------------------------------------------------------------------------------

    def freeze(self) -> StoreImage:
        """Return the store of this instant, for `write`; it pins the payloads."""
        return freeze(self._state, self._config, self._clock())

    async def write(self, image: StoreImage, folder: Path) -> None:
        """Write an image into `folder`, which exists; the store may change meanwhile.

        Trajectories whose payloads turn out to be lost are evicted, and are missing in `folder`. Raises
        `CheckpointError` if it cannot be written.
        """
        generation = self.generation
        lost = await write_image(image, folder, self._io, self._config)
        if lost and generation == self.generation:
            self.drop_lost(lost)

    async def restore(self, folder: Path) -> None:
        """Continue from what `write` left in `folder`.

        Trajectories that were in flight are so again, and uses that were not released are repeated. Raises
        `CheckpointError` on a folder that is missing, damaged or of another run, `StoreError` when this store was in
        use; it stays as it was.
        """
        state = rebuild(await read_image(folder, self._io), self._config, self._clock())
        if self._state.ledger.started:
            raise StoreError(f"a store that gave out {self._state.ledger.started} permits was in use: reset it first")
        self._state = state
        self._notify()

    def reset(self) -> None:
        """Forget everything; whoever waits gets `StoreClosedError`, and completions of before are dropped."""
        self._state = StoreState.fresh(self._config, 0)
        self._drained = False
        self.generation += 1
        self._notify()

    def close(self) -> None:
        """Refuse permits and batches from now on with `StoreClosedError`."""
        self._closed = True
        self._notify()

    # ---- reports --------------------------------------------------------------------------------------------

    def ledger(self) -> dict[str, int]:
        """Return the books (`Ledger.as_dict`), compared with what is here; raises `LedgerError` if they differ."""
        self._state.check()
        return self._state.ledger.as_dict()

    def counts(self) -> dict[str, int]:
        """Return fill counts: trajectories, payloads, bytes, versions, permits to be had now, and ledger/*."""
        books = {f"ledger/{name}": count for name, count in self._state.ledger.as_dict().items()}
        return self._state.counts() | {"acquirable": self._num_acquirable(1)} | books

    def lengths(self) -> dict[str, float | Histogram]:
        """Return the lengths of what was trained and what was dropped, since the start (`LengthReport.as_metrics`)."""
        return self._state.lengths.as_metrics()

    # ---- inside ---------------------------------------------------------------------------------------------

    def _notify(self) -> None:
        """Let everyone who waits look again."""
        self._changed.set()
        self._changed = asyncio.Event()

    def _require_open(self, generation: int) -> None:
        if self._closed or generation != self.generation:
            raise StoreClosedError("the replay store is closed or was reset: acquire and sample no more")

    def _is_stale(self, generation: int | None) -> bool:
        is_stale = generation is not None and generation != self.generation
        self.num_stale_completions += is_stale
        return is_stale

    def _acquire_now(self, count: int) -> tuple[int, ...]:
        if self._state.data_ended:
            raise StoreClosedError("the data have ended: acquire no permit after end_of_data()")
        acquired = min(count, self._num_acquirable(count))
        if acquired < 1:
            return ()
        self._state.ledger.start(acquired)
        return self._state.queue.give(acquired)

    async def _relieve(self, spill: SpillSpace) -> None:
        if spill.is_busy:
            await self._changed.wait()
            return
        state = self._state
        try:
            lost = await spill.relieve(state, self._io)
            state.evict(state.in_payloads(lost), PAYLOAD_LOST)
        finally:
            self._notify()

    def _num_acquirable(self, wanted: int) -> int:
        schedule, load = self._state.schedule, self._state.load
        fresh = num_acquirable(load.num_queued, schedule.next_version, schedule.version, self._config)
        return min(fresh, num_in_budget(load, self._state.payload_size, min(wanted, fresh), self._config))

    def _sample_now(self, learner_version: int, generation: int) -> SampledBatch | None | Literal[_NotYet.NOT_YET]:
        self._require_open(generation)
        if self._drained:
            return None
        schedule = self._state.schedule
        if schedule.uses_left == 0:
            schedule.anchor(learner_version)
            self._sweep(learner_version)
            self._form_batch(learner_version)
        if schedule.uses_left > 0:
            return self._use(learner_version)
        return None if self._drained else _NotYet.NOT_YET

    def _sweep(self, learner_version: int) -> None:
        stale = self._state.queue.older_than(learner_version - self._config.sweep_bound)
        if stale:
            self._state.evict(stale, STALE)
            self._notify()

    def _form_batch(self, learner_version: int) -> None:
        """Form the next batch if it is ready; drain if the data have ended and it cannot be filled."""
        queue = self._state.queue
        batch = next_batch(queue, self._config, learner_version)
        if batch:
            self._state.in_training.begin(queue.take(batch))
            self._state.schedule.uses_left = self._config.reuse
        elif self._state.data_ended and len(queue) < self._config.trajectories_per_step:
            self._drained = True
            self._state.evict([*queue.ready], DRAINED)

    def _use(self, learner_version: int) -> SampledBatch:
        if self._spill is not None:
            self._spill.recall(self._state, self._io)
        members = self._state.in_training.current_batch()
        now_s = self._clock()
        infos = tuple(member.info(learner_version, self._config.sweep_bound, now_s) for member in members)
        for member in members:
            member.num_uses += 1
        self._state.schedule.use(learner_version)
        position: dict[int, int] = {}
        rows = tuple((position.setdefault(member.payload_id, len(position)), member.meta.row) for member in members)
        self._notify()
        return SampledBatch(tuple(self._state.payloads[number].ref for number in position), rows, infos)
