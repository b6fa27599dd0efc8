"""The rollout engines as a group: who has which weights, also after one of them was replaced."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from opd_ray.actors.group import WorkerGroup
from opd_ray.errors import ActorDiedError, WeightSyncError
from opd_ray.evaluation.scoring import Completion
from opd_ray.types import LoadReceipt, Prompt, WeightsReceipt


class EngineGroup(WorkerGroup):
    """Engines that all hold the weights published last; one that is replaced gets them before it serves."""

    def __init__(self, role: str, deadline_s: float, max_restarts: int = 0) -> None:
        super().__init__(role, deadline_s, max_restarts)
        # Kept for engines to come; the buckets belong to this process, so they outlive the learner.
        self._published: tuple[WeightsReceipt, tuple[Any, ...]] | None = None

    async def publish(self, weights: WeightsReceipt, buckets: Sequence[Any]) -> list[LoadReceipt]:
        """Hop 12: hand weights to all engines; returns when each has confirmed version and checksum.

        An engine that died is replaced. Raises `WeightSyncError` when one confirms something else.
        """
        self._published = weights, tuple(buckets)
        return list(await asyncio.gather(*(self._load(index) for index in range(len(self.workers)))))

    async def _load(self, index: int) -> LoadReceipt:
        while True:
            async with self.lock(index):
                worker = self.workers[index]
                try:
                    return await self._confirmed(worker, index)
                except ActorDiedError as error:
                    died = error
            await self.revive(index, worker, died)

    async def _confirmed(self, worker: Any, index: int) -> LoadReceipt:
        if self._published is None:
            raise RuntimeError("no weights were published: call publish first")
        weights, buckets = self._published
        loaded: LoadReceipt = await self.result(worker.load_weights.remote(weights, *buckets), index)
        if (loaded.policy_version, loaded.checksum) != (weights.policy_version, weights.checksum):
            raise WeightSyncError(
                f"{self.role}-{index} confirmed version {loaded.policy_version} with checksum {loaded.checksum}, "
                f"published was {weights.policy_version} with {weights.checksum}: start again with resume=auto"
            )
        return loaded

    async def prepare(self, worker: Any, index: int) -> None:
        """Give a new engine the weights that the others have."""
        if self._published is not None:
            await self._confirmed(worker, index)

    async def abandon(self) -> None:
        """Drop all running requests; an engine that died is left for `publish` to replace."""

        async def drop(worker: Any, index: int) -> None:
            try:
                await self.result(worker.abandon.remote(), index)
            except ActorDiedError:
                return

        await asyncio.gather(*(drop(worker, index) for index, worker in enumerate(self.workers)))

    async def complete(self, problems: Sequence[Prompt], num_samples: int) -> list[list[Completion]]:
        """Answers to all problems, which are split evenly over the engines; one that died is replaced, and asked."""
        size = -(-len(problems) // len(self.workers))
        starts = [index * size for index in range(len(self.workers)) if index * size < len(problems)]
        parts = await asyncio.gather(
            *(
                self._complete(index, tuple(problems[start : start + size]), start, num_samples)
                for index, start in enumerate(starts)
            )
        )
        return [completions for part in parts for completions in part]

    async def _complete(
        self, index: int, problems: tuple[Prompt, ...], start: int, num_samples: int
    ) -> list[list[Completion]]:
        while True:
            worker = self.workers[index]
            try:
                answers: list[list[Completion]] = await self.result(
                    worker.complete.remote(problems, start, num_samples), index
                )
            except ActorDiedError as error:
                await self.revive(index, worker, error)
            else:
                return answers
