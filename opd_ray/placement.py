"""Shares out CPUs and GPUs to the groups, and refuses a run that asks for more than there is.

In lock-step (``replay.max_staleness=0``) the groups take turns, so each group may use all CPUs; otherwise they work at
the same time and together may use no more than there are. A worker's whole CPUs become its thread count: with the
default (one thread per core in every process) the groups starve each other by a factor of 10 to 20.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from opd_ray.config import RunConfig
from opd_ray.errors import ResourceError

_NUM_GROUPS = 3


@dataclass(frozen=True, slots=True)
class Share:
    """What one worker of a group gets: Ray's CPU and GPU request, and the size of its thread pools."""

    ray_cpus: float
    gpus: float
    threads: int


@dataclass(frozen=True, slots=True)
class ResourcePlan:
    """The share of one worker of each group."""

    rollout: Share
    teacher: Share
    learner: Share


@dataclass(frozen=True, slots=True)
class _Request:
    key: str
    num_workers: int
    cpus: float
    gpus: float

    @property
    def total_cpus(self) -> float:
        return self.num_workers * self.cpus


def plan_resources(cfg: RunConfig, total_cpus: float, total_gpus: float) -> ResourcePlan:
    """The share of every worker on a cluster of `total_cpus` CPUs and `total_gpus` GPUs.

    Raises `ResourceError` with both numbers when a group, or the groups together, ask for more than there is.
    """
    take_turns = cfg.replay.max_staleness == 0
    group_cpus = total_cpus if take_turns else total_cpus / _NUM_GROUPS
    requests = [
        _request(
            "rollout.num_engines",
            cfg.rollout.num_engines,
            cfg.rollout.num_cpus,
            cfg.rollout.num_gpus,
            group_cpus,
        ),
        _request(
            "teacher.num_workers",
            cfg.teacher.num_workers,
            cfg.teacher.num_cpus,
            cfg.teacher.num_gpus,
            group_cpus,
        ),
        _request("learner.num_ranks", cfg.learner.num_ranks, cfg.learner.num_cpus, cfg.learner.num_gpus, group_cpus),
    ]
    for request in requests:
        _check_group(request, total_cpus)
    _check_together(requests, total_cpus, take_turns)
    _check_gpus(requests, total_gpus)
    scale = 1 / _NUM_GROUPS if take_turns else 1.0
    rollout, teacher, learner = (
        Share(
            # Ray counts in steps of 1e-4; rounding down keeps the sum within what there is.
            ray_cpus=math.floor(request.cpus * scale * 1e4) / 1e4,
            gpus=request.gpus,
            threads=max(1, math.floor(request.cpus)),
        )
        for request in requests
    )
    return ResourcePlan(rollout=rollout, teacher=teacher, learner=learner)


def _request(key: str, num_workers: int, cpus: float, gpus: float, group_cpus: float) -> _Request:
    return _Request(key=key, num_workers=num_workers, cpus=cpus or group_cpus / num_workers, gpus=gpus)


def _check_group(request: _Request, total_cpus: float) -> None:
    if request.num_workers > total_cpus:
        raise ResourceError(
            f"{request.key}={request.num_workers} needs at least {request.num_workers} CPUs, there are {total_cpus:g}: "
            f"give {request.key} <= {math.floor(total_cpus)}, or run on a larger machine"
        )
    if request.total_cpus > total_cpus + 1e-9:
        prefix = request.key.split(".")[0]
        raise ResourceError(
            f"{request.key}={request.num_workers} x {prefix}.num_cpus={request.cpus:g} asks for {request.total_cpus:g} "
            f"CPUs, there are {total_cpus:g}: lower one of the two, or set {prefix}.num_cpus=0 for an even share"
        )


def _check_together(requests: list[_Request], total_cpus: float, take_turns: bool) -> None:
    wanted = sum(request.total_cpus for request in requests)
    if not take_turns and wanted > total_cpus + 1e-9:
        parts = ", ".join(f"{request.key.split('.')[0]} {request.total_cpus:g}" for request in requests)
        raise ResourceError(
            f"the groups together ask for {wanted:g} CPUs ({parts}), there are {total_cpus:g}: set their num_cpus to 0 "
            "for an even share, or replay.max_staleness=0, with which they take turns"
        )


def _check_gpus(requests: list[_Request], total_gpus: float) -> None:
    wanted = sum(request.num_workers * request.gpus for request in requests)
    if wanted > total_gpus + 1e-9:
        parts = ", ".join(
            f"{request.key}={request.num_workers} x {request.gpus:g}" for request in requests if request.gpus
        )
        raise ResourceError(
            f"the run asks for {wanted:g} GPUs ({parts}), there are {total_gpus:g}: lower these, use scale=tiny, "
            "or run on a larger machine"
        )
