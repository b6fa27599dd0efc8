"""The rollout loop: turn prompts into scored trajectories in the store, as many at a time as the store admits.

A worker that dies loses no prompt: its request goes to another one, and a new actor takes its place meanwhile.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from opd_ray.cluster.worker_group import WorkerGroup
from opd_ray.config.schema import RunConfig
from opd_ray.data.source import PromptSource
from opd_ray.errors import ActorDiedError, PayloadLostError
from opd_ray.replay.store import ReplayStore
from opd_ray.training.task_pool import TaskPool
from opd_ray.training.workload import GroupLoad
from opd_ray.types import BatchMeta, Prompt, RolloutRequest

WORKER_DIED = "worker_died"
END_OF_DATA = "end_of_data"

logger = logging.getLogger("opd_ray")


@dataclass(slots=True)
class _Attempts:
    """How often a request may still fail, in any of its stages: deaths of its workers and losses of its payload."""

    left: int


class RolloutLoop:
    """Starts a request whenever the store has room for it, and sees each through: sample, score, store."""

    def __init__(
        self,
        cfg: RunConfig,
        groups: tuple[WorkerGroup, WorkerGroup],
        store: ReplayStore,
        source: PromptSource,
        loads: Mapping[str, GroupLoad],
    ) -> None:
        self._cfg = cfg
        self._engines, self._teachers = groups
        self._store = store
        self._source = source
        self._engine_load, self._teacher_load = loads["rollout"], loads["teacher"]
        self._generation = store.generation
        self._turn = 0
        self._has_ended = False
        self.requests = TaskPool()
        # Apart from these: a worker for which no node has room is not waited for at the end.
        self.replacements = TaskPool()

    async def run(self) -> None:
        """Start requests until the prompts have ended; woken by `store.release`."""
        samples = self._cfg.rollout.samples_per_prompt
        while not self._has_ended:
            count = self._prompts_of_turn() * samples
            self._hand_out(await self._store.acquire(count))
            # While the store has room `acquire` does not wait: a step of many requests would hold up the loop.
            await asyncio.sleep(0)

    def _prompts_of_turn(self) -> int:
        """A step's prompts are split over the engines as evenly as whole prompts allow."""
        num_engines = len(self._engines.workers)
        whole, rest = divmod(self._cfg.rollout.prompts_per_step, num_engines)
        return whole + (self._turn % num_engines < rest)

    def _hand_out(self, trajectory_ids: Sequence[int]) -> None:
        """Give the next prompts to new trajectories, in order; plain, so that no checkpoint sees a part of it."""
        samples = self._cfg.rollout.samples_per_prompt
        self._turn += 1
        # The store may have room for a part of a group only, after failures.
        prompts = self._next_prompts(-(-len(trajectory_ids) // samples))
        used, unused = trajectory_ids[: len(prompts) * samples], trajectory_ids[len(prompts) * samples :]
        if used:
            request = RolloutRequest(tuple(prompts), tuple(used), samples)
            self._store.assign(used, [request.prompt_of(place).id for place in range(len(used))])
            self._start(request)
        if unused:
            self._has_ended = True
            self._store.fail(unused, END_OF_DATA)
            self._store.end_of_data()

    def _next_prompts(self, count: int) -> list[Prompt]:
        prompts: list[Prompt] = []
        for prompt in self._source:
            prompts.append(prompt)
            if len(prompts) == count:
                break
        return prompts

    def state_dict(self) -> dict[str, Any]:
        """Position in the prompts, JSON-able."""
        return {"source": self._source.state(), "turn": self._turn, "has_ended": self._has_ended}

    def load_state_dict(self, state: Mapping[str, Any], pending: Mapping[int, str | None]) -> None:
        """Take over a saved position, and start what was in flight then; raises `DataError` on other prompts.

        `pending` has the restored store's trajectories in flight with their prompts' ids; those without one had been
        acquired and come next.
        """
        self._source.restore(state["source"])
        self._turn, self._has_ended = int(state["turn"]), bool(state["has_ended"])
        by_prompt: dict[str, list[int]] = {}
        for trajectory_id, prompt_id in pending.items():
            if prompt_id is not None:
                by_prompt.setdefault(prompt_id, []).append(trajectory_id)
        for prompt_id, trajectory_ids in by_prompt.items():
            self._start(RolloutRequest((self._source.find(prompt_id),), tuple(trajectory_ids), len(trajectory_ids)))
        if new := [trajectory_id for trajectory_id, prompt_id in pending.items() if prompt_id is None]:
            self._hand_out(new)

    def _start(self, request: RolloutRequest) -> None:
        # Chosen here and not in the task, which starts later: the next request must see this one.
        engine = self._engine_load.least_loaded()
        self._engine_load.begin(engine, len(request.trajectory_ids))
        self.requests.start(self._produce(request, engine))

    async def _produce(self, request: RolloutRequest, engine: int) -> None:
        """Stages 3 to 6 of one request; again from stage 3 where the payload was lost before it was scored."""
        first: int | None = engine
        attempts = _Attempts(self._cfg.faults.max_attempts)
        while attempts.left:
            sampled = await self._attempt(
                (self._engines, self._engine_load),
                lambda worker: worker.generate.options(num_returns=2).remote(request),
                attempts,
                cost=len(request.trajectory_ids),
                first=first,
            )
            if sampled is None:
                break
            try:
                scored = await self._score(request, *sampled, attempts)
            except PayloadLostError as error:
                logger.warning("%d trajectories are sampled again: %s", len(request.trajectory_ids), error)
                attempts.left -= 1
                first = None
                continue
            if scored is None:
                break
            payload, meta = scored
            self._store.append(meta, payload, generation=self._generation)
            return
        logger.warning("%d trajectories failed: their workers died too often", len(request.trajectory_ids))
        self._store.fail(request.trajectory_ids, WORKER_DIED, generation=self._generation)

    async def _score(
        self, request: RolloutRequest, payload: Any, meta: BatchMeta, attempts: _Attempts
    ) -> tuple[Any, BatchMeta] | None:
        """Stages 4 and 5."""
        return await self._attempt(
            (self._teachers, self._teacher_load),
            lambda worker: worker.score.options(num_returns=2).remote(payload, meta, request.prompts),
            attempts,
            cost=meta.num_response_tokens,
        )

    async def _attempt(
        self,
        workers: tuple[WorkerGroup, GroupLoad],
        call: Callable[[Any], tuple[Any, Any]],
        attempts: _Attempts,
        *,
        cost: int,
        first: int | None = None,
    ) -> tuple[Any, BatchMeta] | None:
        """Payload reference and metadata of ``call(worker)``; on another worker where one dies, None without attempts.

        `first` is a worker whose load has this call already.
        """
        group, load = workers
        while attempts.left:
            if first is None:
                await load.wait_for_worker()
                worker = load.least_loaded()
                load.begin(worker, cost)
            else:
                worker, first = first, None
            handle = group.workers[worker]
            try:
                payload, meta_ref = call(handle)
                meta: BatchMeta = await group.result(meta_ref, worker)
            except ActorDiedError as error:
                attempts.left -= 1
                self._replace(group, load, worker, handle, error)
            else:
                load.done(meta.busy_s, meta.num_response_tokens)
                return payload, meta
            finally:
                load.end(worker, cost)
        return None

    def _replace(self, group: WorkerGroup, load: GroupLoad, worker: int, dead: Any, error: ActorDiedError) -> None:
        """Have a dead worker replaced while the others continue; a group that cannot be mended ends the run."""
        if not load.suspend(worker):
            return

        async def revive() -> None:
            await group.restart_worker(worker, dead, error)
            load.resume(worker)

        self.replacements.start(revive())
