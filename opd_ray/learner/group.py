"""Learner: DeepSpeed ranks in Ray actors that train the student.

torch, transformers and deepspeed are imported in `LearnerWorker.setup` and later only.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
import ray.util
from ray.exceptions import ObjectLostError

from opd_ray.cluster.worker_group import MALLOC_ENV, WorkerGroup
from opd_ray.config.schema import RunConfig
from opd_ray.data.packing import plan_microbatches
from opd_ray.errors import ActorDiedError, ActorError, PayloadLostError
from opd_ray.learner.spec import ROLE, LearnerSpec, LostTrajectories, RankBatch, rank_batches
from opd_ray.learner.step_report import RankReport
from opd_ray.planning.placement import Share
from opd_ray.replay.batch import SampledBatch
from opd_ray.types import WeightsMeta

if TYPE_CHECKING:
    from opd_ray.learner.trainer import Trainer
    from opd_ray.models.weights import WeightBucket

# After the first failure, how long the other ranks are listened to.
_LAST_WORDS_S = 5.0
# A payload that was lost with its node, or one that cannot be read back from the file that it was spilled to.
_LOST = (ObjectLostError, PayloadLostError)


class LearnerWorker:
    """One data-parallel rank."""

    def __init__(self, spec: LearnerSpec) -> None:
        self._spec = spec
        self._trainer: Trainer | None = None

    def ping(self) -> str:
        """The worker's name."""
        return self._spec.name

    def address(self) -> tuple[str, int]:
        """Host address and a free port, for the ranks to meet at."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            host: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
            return host, int(probe.getsockname()[1])

    def setup(self, host: str, port: int) -> int:
        """Join the other ranks and load the student; blocks until all ranks are there.

        Returns the number of weight buckets that rank 0 exports.
        """
        spec = self._spec
        os.environ |= {
            "MASTER_ADDR": host,
            "MASTER_PORT": str(port),
            "RANK": str(spec.rank),
            "WORLD_SIZE": str(spec.cfg.learner.num_ranks),
            "LOCAL_RANK": "0",
        }
        from opd_ray.learner.trainer import Trainer

        self._trainer = Trainer(spec)
        return self._trainer.num_buckets

    def takes_trees(self) -> bool:
        """Whether a prompt is computed once for its trajectories in a microbatch; after `setup`."""
        return self.trainer.takes_trees

    @property
    def trainer(self) -> Trainer:
        """The trainer, after `setup`."""
        if self._trainer is None:
            raise RuntimeError(f"{self._spec.name} is not set up: call setup first")
        return self._trainer

    def train_step(self, batch: RankBatch, refs: Sequence[Any]) -> RankReport | LostTrajectories:
        """Stages 9 to 11: one optimizer step; every rank must be called.

        `refs` are the payloads' references in a list, which Ray leaves alone: where Ray itself fetched them, a lost one
        would end this call before it begins, and the other ranks would wait for this one in their first collective.
        Instead the ranks agree, when all have tried, whether each has what it needs; if not, nothing has changed.
        """
        payloads, lost = _fetched(refs)
        trajectory_ids = tuple(
            batch.infos[place].trajectory_id for place, (payload, _) in batch.rows.items() if payload in lost
        )
        if self.trainer.any_rank(bool(lost)):
            return LostTrajectories(trajectory_ids)
        return self.trainer.train_step(batch, payloads)

    def export(self, policy_version: int) -> tuple[WeightsMeta | WeightBucket, ...] | None:
        """Stage 12: metadata and the weights in buckets (rank 0; None elsewhere); every rank must be called.

        Call it with ``num_returns`` of one more than the buckets: each then lies in the object store as a value of its
        own, which belongs to the caller, and so outlives this process.
        """
        from opd_ray.models.weights import combined_checksum

        buckets = list(self.trainer.export())
        if self._spec.rank:
            return None
        num_bytes = sum(bucket.data.nbytes for bucket in buckets)
        return WeightsMeta(policy_version, combined_checksum(buckets), num_bytes), *buckets

    def save(self, folder: str) -> None:
        """Write the student with `save_pretrained` (rank 0); every rank must be called."""
        self.trainer.save(Path(folder))

    def save_checkpoint(self, folder: str) -> None:
        """Write what an exact resume needs into `folder`, which exists; every rank must be called."""
        self.trainer.save_checkpoint(Path(folder))

    def load_checkpoint(self, folder: str) -> None:
        """Go on from a saved state; every rank must be called."""
        self.trainer.load_checkpoint(Path(folder))

    def stop(self) -> None:
        """Leave the process group."""
        if self._trainer is not None:
            self._trainer.close()


class LearnerGroup(WorkerGroup):
    """All ranks; a call goes to every one of them."""

    tokens_per_microbatch = 1
    reuse = 1
    num_recorded = 0
    _num_buckets = 1
    _takes_trees = False

    def __init__(self, role: str, deadline_s: float, max_restarts: int = 0) -> None:
        super().__init__(role, deadline_s, max_restarts)
        # The ranks have not been told yet to forget these trajectories.
        self._lost: list[int] = []

    @classmethod
    def create(cls, cfg: RunConfig, share: Share, path: str, records_folder: str = "") -> LearnerGroup:
        """Start the ranks; returns at once (await `ready`). `records_folder` as in `LearnerSpec`."""
        group = cls(ROLE, cfg.deadline_s, cfg.faults.max_restarts)
        group.tokens_per_microbatch = cfg.learner.tokens_per_microbatch
        group.reuse = cfg.replay.reuse
        specs = [LearnerSpec(cfg, rank, path, share.threads, records_folder) for rank in range(cfg.learner.num_ranks)]
        group.num_recorded = specs[0].num_recorded
        group.start(LearnerWorker, share, [(spec,) for spec in specs], MALLOC_ENV, cfg.placement.learner)
        return group

    async def ready(self) -> None:
        """Let the ranks find room, meet and load the student; raises `ResourceError` where no node has room."""
        await self.placed()
        host, port = await self.result(self.workers[0].address.remote(), 0)
        found = await self.all(lambda worker: worker.setup.remote(host, port))
        self._num_buckets = int(found[0])
        self._takes_trees = bool(await self.result(self.workers[0].takes_trees.remote(), 0))

    async def all(self, call: Callable[[Any], Any]) -> list[Any]:
        """The results of ``call(worker)`` on every rank.

        A rank that fails takes the others down with it, and they may be heard first: of several errors the death of a
        rank is raised, else what a rank itself says, else the first rank's.
        """
        calls = [asyncio.create_task(self.result(call(worker), rank)) for rank, worker in enumerate(self.workers)]
        try:
            _, pending = await asyncio.wait(calls, return_when=asyncio.FIRST_EXCEPTION)
            if pending:
                await asyncio.wait(pending, timeout=_LAST_WORDS_S)
            errors = [error for one in calls if one.done() and (error := one.exception()) is not None]
            if errors:
                raise min(errors, key=_weight_of_cause)
            return [one.result() for one in calls]
        finally:
            for one in calls:
                one.cancel()

    async def train_step(self, batch: SampledBatch, policy_version: int) -> list[RankReport] | LostTrajectories:
        """One optimizer step from `policy_version` on, in microbatches of at most the token budget.

        When a payload was lost with its node no rank makes the step, and the answer says which trajectories are lost.
        """
        lengths = [info.num_prompt_tokens + info.num_response_tokens for info in batch.infos]
        prompts = [
            (info.prompt_id or f"trajectory {info.trajectory_id}", info.num_prompt_tokens) for info in batch.infos
        ]
        plan = plan_microbatches(
            lengths, len(self.workers), self.tokens_per_microbatch, prompts if self._takes_trees else ()
        )
        parts = rank_batches(batch, plan, policy_version, self.reuse, self.num_recorded, self._lost)
        calls = iter(
            worker.train_step.remote(part, refs) for worker, (part, refs) in zip(self.workers, parts, strict=True)
        )
        answers = await self.all(lambda _: next(calls))
        lost = [
            trajectory_id
            for answer in answers
            if isinstance(answer, LostTrajectories)
            for trajectory_id in answer.trajectory_ids
        ]
        if lost:
            self._lost += lost
            return LostTrajectories(tuple(sorted(lost)))
        self._lost = []
        return answers

    async def export(self, policy_version: int) -> tuple[WeightsMeta, list[Any]]:
        """The current weights as metadata and bucket references, in the rollout engines' dtype."""
        first, *others = self.workers
        meta, *buckets = first.export.options(num_returns=1 + self._num_buckets).remote(policy_version)
        refs = iter([meta, *(worker.export.remote(policy_version) for worker in others)])
        results = await self.all(lambda _: next(refs))
        exported: WeightsMeta = results[0]
        return exported, buckets

    async def save(self, folder: Path) -> None:
        """Write the student as a `save_pretrained` folder; `folder` appears whole or not at all."""
        await self.all(lambda worker: worker.save.remote(str(folder)))

    async def save_checkpoint(self, folder: Path) -> None:
        """Write what an exact resume needs into `folder`, which exists; raises `CheckpointError`."""
        await self.all(lambda worker: worker.save_checkpoint.remote(str(folder)))

    async def load_checkpoint(self, folder: Path) -> None:
        """Go on from a saved state; raises `CheckpointError`, then nothing has changed."""
        await self.all(lambda worker: worker.load_checkpoint.remote(str(folder)))


def _fetched(refs: Sequence[Any]) -> tuple[list[Any], set[int]]:
    """The values of references, and the numbers of those that are lost."""
    try:
        return ray.get(list(refs)), set()
    except _LOST:
        values = [_value_or_none(ref) for ref in refs]
        return values, {number for number, value in enumerate(values) if value is None}


def _value_or_none(ref: Any) -> Any:
    try:
        return ray.get(ref)
    except _LOST:
        return None


def _weight_of_cause(error: BaseException) -> int:
    if isinstance(error, ActorDiedError):
        return 0
    return 2 if isinstance(error, ActorError) else 1
