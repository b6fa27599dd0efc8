"""Runs the real controller on shared engines: what the pipeline tests have in common."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import ray
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra

from opd_ray.actors.learner.group import LearnerGroup
from opd_ray.actors.rollout import RolloutGroup
from opd_ray.actors.store import store_config
from opd_ray.actors.teacher import TeacherGroup
from opd_ray.config import RunConfig
from opd_ray.controller import Controller, Groups
from opd_ray.data.source import PromptSource
from opd_ray.main import conf_dir, to_run_config
from opd_ray.placement import Share
from opd_ray.replay.store import ReplayStore
from opd_ray.sources import training_prompts

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
    "deadline_s=120",
]
NO_SHARE = Share(0.0, 0.0, 1)


def small_config(experiment: str, *overrides: str) -> RunConfig:
    """The named experiment with a few short trajectories a step."""
    ConfigStore.instance().store(name="run_schema", node=RunConfig)
    GlobalHydra.instance().clear()
    with initialize_config_dir(version_base="1.3", config_dir=str(conf_dir())):
        return to_run_config(compose("run", [f"+experiment={experiment}", "scale=tiny", *SMALL, *overrides]))


@dataclass
class Engines:
    """Rollout and teacher actors that several tests share, and the folder of the student's initial weights."""

    rollout: RolloutGroup
    teacher: TeacherGroup
    student_path: str


@dataclass
class RunRecord:
    """What a run told: metrics by step, and the books at its end."""

    metrics: list[Mapping[str, Any]] = field(default_factory=list)
    ledger: dict[str, int] = field(default_factory=dict)
    state: dict[str, int] = field(default_factory=dict)

    def of(self, key: str) -> list[float]:
        """A metric over the steps."""
        return [step[key] for step in self.metrics]


Hook = Callable[[Groups, Controller], Any]


def train(cfg: RunConfig, engines: Engines, before: Hook | None = None, after: Hook | None = None) -> RunRecord:
    """Train with fresh learner and store; `before` and `after` are async hooks around the training."""
    return asyncio.run(_train(cfg, engines, before, after))


async def _train(cfg: RunConfig, engines: Engines, before: Hook | None, after: Hook | None) -> RunRecord:
    record = RunRecord()
    store_class: Any = ray.remote(ReplayStore)
    store = store_class.options(num_cpus=0, max_concurrency=100).remote(store_config(cfg))
    learner = LearnerGroup.create(cfg, NO_SHARE, engines.student_path)
    groups = Groups(engines.rollout, engines.teacher, learner, store)
    source = PromptSource(training_prompts(cfg.data, cfg.seed), cfg.seed, cfg.data.epochs or None)
    controller = Controller(cfg, groups, source, [], lambda step, metrics: record.metrics.append(metrics))
    try:
        await learner.ready()
        # The engines may still hold what an earlier test trained.
        receipt, buckets = await learner.export(0)
        await engines.rollout.all(lambda engine: engine.load_weights.remote(receipt, *buckets))
        if before is not None:
            await before(groups, controller)
        await controller.train()
        if after is not None:
            await after(groups, controller)
        record.ledger = await controller.ledger()
        record.state = await store.state.remote()
    finally:
        await learner.stop()
        learner.shutdown()
        ray.kill(store)
    return record
