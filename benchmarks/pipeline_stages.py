"""Part `stages` of `bench_pipeline`: the real controller, groups and store around Ray actors that only sleep.

An engine, a teacher and a learner take the same fixed time for a step's trajectories, and each works on one batch at a
time, so the slowest stage's time is that of any of them: what a step takes longer is the system's own.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import ray

from benchmarks.machine import check
from benchmarks.pipeline_runs import quartiles
from opd_ray.cluster.payload_tasks import RayPayloads
from opd_ray.cluster.worker_group import WorkerGroup
from opd_ray.config.schema import RunConfig
from opd_ray.data.source import PromptSource
from opd_ray.learner.group import LearnerGroup
from opd_ray.learner.spec import RankBatch
from opd_ray.learner.step_report import RankReport
from opd_ray.models.weights import WeightBucket
from opd_ray.planning.placement import Share
from opd_ray.replay.batch import SampledBatch
from opd_ray.replay.staleness import StoreConfig
from opd_ray.replay.store import ReplayStore
from opd_ray.rollout.group import RolloutGroup
from opd_ray.run.checkpoint import Checkpoints
from opd_ray.teacher.worker import TeacherGroup
from opd_ray.training.controller import Controller, Groups, Outputs
from opd_ray.types import BatchMeta, LoadResult, Prompt, RolloutRequest, TrajectoryMeta, WeightsMeta

NUM_STAGES = 3
TARGET = "<= 1.1"
SHARE = Share(0.0, 0.0, 1)


@dataclass(frozen=True, slots=True)
class StageWork:
    """Seconds that a stage takes for a step's trajectories, and the size of what passes."""

    stage_s: float = 0.5
    prompts: int = 8
    samples: int = 4
    response_tokens: int = 256
    payload_bytes: int = 2**20
    weight_bytes: int = 2**21

    @property
    def trajectories(self) -> int:
        """Trajectories of a step."""
        return self.prompts * self.samples

    def seconds(self, num_trajectories: int) -> float:
        """What a stage takes for so many."""
        return self.stage_s * num_trajectories / self.trajectories


class SleepingEngine:
    """Samples one request at a time; new weights do not wait for it, as with an engine that decodes."""

    def __init__(self, name: str, work: StageWork) -> None:
        self._name = name
        self._work = work
        self._version = 0
        self._at_work = asyncio.Lock()

    async def ping(self) -> str:
        """The worker's name."""
        return self._name

    async def generate(self, request: RolloutRequest) -> tuple[Any, BatchMeta]:
        """Sleep, then a payload of zeros."""
        work = self._work
        async with self._at_work:
            begun, oldest = time.monotonic(), self._version
            await asyncio.sleep(work.seconds(len(request.trajectory_ids)))
        rows = tuple(
            TrajectoryMeta(
                trajectory_id, request.prompt_of(row).id, row, 8, work.response_tokens, oldest, self._version, "stop"
            )
            for row, trajectory_id in enumerate(request.trajectory_ids)
        )
        payload = np.zeros(work.payload_bytes * len(rows) // work.trajectories, dtype=np.uint8)
        return payload, BatchMeta(rows, self._name, time.monotonic() - begun, payload.nbytes)

    async def load_weights(self, published: WeightsMeta, *buckets: WeightBucket) -> LoadResult:
        """At once."""
        self._version = published.policy_version
        num_bytes = sum(bucket.data.nbytes for bucket in buckets)
        return LoadResult(self._name, self._version, published.checksum, num_bytes, 0.0)

    async def stop(self) -> None:
        """Nothing to stop."""


class SleepingTeacher:
    """Scores one payload at a time."""

    def __init__(self, name: str, work: StageWork) -> None:
        self._name = name
        self._work = work

    def ping(self) -> str:
        """The worker's name."""
        return self._name

    def score(self, payload: Any, meta: BatchMeta, prompts: Sequence[Prompt]) -> tuple[Any, BatchMeta]:
        """Sleep, then the payload again."""
        begun = time.monotonic()
        time.sleep(self._work.seconds(len(meta.trajectories)))
        return payload.copy(), BatchMeta(meta.trajectories, self._name, time.monotonic() - begun, payload.nbytes)

    def stop(self) -> None:
        """Nothing to stop."""


class SleepingLearner:
    """One rank."""

    def __init__(self, work: StageWork) -> None:
        self._work = work

    def address(self) -> tuple[str, int]:
        """There is no one to meet."""
        return "", 0

    def setup(self, host: str, port: int) -> int:
        """The number of weight buckets."""
        return 1

    def takes_trees(self) -> bool:
        """Nothing is computed."""
        return False

    def train_step(self, batch: RankBatch, refs: Sequence[Any]) -> RankReport:
        """Fetch the payloads, and sleep."""
        ray.get(list(refs))
        time.sleep(self._work.seconds(len(batch.rows)))
        num_tokens = sum(info.num_response_tokens for info in batch.infos.values())
        return RankReport(loss_sum=1.0, weight_sum=1.0, divisor=1.0, num_tokens=num_tokens, grad_norm=1.0)

    def export(self, policy_version: int) -> tuple[WeightsMeta, WeightBucket]:
        """Weights of zeros."""
        data = np.zeros(self._work.weight_bytes, dtype=np.uint8)
        return WeightsMeta(policy_version, f"{policy_version}", data.nbytes), WeightBucket((), data)

    def stop(self) -> None:
        """Nothing to stop."""


@dataclass(slots=True)
class StepLog:
    """Metrics of every step, with the clock at its end."""

    rows: list[dict[str, Any]] = field(default_factory=list)

    def add(self, step: int, batch: SampledBatch, metrics: Mapping[str, Any]) -> None:
        """Take in a step."""
        self.rows.append({**metrics, "clock": time.monotonic()})


@dataclass(slots=True)
class Stages:
    """The actors; runs use them one after the other."""

    rollout: RolloutGroup
    teacher: TeacherGroup
    learner: LearnerGroup

    @classmethod
    def create(cls, work: StageWork, deadline_s: float) -> Stages:
        """Start one actor of each kind."""
        rollout = RolloutGroup("rollout", deadline_s)
        rollout.start(SleepingEngine, SHARE, [("rollout-0", work)], {})
        teacher = TeacherGroup("teacher", deadline_s)
        teacher.start(SleepingTeacher, SHARE, [("teacher-0", work)], {})
        learner = LearnerGroup("learner", deadline_s)
        learner.tokens_per_microbatch = work.trajectories * (work.response_tokens + 8)
        learner.start(SleepingLearner, SHARE, [(work,)], {})
        return cls(rollout, teacher, learner)

    @property
    def groups(self) -> tuple[WorkerGroup, ...]:
        """All of them."""
        return self.rollout, self.teacher, self.learner


def stage_config(work: StageWork, max_staleness: int, steps: int) -> RunConfig:
    """What controller and store are told."""
    cfg = RunConfig(num_steps=steps, deadline_s=60.0)
    cfg.rollout.prompts_per_step, cfg.rollout.samples_per_prompt = work.prompts, work.samples
    cfg.replay.max_staleness, cfg.replay.reuse = max_staleness, 1
    return cfg


async def train(stages: Stages, work: StageWork, max_staleness: int, steps: int) -> list[dict[str, Any]]:
    """One run through the real controller and a new store; its steps."""
    cfg = stage_config(work, max_staleness, steps)
    log = StepLog()
    store = ReplayStore(StoreConfig.of(cfg), RayPayloads(cfg.deadline_s))
    source = PromptSource([Prompt(id=str(index), problem="1+1=") for index in range(100)], 0, None)
    outputs = Outputs(log.add, lambda _: 0, Checkpoints(Path("none"), 0, 1, {}, dict))
    groups = Groups(rollout=stages.rollout, teacher=stages.teacher, learner=stages.learner, store=store)
    controller = Controller(cfg, groups, source, [], outputs)
    await controller.train()
    return log.rows


def figures(rows: Sequence[Mapping[str, Any]], max_staleness: int, stage_s: float) -> dict[str, Any]:
    """Mean step time once the pipeline is full, over a stage's; and what the learner's turn is made of (means)."""
    steps = [after["clock"] - before["clock"] for before, after in zip(rows, rows[1:], strict=False)]
    # Whole pairs: two batches in flight come in pairs, a short step and a long one.
    first = NUM_STAGES + max_staleness
    first += (len(steps) - first) % 2
    kept = steps[first:]
    # At the end nothing new is sampled.
    steady = rows[first + 1 : len(rows) - max_staleness]
    parts = {
        "wait_for_batch_s": "time/wait_for_batch_s",
        "train_s": "time/learner_busy_s",
        "publish_s": "time/publish_s",
    }
    turn = {name: statistics.mean(row[key] for row in rows[first + 1 :]) for name, key in parts.items()}
    mean = statistics.mean(kept)
    expected = max(1.0, NUM_STAGES / (max_staleness + 1))
    return {
        "step_s": quartiles(kept) | {"mean": mean},
        "ratio_to_stage": mean / stage_s,
        "expected_ratio": expected,
        "overhead_s": mean - expected * stage_s,
        "learner_turn": turn | {"rest_s": mean - sum(turn.values())},
        "wait_share": {
            role: statistics.mean(row[f"pipeline/wait_share/{role}"] for row in steady)
            for role in ("rollout", "teacher", "learner")
        },
        "staleness": {
            "mean": statistics.mean(row["replay/staleness/mean"] for row in steady),
            "max": max(row["replay/staleness/max"] for row in steady),
        },
    }


async def measure(work: StageWork, bounds: Sequence[int], steps: int) -> dict[str, Any]:
    """Figures by staleness bound; Ray must be there."""
    stages = Stages.create(work, 60.0)
    found: dict[str, Any] = {}
    try:
        await asyncio.gather(stages.rollout.ready(), stages.teacher.ready(), stages.learner.ready())
        for bound in bounds:
            rows = await train(stages, work, bound, steps)
            found[f"staleness_{bound}"] = figures(rows, bound, work.stage_s)
    finally:
        for group in stages.groups:
            group.shutdown()
    return found


def checks(found: Mapping[str, Any], bounds: Sequence[int]) -> list[dict[str, Any]]:
    """Where the bound leaves room for all stages at once, a step takes hardly longer than one of them."""
    return [
        check(f"stages/staleness_{bound}/ratio_to_stage", found[f"staleness_{bound}"]["ratio_to_stage"], TARGET)
        for bound in bounds
        if bound + 1 >= NUM_STAGES
    ]
