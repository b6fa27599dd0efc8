"""Train variants one after the other in the shared rank processes, with batches and states that the test chooses."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
import torch

from opd_ray.config.schema import RunConfig
from opd_ray.data.packing import plan_microbatches
from opd_ray.errors import CheckpointError
from opd_ray.learner.group import LearnerWorker
from opd_ray.learner.spec import LearnerSpec, RankBatch, rank_batches
from opd_ray.learner.step_report import RankReport
from opd_ray.replay.batch import SampledBatch
from opd_ray.types import SampleInfo
from tests.integration.learners import Learners

if TYPE_CHECKING:
    from opd_ray.learner.trainer import Trainer


@dataclass(frozen=True)
class VariantStep:
    """One optimizer step: the batch of `payload` in the order of `rows`, at the learner's `policy_version`."""

    payload: Any
    rows: tuple[int, ...]
    infos: tuple[SampleInfo, ...]
    policy_version: int


@dataclass(frozen=True)
class States:
    """Folder of the state to continue from, and by number of steps the folders, which exist, to save states in.

    Those of `refused` are tried first.
    """

    load: Path | None = None
    save: Mapping[int, Path] = field(default_factory=dict)
    refused: tuple[Path, ...] = ()


@dataclass(frozen=True)
class VariantResult:
    """Reports of each step by rank, the weights after the last one, and by rank why states were refused."""

    reports: list[list[RankReport]]
    weights: dict[str, torch.Tensor]
    refusals: list[list[str]]


def _run(
    worker: LearnerWorker, spec: LearnerSpec, steps: Sequence[tuple[RankBatch, Any]], states: States
) -> tuple[list[Any], dict[str, torch.Tensor], list[str]]:
    """One rank's part of a variant, in the process of `worker`, which has met the other ranks."""
    from opd_ray.learner.trainer import Trainer
    from opd_ray.models.weights import unpack_bucket

    worker._trainer = None
    trainer = Trainer(spec)
    torch.manual_seed(spec.rank)
    refusals = [_refusal(trainer, folder) for folder in states.refused]
    if states.load is not None:
        torch.manual_seed(99)
        trainer.load_checkpoint(states.load)
    reports = []
    for number in range(len(steps) + 1):
        if number:
            torch.rand(3)
            batch, payload = steps[number - 1]
            reports.append(trainer.train_step(batch, [payload]))
        if number in states.save:
            trainer.save_checkpoint(states.save[number])
    buckets = list(trainer.export())
    weights = {name: tensor.clone() for bucket in buckets for name, tensor in unpack_bucket(bucket)}
    return reports, weights, refusals


def _refusal(trainer: Trainer, folder: Path) -> str:
    """Why the state cannot be loaded; empty if it can."""
    try:
        trainer.load_checkpoint(folder)
    except CheckpointError as error:
        return str(error)
    return ""


class VariantGroup:
    """All ranks of one size of the learner group."""

    def __init__(self, learners: Learners, cfg: RunConfig, model_path: str) -> None:
        """`cfg` says how many ranks; the model is loaded once, for the ranks to meet."""
        self._group = learners.create(cfg, model_path)
        asyncio.run(self._group.ready())

    def run(
        self,
        cfg: RunConfig,
        model_path: str,
        steps: Sequence[VariantStep],
        budget: int,
        states: States | None = None,
        dump: Path | None = None,
    ) -> VariantResult:
        """Train the variant of `cfg` with microbatches of at most `budget` padded tokens; trajectories go to `dump`."""
        # A test that killed a rank has left another one in its place.
        workers = self._group.workers
        num_ranks = len(workers)
        cfg = replace(cfg, learner=replace(cfg.learner, num_ranks=num_ranks))
        per_rank: list[list[tuple[RankBatch, Any]]] = [[] for _ in range(num_ranks)]
        for step in steps:
            infos = tuple(step.infos[row] for row in step.rows)
            lengths = [info.num_prompt_tokens + info.num_response_tokens for info in infos]
            rows = tuple((0, row) for row in step.rows)
            prompts = [(info.prompt_id, info.num_prompt_tokens) for info in infos if info.prompt_id]
            plan = plan_microbatches(lengths, num_ranks, budget, prompts)
            batch = SampledBatch((step.payload,), rows, infos)
            num_recorded = cfg.telemetry.record_trajectories if dump else 0
            parts = rank_batches(batch, plan, step.policy_version, cfg.replay.reuse, num_recorded)
            for rank, (part, _) in enumerate(parts):
                per_rank[rank].append((part, step.payload))
        calls = []
        for rank, worker in enumerate(workers):
            spec = LearnerSpec(cfg, rank, model_path, 1, str(dump or ""))
            calls.append(worker.__ray_call__.remote(_run, spec, per_rank[rank], states or States()))
        results = ray.get(calls, timeout=240)
        by_step = [list(reports) for reports in zip(*(reports for reports, *_ in results), strict=True)]
        return VariantResult(by_step, results[0][1], [refusals for *_, refusals in results])
