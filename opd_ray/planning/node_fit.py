"""Fit of workers to nodes: a worker needs one node, and a group may want its workers together or apart."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from opd_ray.config.choices import PlacementStrategy

_EPS = 1e-6


@dataclass(frozen=True, slots=True)
class NodeResources:
    """What one node has, whoever uses it now."""

    cpus: float
    gpus: float


@dataclass(frozen=True, slots=True)
class Demand:
    """What a group asks of the nodes: `num_workers` equal workers of `cpus` and `gpus` each."""

    role: str
    num_workers: int
    cpus: float
    gpus: float
    strategy: PlacementStrategy

    def __str__(self) -> str:
        return f"{self.role}: {self.num_workers} x {amounts_text(self.cpus, self.gpus)} ({self.strategy.name})"


@dataclass(slots=True)
class _Room:
    cpus: float
    gpus: float
    roles: set[str] = field(default_factory=set)

    def has(self, cpus: float, gpus: float) -> bool:
        return self.cpus + _EPS >= cpus and self.gpus + _EPS >= gpus


def first_without_room(nodes: Sequence[NodeResources], demands: Sequence[Demand]) -> Demand | None:
    """The first demand that finds no room when all are placed, the largest workers first, each where it fits closest.

    A heuristic (best fit decreasing): it may fail to find a placement that exists, where nodes are nearly full.
    """
    rooms = [_Room(node.cpus, node.gpus) for node in nodes]
    for demand in sorted(demands, key=_hardness, reverse=True):
        if not _place(rooms, demand):
            return demand
    return None


def _hardness(demand: Demand) -> tuple[float, float, bool]:
    count = demand.num_workers if demand.strategy is PlacementStrategy.strict_pack else 1
    return (count * demand.gpus, count * demand.cpus, demand.strategy is PlacementStrategy.strict_spread)


def _place(rooms: list[_Room], demand: Demand) -> bool:
    whole = demand.strategy is PlacementStrategy.strict_pack
    pieces, size = (1, demand.num_workers) if whole else (demand.num_workers, 1)
    cpus, gpus = size * demand.cpus, size * demand.gpus
    apart = demand.strategy is PlacementStrategy.strict_spread
    for _ in range(pieces):
        fitting = [room for room in rooms if room.has(cpus, gpus) and not (apart and demand.role in room.roles)]
        if not fitting:
            return False
        room = min(fitting, key=lambda room: (room.gpus, room.cpus))
        room.cpus -= cpus
        room.gpus -= gpus
        room.roles.add(demand.role)
    return True


def amounts_text(cpus: float, gpus: float) -> str:
    """For example ``(4 CPUs, 1 GPU)``."""
    return f"({cpus:g} CPU{'s' * (cpus != 1)}, {gpus:g} GPU{'s' * (gpus != 1)})"


def nodes_text(nodes: Sequence[NodeResources]) -> str:
    """What each node has, equal ones together: ``nodes with 2 x (8 CPUs, 4 GPUs), 1 x (2 CPUs, 0 GPUs)``."""
    kinds = Counter((node.cpus, node.gpus) for node in nodes)
    return "nodes with " + ", ".join(f"{count} x {amounts_text(*kind)}" for kind, count in sorted(kinds.items()))
