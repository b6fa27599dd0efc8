"""The likely placement of workers on nodes, by `placement.*` and in the order in which a run creates its groups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from opd_ray.config.choices import PlacementStrategy
from opd_ray.planning.amounts import WorkerNeed
from opd_ray.planning.cluster import Cluster, Node

_ROUNDING = 1e-6


@dataclass(slots=True)
class Seat:
    """One node and the workers on it, as (need, how many)."""

    node: Node
    free_cpus: float
    free_gpus: float
    workers: dict[str, int] = field(default_factory=dict)

    def has_room(self, need: WorkerNeed) -> bool:
        """Whether one more such worker fits by Ray's count of CPUs and GPUs."""
        return need.cpus <= self.free_cpus + _ROUNDING and need.gpus <= self.free_gpus + _ROUNDING

    def take(self, need: WorkerNeed) -> None:
        """Put one such worker here."""
        self.free_cpus -= need.cpus
        self.free_gpus -= need.gpus
        self.workers[need.role] = self.workers.get(need.role, 0) + 1


def lay_out(needs: Sequence[WorkerNeed], cluster: Cluster, strategies: Mapping[str, PlacementStrategy]) -> list[Seat]:
    """A seat for every worker on a node with room: beside others of its group (pack) or away from them (spread).

    `placement.plan_resources` has made sure that there is room; where this order finds none, the node with most left
    takes the worker. On several nodes Ray may place workers otherwise.
    """
    seats = [Seat(node, node.cpus, node.gpus) for node in cluster.nodes]
    for need in needs:
        apart = strategies[need.role] in (PlacementStrategy.spread, PlacementStrategy.strict_spread)
        for _ in range(need.count):
            fitting = [seat for seat in seats if seat.has_room(need)]
            if fitting:
                sign = 1 if apart else -1
                seat = min(fitting, key=lambda seat: sign * seat.workers.get(need.role, 0))
            else:
                seat = max(seats, key=lambda seat: (seat.free_gpus, seat.free_cpus))
            seat.take(need)
    return seats
