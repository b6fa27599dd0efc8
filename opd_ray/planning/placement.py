"""Shares out CPUs and GPUs to the groups, and refuses a run that asks for more than there is.

In lock-step (``replay.max_staleness=0``) the groups take turns, so each group may use all CPUs; otherwise they work at
the same time and together may use no more than there are. A worker's whole CPUs become its thread count: with the
default (one thread per core in every process) the groups starve each other by a factor of 10 to 20.

A worker lies on one node. On a cluster an even share is therefore at most the largest node's CPUs, and is lowered until
all workers find a node (`node_fit`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from opd_ray.config.schema import RunConfig
from opd_ray.errors import ResourceError
from opd_ray.planning.node_fit import Demand, NodeResources, first_without_room, nodes_text

_NUM_GROUPS = 3
# How far even shares are lowered, in steps, where nodes are too small for them.
_LOWERED = 0.8
_MAX_LOWERINGS = 16


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
    is_even: bool

    @property
    def role(self) -> str:
        """The group's part of the config."""
        return self.key.split(".")[0]

    @property
    def total_cpus(self) -> float:
        return self.num_workers * self.cpus


def plan_resources(
    cfg: RunConfig, total_cpus: float, total_gpus: float, nodes: Sequence[NodeResources] = ()
) -> ResourcePlan:
    """The share of every worker on a cluster of `total_cpus` CPUs and `total_gpus` GPUs.

    `nodes` says how these are split over machines; without it there is one. Raises `ResourceError` with both numbers
    when a group, or the groups together, ask for more than there is, or when a worker fits on no node.
    """
    nodes = nodes or (NodeResources(total_cpus, total_gpus),)
    take_turns = cfg.replay.max_staleness == 0
    group_cpus = total_cpus if take_turns else total_cpus / _NUM_GROUPS
    largest = max(node.cpus for node in nodes)

    def request(key: str, num_workers: int, cpus: float, gpus: float) -> _Request:
        even = min(group_cpus / num_workers, largest)
        return _Request(key, num_workers, cpus or even, gpus, is_even=not cpus)

    rollout, teacher, learner = cfg.rollout, cfg.teacher, cfg.learner
    requests = [
        request("rollout.num_engines", rollout.num_engines, rollout.num_cpus, rollout.num_gpus),
        request("teacher.num_workers", teacher.num_workers, teacher.num_cpus, teacher.num_gpus),
        request("learner.num_ranks", learner.num_ranks, learner.num_cpus, learner.num_gpus),
    ]
    for one in requests:
        _check_group(one, total_cpus)
    _check_together(requests, total_cpus, take_turns)
    _check_gpus(requests, total_gpus)
    for one in requests:
        _check_worker(one, nodes)
    shares = _fitting_shares(cfg, requests, nodes, 1 / _NUM_GROUPS if take_turns else 1.0)
    return ResourcePlan(rollout=shares[0], teacher=shares[1], learner=shares[2])


def _fitting_shares(
    cfg: RunConfig, requests: Sequence[_Request], nodes: Sequence[NodeResources], scale: float
) -> list[Share]:
    """Shares with which every worker finds a node; even ones are lowered for it as little as it takes."""
    without_room: Demand | None = None
    for lowering in range(_MAX_LOWERINGS):
        shares = [_share(request, scale, _LOWERED**lowering) for request in requests]
        demands = [
            Demand(request.role, request.num_workers, share.ray_cpus, share.gpus, getattr(cfg.placement, request.role))
            for request, share in zip(requests, shares, strict=True)
        ]
        missing = first_without_room(nodes, demands)
        if missing is None:
            return shares
        without_room = without_room or missing
        if not any(request.is_even for request in requests):
            break
    raise ResourceError(
        f"{without_room} finds no room beside the other groups; there are {nodes_text(nodes)}: lower the numbers of "
        "workers, their num_cpus or num_gpus, or set placement.* to spread"
    )


def _share(request: _Request, scale: float, lowered: float) -> Share:
    cpus = request.cpus * (lowered if request.is_even else 1.0)
    return Share(
        # Ray counts in steps of 1e-4; rounding down keeps the sum within what there is.
        ray_cpus=math.floor(cpus * scale * 1e4) / 1e4,
        gpus=request.gpus,
        threads=max(1, math.floor(cpus)),
    )


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


def _check_worker(request: _Request, nodes: Sequence[NodeResources]) -> None:
    if not any(node.cpus + 1e-9 >= request.cpus and node.gpus + 1e-9 >= request.gpus for node in nodes):
        raise ResourceError(
            f"a worker of {request.role} asks for {request.cpus:g} CPUs and {request.gpus:g} GPUs, no node has them; "
            f"there are {nodes_text(nodes)}: lower {request.role}.num_cpus or {request.role}.num_gpus"
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
