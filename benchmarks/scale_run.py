"""One measured run of the real controller: warm-up, then steps for some seconds, then an end from outside."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from opd_ray.actors.store import StoreClient

from benchmarks.machine import spread
from benchmarks.scale_probe import Lag, Probe, Usage, object_store, quantiles
from opd_ray.config.schema import RunConfig
from opd_ray.data.source import PromptSource
from opd_ray.learner.group import LearnerGroup
from opd_ray.replay.batch import SampledBatch
from opd_ray.rollout.group import RolloutGroup
from opd_ray.run.checkpoint import Checkpoints
from opd_ray.teacher.worker import TeacherGroup
from opd_ray.training.controller import Controller, Groups, Outputs
from opd_ray.types import Prompt

NEVER = 1_000_000
NUM_PROMPTS = 20_000


@dataclass(frozen=True, slots=True)
class Scenario:
    """`prompts` x `samples` trajectories a step, `max_staleness` steps of them ahead."""

    prompts: int
    samples: int
    max_staleness: int
    seconds: float
    warm_up_steps: int = 2
    min_steps: int = 2

    def config(self, num_engines: int, num_teachers: int, num_ranks: int) -> RunConfig:
        """The run's config; each trajectory is used once."""
        cfg = RunConfig()
        cfg.rollout.prompts_per_step, cfg.rollout.samples_per_prompt = self.prompts, self.samples
        cfg.rollout.num_engines, cfg.teacher.num_workers, cfg.learner.num_ranks = num_engines, num_teachers, num_ranks
        cfg.replay.max_staleness, cfg.replay.reuse, cfg.num_steps = self.max_staleness, 1, NEVER
        cfg.learner.tokens_per_microbatch, cfg.deadline_s = 32_768, 600.0
        return cfg


class TimedStore(StoreClient):
    """The store's client; keeps the seconds of every call by method, in the order of their ends."""

    def __init__(self, cfg: RunConfig, **how: Any) -> None:
        super().__init__(cfg, **how)
        self.calls: dict[str, list[float]] = {}

    async def _call(self, method: str, *args: Any, **options: Any) -> Any:
        begun = time.perf_counter()
        try:
            return await super()._call(method, *args, **options)
        finally:
            self.calls.setdefault(method, []).append(time.perf_counter() - begun)

    async def snapshot(self, folder: Path) -> None:
        """Write what the store has."""
        await self._call("snapshot", folder)


class _EnoughError(Exception):
    """The time is over."""


@dataclass
class Measurement:
    """Called after each step; ends the run once the steady state has lasted long enough."""

    scenario: Scenario
    read: Callable[[], Usage]
    store: TimedStore
    lag: Lag
    step_s: list[float] = field(default_factory=list)
    in_flight: list[float] = field(default_factory=list)
    wait_share: dict[str, list[float]] = field(default_factory=dict)
    ahead: int = 0
    begin: Usage | None = None
    end: Usage | None = None

    def step_done(self, step: int, batch: SampledBatch, metrics: Mapping[str, Any]) -> None:
        """Raises when it is over."""
        if step < self.scenario.warm_up_steps:
            return
        now = self.read()
        if self.begin is None:
            self.begin = now
            self.store.calls.clear()
            self.lag.seconds.clear()
            return
        self.step_s.append(metrics["time/step_s"])
        self.in_flight.append(metrics["replay/in_flight"])
        for key, value in metrics.items():
            if key.startswith("pipeline/wait_share/"):
                self.wait_share.setdefault(key.rpartition("/")[2], []).append(value)
        self.ahead = max(self.ahead, int(metrics["replay/staleness/max"]))
        if now.at - self.begin.at >= self.scenario.seconds and len(self.step_s) >= self.scenario.min_steps:
            self.end = now
            raise _EnoughError

    def figures(self, num_engines: int) -> dict[str, Any]:
        """What was found, by trajectory and by second."""
        if self.begin is None or self.end is None:
            raise RuntimeError("the run ended before it was measured: give more steps")
        size = self.scenario.prompts * self.scenario.samples
        trained = size * len(self.step_s)
        wall_s = self.end.at - self.begin.at
        used = self.end.since(self.begin)
        requests = trained / size * min(num_engines, self.scenario.prompts)
        return {
            "trajectories_per_step": size,
            "max_staleness": self.scenario.max_staleness,
            "staleness_seen": self.ahead,
            "trajectories_per_request": trained / requests,
            "trajectories_in_flight_at_step_end": spread(self.in_flight),
            "trajectories_per_s": spread([size / seconds for seconds in self.step_s]),
            "mean_trajectories_per_s": trained / wall_s,
            "wait_share": {name: sum(shares) / len(shares) for name, shares in self.wait_share.items()},
            "cpu_ms_per_trajectory": {name: 1e3 * seconds / trained for name, seconds in used.items()},
            "cpu_ms_per_request": {name: 1e3 * seconds / requests for name, seconds in used.items()},
            "share_of_a_core": {name: seconds / wall_s for name, seconds in used.items()},
            # What one core would give if it did nothing but the controller's loop.
            "loop_limit_trajectories_per_s": trained / used["driver_loop"],
            "driver_limit_trajectories_per_s": trained / used["driver"],
            "loop_lag": quantiles(self.lag.seconds),
            "store_calls": {name: quantiles(seconds) for name, seconds in self.store.calls.items()},
        }


@dataclass(frozen=True, slots=True)
class Cluster:
    """The groups that all runs share; only the store is a new one each time."""

    engines: RolloutGroup
    teachers: TeacherGroup
    learner: LearnerGroup


def prompts() -> list[Prompt]:
    """Problems of a usual length."""
    return [Prompt(id=f"problem-{i}", problem=f"{i} " + "words of a problem " * 20) for i in range(NUM_PROMPTS)]


async def run(
    scenario: Scenario,
    cluster: Cluster,
    make_store: Callable[[RunConfig], TimedStore],
    *,
    probe: bool,
    at_end: Callable[[TimedStore], Any] | None = None,
) -> dict[str, Any]:
    """Figures of one scenario; `at_end` is awaited while the store still has what it had, its result is added."""
    num_engines = len(cluster.engines.workers)
    cfg = scenario.config(num_engines, len(cluster.teachers.workers), len(cluster.learner.workers))
    store = make_store(cfg)
    lag = Lag()
    watching = asyncio.create_task(lag.watch())
    try:
        await store.state()
        looked = Probe() if probe else None
        read = looked.usage if looked else lambda: Usage(time.monotonic(), _own_cpu())
        measured = Measurement(scenario, read, store, lag)
        outputs = Outputs(measured.step_done, lambda _: None, Checkpoints(Path("none"), 0, 1, {}, dict))
        groups = Groups(cluster.engines, cluster.teachers, cluster.learner, store)
        controller = Controller(cfg, groups, PromptSource(prompts(), 0), [], outputs)
        with contextlib.suppress(_EnoughError):
            await controller.train()
        found = measured.figures(num_engines)
        found["books"] = await controller.ledger()  # raises unless they balance
        if looked is not None:
            found["memory"], found["object_store"] = looked.memory(), object_store()
        if at_end is not None:
            found |= await at_end(store)
        return found
    finally:
        watching.cancel()
        store.shutdown()


def _own_cpu() -> dict[str, float]:
    return {"driver_loop": time.thread_time(), "driver": time.process_time()}
