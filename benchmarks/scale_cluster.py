"""The groups of `bench_scale`: the real ones, with fake actors that are started a few at a time."""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Sequence
from typing import Any

import ray

from benchmarks.scale_actors import FakeEngine, FakeRank, FakeTeacher, Sizes
from benchmarks.scale_run import Cluster
from opd_ray.cluster.remote_calls import start_named
from opd_ray.cluster.worker_group import WorkerGroup
from opd_ray.learner.group import LearnerGroup
from opd_ray.rollout.group import RolloutGroup
from opd_ray.teacher.worker import TeacherGroup

RESPONSE_TOKENS = 16_384
DEADLINE_S = 900.0
WAVE = 6


class _InWaves(WorkerGroup):
    """A group that starts a few processes at a time, without an environment of their own: half the CPU time."""

    async def begin(self, worker_class: type, args: Sequence[tuple[Any, ...]], share: int) -> None:
        """One worker for each tuple of constructor arguments, of which `share` are one process; waits for all."""
        made: Any = ray.remote(worker_class)
        hosts: list[Any] = []
        while len(hosts) * share < len(args):
            first = len(hosts)
            for index in range(first, min(first + WAVE, -(-len(args) // share))):
                hosts.append(start_named(made, f"{self.role}-{index}", {"num_cpus": 0}, args[index * share]))
            await asyncio.gather(*(self.result(host.ping.remote(), first) for host in hosts[first:]))
        self.workers = [hosts[index // share] for index in range(len(args))]


class _Engines(_InWaves, RolloutGroup):
    pass


class _Teachers(_InWaves, TeacherGroup):
    pass


class _Learner(_InWaves, LearnerGroup):
    pass


async def start(args: argparse.Namespace) -> Cluster:
    """All actors."""
    engines, teachers, learner = (
        _Engines("rollout", DEADLINE_S),
        _Teachers("teacher", DEADLINE_S),
        _Learner("learner", DEADLINE_S),
    )
    await engines.begin(FakeEngine, [(f"rollout-{i}", args.delay_s) for i in range(args.rollouts)], args.share)
    await teachers.begin(FakeTeacher, [(f"teacher-{i}",) for i in range(args.teachers)], args.share)
    await learner.begin(FakeRank, [(i,) for i in range(args.ranks)], 1)
    await learner.ready()
    learner.tokens_per_microbatch = 2 * RESPONSE_TOKENS
    return Cluster(engines, teachers, learner)


async def use(cluster: Cluster, sizes: Sizes) -> None:
    """Tell all actors what trajectories look like."""
    for group in (cluster.engines, cluster.teachers):
        await group.all(lambda worker: worker.use.remote(sizes))


def part_of(cluster: Cluster, num_engines: int, num_teachers: int, num_ranks: int) -> Cluster:
    """The first actors of every group."""
    groups: list[Any] = []
    for whole, count in (
        (cluster.engines, num_engines),
        (cluster.teachers, num_teachers),
        (cluster.learner, num_ranks),
    ):
        group = type(whole)(whole.role, DEADLINE_S)
        group.workers = whole.workers[:count]
        groups.append(group)
    groups[2].tokens_per_microbatch = 2 * RESPONSE_TOKENS
    return Cluster(*groups)
