"""The group of rollout engines: all hold the weights published last, also after one of them was replaced."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Any

from opd_ray.cluster.remote_calls import remote_result
from opd_ray.cluster.worker_group import WorkerGroup, vllm_env
from opd_ray.config.choices import Template
from opd_ray.config.schema import RunConfig
from opd_ray.errors import ActorDiedError, DeadlineError, LearnerLostError, PayloadLostError, WeightSyncError
from opd_ray.evaluation.grading import Completion
from opd_ray.planning.placement import Share
from opd_ray.rollout.worker import RolloutWorker
from opd_ray.types import LoadResult, Prompt, WeightsMeta

ROLE = "rollout"

LOOK_S = 1.0
"""How often engines that answer problems are asked how far they are, seconds."""


class RolloutGroup(WorkerGroup):
    """Engines that all hold the weights published last; one that is replaced gets them before it serves."""

    def __init__(self, role: str, deadline_s: float, max_restarts: int = 0) -> None:
        super().__init__(role, deadline_s, max_restarts)
        # Kept for engines to come; the buckets belong to this process, so they outlive the learner.
        self._published: tuple[WeightsMeta, tuple[Any, ...]] | None = None

    @classmethod
    def create(cls, cfg: RunConfig, share: Share, paths: Sequence[str], role: str = ROLE) -> RolloutGroup:
        """Start one engine for each entry of `paths`; returns at once (await `ready`).

        Under another `role` than the usual one it samples from the teacher, in the teacher's dtype.
        """
        group = cls(role, cfg.deadline_s, cfg.faults.max_restarts)
        dtype = (cfg.student if role == ROLE else cfg.teacher).dtype
        args = [(cfg, f"{role}-{index}", path, dtype) for index, path in enumerate(paths)]
        env = vllm_env(share, cfg.rollout.kv_cache_gib, cfg.rollout.tensor_parallel)
        group.start(RolloutWorker, share, args, env, cfg.placement.rollout)
        return group

    async def publish(self, weights: WeightsMeta, buckets: Sequence[Any]) -> list[LoadResult]:
        """Stage 12: hand weights to all engines; returns when each that serves has confirmed version and checksum.

        One that died is replaced, and gets them before it serves. Raises `WeightSyncError` when one confirms something
        else, `LearnerLostError` when the weights are gone with the learner's node.
        """
        self._published = weights, tuple(buckets)
        loaded = await asyncio.gather(*(self._load(index) for index in range(len(self.workers))))
        return [meta for meta in loaded if meta is not None]

    async def _load(self, index: int) -> LoadResult | None:
        if index in self.unavailable:
            return None
        worker = self.workers[index]
        try:
            return await self._confirmed(worker, index)
        except LearnerLostError:
            raise
        except ActorDiedError as error:
            self.replace(index, worker, error)
        return None

    async def _confirmed(self, worker: Any, index: int) -> LoadResult:
        if self._published is None:
            raise RuntimeError("no weights were published: call publish first")
        weights, buckets = self._published
        try:
            loaded: LoadResult = await self.result(worker.load_weights.remote(weights, *buckets), index)
        except PayloadLostError as error:
            raise LearnerLostError(
                f"the weights of version {weights.policy_version} are gone with the learner's node: start again with "
                "resume=auto"
            ) from error
        if (loaded.policy_version, loaded.checksum) != (weights.policy_version, weights.checksum):
            raise WeightSyncError(
                f"{self.role}-{index} confirmed version {loaded.policy_version} with checksum {loaded.checksum}, "
                f"published was {weights.policy_version} with {weights.checksum}: start again with resume=auto"
            )
        return loaded

    async def prepare(self, worker: Any, index: int) -> None:
        """Give a new engine the weights that the others have, also where these change meanwhile."""
        has = None
        while has is not self._published:
            has = self._published
            await self._confirmed(worker, index)

    async def abandon(self) -> None:
        """Drop all running requests; an engine that died is left for `publish` to replace."""

        async def drop(worker: Any, index: int) -> None:
            try:
                await self.result(worker.abandon.remote(), index)
            except ActorDiedError:
                return

        await asyncio.gather(*(drop(worker, index) for index, worker in enumerate(self.workers)))

    async def complete(
        self,
        problems: Sequence[Prompt],
        num_samples: int,
        *,
        template: Template | None = None,
        on_progress: Callable[[int], None] | None = None,
    ) -> list[list[Completion]]:
        """Answers to all problems, which are split evenly over the engines; those of one that died go to another.

        `template` None is the engines' own. `on_progress` is told now and then how many answers have ended. There is no
        limit to the time that all answers take, but `deadline_s` to the time in which an engine decodes nothing.
        """
        size = -(-len(problems) // len(self.workers))
        ended: dict[int, int] = {}

        def tell(start: int, num_ended: int) -> None:
            ended[start] = num_ended
            if on_progress is not None:
                on_progress(sum(ended.values()))

        starts = [index * size for index in range(len(self.workers)) if index * size < len(problems)]
        parts = await asyncio.gather(
            *(
                self._complete(
                    index,
                    (tuple(problems[start : start + size]), start, num_samples, template),
                    lambda num_ended, start=start: tell(start, num_ended),  # type: ignore[misc]
                )
                for index, start in enumerate(starts)
            )
        )
        return [completions for part in parts for completions in part]

    async def _complete(
        self, first: int, request: tuple[Any, ...], tell: Callable[[int], None]
    ) -> list[list[Completion]]:
        while True:
            await self.someone_serves()
            num = len(self.workers)
            index = next(index % num for index in range(first, first + num) if index % num not in self.unavailable)
            worker = self.workers[index]
            try:
                answers: list[list[Completion]] = await self._while_it_decodes(worker, index, request, tell)
            except ActorDiedError as error:
                self.replace(index, worker, error)
            else:
                return answers

    async def _while_it_decodes(
        self, worker: Any, index: int, request: tuple[Any, ...], tell: Callable[[int], None]
    ) -> Any:
        name = f"{self.role}-{index}"
        call = asyncio.ensure_future(remote_result(worker.complete.remote(*request), name, None))
        seen, since = -1, time.monotonic()
        try:
            while not (await asyncio.wait({call}, timeout=LOOK_S))[0]:
                num_ended, num_decoded = await self.result(worker.progress.remote(), index)
                tell(num_ended)
                if num_decoded != seen:
                    seen, since = num_decoded, time.monotonic()
                elif time.monotonic() - since > self.deadline_s:
                    raise DeadlineError(
                        f"actor {name} has decoded nothing in {self.deadline_s:g} s: look at its log in the Ray "
                        "dashboard, or raise deadline_s"
                    )
            return call.result()
        finally:
            call.cancel()
