"""The controller's own loops without Ray: actors are objects in the driver, so group sizes of any cluster can be tried.

What a call costs here is Python's: the loops, the store's bookkeeping and asyncio; the difference to a run with Ray is
Ray's.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable
from typing import Any

from benchmarks.scale_actors import FakeEngine, FakeTeacher, Payload, Sizes
from benchmarks.scale_run import Cluster
from opd_ray.learner.group import LearnerGroup
from opd_ray.learner.step_report import RankReport
from opd_ray.replay.batch import SampledBatch
from opd_ray.rollout.group import RolloutGroup
from opd_ray.teacher.worker import TeacherGroup
from opd_ray.types import WeightsMeta

DEADLINE_S = 600.0


class _Method:
    def __init__(self, call: Callable[..., Any], num_returns: int = 1) -> None:
        self._call, self._num_returns = call, num_returns

    def options(self, num_returns: int) -> _Method:
        return _Method(self._call, num_returns)

    def remote(self, *args: Any) -> Any:
        answer = asyncio.ensure_future(self._run(*args))
        if self._num_returns == 1:
            return answer
        # The payload is passed on, and nobody here looks at it.
        return Payload(b""), answer

    async def _run(self, *args: Any) -> Any:
        result = self._call(*args)
        if inspect.isawaitable(result):
            result = await result
        return result if self._num_returns == 1 else result[1]


class _Handle:
    def __init__(self, target: Any) -> None:
        self._target = target

    def __getattr__(self, name: str) -> _Method:
        return _Method(getattr(self._target, name))


class _Learner(LearnerGroup):
    """All ranks in one, at once; what a step's dispatch costs is measured by `scale_parts`."""

    async def train_step(self, batch: SampledBatch, policy_version: int) -> list[RankReport]:
        return [RankReport(loss_sum=1.0, weight_sum=1.0, divisor=1.0, num_tokens=1, grad_norm=1.0)]

    async def export(self, policy_version: int) -> tuple[WeightsMeta, list[Any]]:
        return WeightsMeta(policy_version, "00", 4096), []


def in_process(num_engines: int, num_teachers: int, num_ranks: int, delay_s: float, sizes: Sizes) -> Cluster:
    """A cluster of objects; to be made where the event loop runs."""
    engines, teachers, learner = (
        RolloutGroup("rollout", DEADLINE_S),
        TeacherGroup("teacher", DEADLINE_S),
        _Learner("learner", DEADLINE_S),
    )
    fakes: list[Any] = [FakeEngine(f"rollout-{index}", delay_s) for index in range(num_engines)]
    scorers: list[Any] = [FakeTeacher(f"teacher-{index}") for index in range(num_teachers)]
    for fake in (*fakes, *scorers):
        fake._sizes = sizes
    engines.workers, teachers.workers = [_Handle(fake) for fake in fakes], [_Handle(scorer) for scorer in scorers]
    learner.workers = [None] * num_ranks
    return Cluster(engines, teachers, learner)
