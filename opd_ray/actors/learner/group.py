"""Learner: DeepSpeed ranks in Ray actors that train the student.

torch, transformers and deepspeed are imported in `LearnerWorker.setup` and later only.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
import ray.util

from opd_ray.actors.group import WorkerGroup
from opd_ray.actors.learner.spec import ROLE, LearnerSpec, RankBatch
from opd_ray.actors.learner.step_report import RankReport
from opd_ray.config import RunConfig
from opd_ray.data.packing import plan_microbatches
from opd_ray.placement import Share
from opd_ray.replay.cohort import SampledBatch
from opd_ray.types import WeightsReceipt

if TYPE_CHECKING:
    from opd_ray.actors.learner.trainer import Trainer


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

    def setup(self, host: str, port: int) -> None:
        """Join the other ranks and load the student; blocks until all ranks are there."""
        spec = self._spec
        os.environ |= {
            "MASTER_ADDR": host,
            "MASTER_PORT": str(port),
            "RANK": str(spec.rank),
            "WORLD_SIZE": str(spec.num_ranks),
            "LOCAL_RANK": "0",
        }
        from opd_ray.actors.learner.trainer import Trainer

        self._trainer = Trainer(spec)

    @property
    def trainer(self) -> Trainer:
        """The trainer, after `setup`."""
        if self._trainer is None:
            raise RuntimeError(f"{self._spec.name} is not set up: call setup first")
        return self._trainer

    def train_step(self, batch: RankBatch, *payloads: Any) -> RankReport:
        """Hops 9 to 11: one optimizer step; every rank must be called."""
        return self.trainer.train_step(batch, payloads)

    def export(self, policy_version: int) -> tuple[WeightsReceipt, list[Any]] | None:
        """Hop 12: the weights as references to buckets in the object store (rank 0); every rank must be called."""
        from opd_ray.actors.weights import combined_checksum

        buckets = self.trainer.export()
        if buckets is None:
            return None
        receipt = WeightsReceipt(policy_version, combined_checksum(buckets), sum(b.data.nbytes for b in buckets))
        return receipt, [ray.put(bucket) for bucket in buckets]

    def save(self, folder: str) -> None:
        """Write the student with `save_pretrained` (rank 0); every rank must be called."""
        self.trainer.save(Path(folder))

    def stop(self) -> None:
        """Leave the process group."""
        if self._trainer is not None:
            self._trainer.close()


class LearnerGroup(WorkerGroup):
    """All ranks; a call goes to every one of them."""

    tokens_per_microbatch = 1

    @classmethod
    def create(cls, cfg: RunConfig, share: Share, path: str) -> LearnerGroup:
        """Start the ranks; returns at once (await `ready`)."""
        group = cls(ROLE, cfg.deadline_s)
        group.tokens_per_microbatch = cfg.learner.tokens_per_microbatch
        specs = [(LearnerSpec.of(cfg, rank, path, share.threads),) for rank in range(cfg.learner.num_ranks)]
        group.start(LearnerWorker, share, specs, {})
        return group

    async def ready(self) -> None:
        """Let the ranks meet and load the student."""
        host, port = await self.result(self.workers[0].address.remote(), 0)
        await self.all(lambda worker: worker.setup.remote(host, port))

    async def train_step(self, batch: SampledBatch, policy_version: int) -> list[RankReport]:
        """One optimizer step from `policy_version` on, in microbatches of at most the token budget."""
        lengths = [info.num_prompt_tokens + info.num_response_tokens for info in batch.infos]
        plan = plan_microbatches(lengths, len(self.workers), self.tokens_per_microbatch)
        refs = iter(
            worker.train_step.remote(RankBatch(microbatches, batch.rows, batch.infos, policy_version), *batch.refs)
            for worker, microbatches in zip(self.workers, plan, strict=True)
        )
        return await self.all(lambda _: next(refs))

    async def export(self, policy_version: int) -> tuple[WeightsReceipt, list[Any]]:
        """The current weights as receipt and bucket references, in the rollout engines' dtype."""
        results = await self.all(lambda worker: worker.export.remote(policy_version))
        exported: tuple[WeightsReceipt, list[Any]] = results[0]
        return exported

    async def save(self, folder: Path) -> None:
        """Write the student as a `save_pretrained` folder; `folder` appears whole or not at all."""
        await self.all(lambda worker: worker.save.remote(str(folder)))
