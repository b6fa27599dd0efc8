"""Runs the real controller on shared engines: what the pipeline tests have in common."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra

from opd_ray.cluster.payload_tasks import RayPayloads
from opd_ray.config.schema import RunConfig
from opd_ray.data.source import PromptSource
from opd_ray.main import conf_dir, to_run_config
from opd_ray.replay.batch import SampledBatch
from opd_ray.replay.spill import SpillSpace
from opd_ray.replay.staleness import StoreConfig
from opd_ray.replay.store import ReplayStore
from opd_ray.rollout.group import RolloutGroup
from opd_ray.run.checkpoint import Checkpoint, Checkpoints
from opd_ray.teacher.worker import TeacherGroup
from opd_ray.training.controller import Controller, Groups, Outputs
from opd_ray.training.sources import training_prompts
from tests.integration.learners import Learners

SMALL = [
    "num_steps=2",
    "rollout.prompts_per_step=2",
    "rollout.samples_per_prompt=4",
    "rollout.max_response_tokens=96",
    "learner.num_ranks=1",
    "rollout.num_engines=1",
    "learner.lr=1e-2",
    "learner.warmup_steps=0",
    "learner.lr_schedule=constant",
    "teacher.top_k=4",
    "gate.block_size=16",
    "deadline_s=240",
]


def small_config(experiment: str, *overrides: str) -> RunConfig:
    """The named experiment with a few short trajectories a step."""
    return copy.deepcopy(_small_config(experiment, *overrides))


@cache
def _small_config(experiment: str, *overrides: str) -> RunConfig:
    ConfigStore.instance().store(name="run_schema", node=RunConfig)
    GlobalHydra.instance().clear()
    with initialize_config_dir(version_base="1.3", config_dir=str(conf_dir())):
        return to_run_config(compose("run", [f"+experiment={experiment}", "scale=tiny", *SMALL, *overrides]))


@dataclass
class Engines:
    """Actors that several tests share, and the folder of the student's initial weights."""

    rollout: RolloutGroup
    teacher: TeacherGroup
    student_path: str
    learners: Learners


@dataclass
class RunRecord:
    """What a run told: metrics by step, and the books at its end."""

    metrics: list[Mapping[str, Any]] = field(default_factory=list)
    trajectory_ids: list[tuple[int, ...]] = field(default_factory=list)
    seen: list[SampledBatch] = field(default_factory=list)
    ledger: dict[str, int] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def step_done(self, step: int, batch: SampledBatch, metrics: Mapping[str, Any]) -> None:
        """Take in a step."""
        self.metrics.append({"step": step, **metrics})
        self.trajectory_ids.append(batch.trajectory_ids)
        self.seen.append(batch)

    def roll_back_to(self, checkpoint: Checkpoint | None) -> int:
        """Forget the steps after a checkpoint; returns how many."""
        version = checkpoint.policy_version if checkpoint else 0
        num_dropped = len(self.trajectory_ids) - version
        self.metrics = [step for step in self.metrics if step["step"] <= version]
        del self.trajectory_ids[len(self.metrics) :]
        return num_dropped

    def of(self, key: str) -> list[float]:
        """A metric over the steps."""
        return [step[key] for step in self.metrics]


def spill_space(cfg: RunConfig, folder: Path | None) -> SpillSpace | None:
    """Where payloads are spilled to, if the run spills."""
    return SpillSpace(cfg.replay.spill_bytes, folder / "spill") if folder and cfg.replay.spill_bytes else None


Hook = Callable[[Groups, Controller], Any]


def train(
    cfg: RunConfig,
    engines: Engines,
    before: Hook | None = None,
    after: Hook | None = None,
    *,
    folder: Path | None = None,
    checkpoint: Checkpoint | None = None,
    during: Hook | None = None,
    seen: list[SampledBatch] | None = None,
) -> RunRecord:
    """Train a fresh student; `before` and `after` are async hooks around the training, `during` beside it.

    Checkpoints go to `folder`, if there is one; `seen` takes in the batches of all steps, as they come.
    """
    record = RunRecord(seen=[] if seen is None else seen)
    asyncio.run(_train(cfg, engines, (before, during, after), folder, checkpoint, record))
    return record


async def _train(
    cfg: RunConfig,
    engines: Engines,
    hooks: tuple[Hook | None, Hook | None, Hook | None],
    folder: Path | None,
    checkpoint: Checkpoint | None,
    record: RunRecord,
) -> None:
    before, during, after = hooks
    learner = engines.learners.create(cfg, engines.student_path)
    store = ReplayStore(StoreConfig.of(cfg), RayPayloads(cfg.deadline_s), spill=spill_space(cfg, folder))
    groups = Groups(engines.rollout, engines.teacher, learner, store)
    source = PromptSource(training_prompts(cfg.data, cfg.seed), cfg.seed, cfg.data.epochs or None)
    every = cfg.checkpoint.every if folder else 0
    checkpoints = Checkpoints(folder or Path("none"), every, cfg.checkpoint.keep, {}, dict)
    outputs = Outputs(record.step_done, record.roll_back_to, checkpoints)
    controller = Controller(cfg, groups, source, [], outputs)
    try:
        await learner.ready()
        if before is not None:
            # The engines may still hold what an earlier test trained.
            await engines.rollout.publish(*await learner.export(0))
            await before(groups, controller)
        beside = asyncio.create_task(during(groups, controller)) if during is not None else None
        await controller.train(checkpoint)
        if beside is not None:
            await beside
        if after is not None:
            await after(groups, controller)
        record.ledger = controller.ledger()
        record.counts = store.counts()
    finally:
        await asyncio.gather(learner.stop(), return_exceptions=True)
        learner.shutdown()
