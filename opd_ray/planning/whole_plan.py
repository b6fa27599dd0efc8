"""The whole plan of a run on a cluster: shares, needs, seats, checks and traffic, and the check at a job's start."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from opd_ray.config.schema import RunConfig
from opd_ray.errors import ResourceError
from opd_ray.planning.cluster import Cluster
from opd_ray.planning.layout import Seat, lay_out
from opd_ray.planning.model_shape import ModelShape
from opd_ray.planning.needs import Needs, run_needs
from opd_ray.planning.node_fit import NodeResources
from opd_ray.planning.payload import Stage, traffic
from opd_ray.planning.placement import plan_resources
from opd_ray.planning.verdict import Check, checks, refusal, warnings


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run needs on `cluster`, where its workers would lie, and what it moves a step."""

    cluster: Cluster
    needs: Needs
    seats: Sequence[Seat]
    checks: Sequence[Check]
    stages: Sequence[Stage]

    @property
    def warnings(self) -> list[str]:
        """What may not fit, one line each."""
        return warnings(self.checks, self.cluster)

    def require_fit(self, *, at_full_length: bool = False) -> None:
        """Raise `ResourceError` with the one number that does not fit, or would not if all responses were long."""
        line = refusal(self.checks, at_full_length=at_full_length)
        if line is not None:
            raise ResourceError(line)


def make_plan(cfg: RunConfig, student: ModelShape, teacher: ModelShape, cluster: Cluster) -> Plan:
    """The plan of `cfg` on `cluster`.

    Raises `ResourceError` where it has too few CPUs or GPUs, or no node has room for a worker; memory is `require_fit`.
    """
    nodes = [NodeResources(node.cpus, node.gpus) for node in cluster.nodes]
    shares = plan_resources(cfg, cluster.cpus, cluster.gpus, nodes)
    needs = run_needs(cfg, student, teacher, shares, cluster.gpu_bytes)
    strategies = {need.role: getattr(cfg.placement, need.role) for need in needs.workers}
    seats = lay_out(needs.workers, cluster, strategies)
    engine_nodes = sum(1 for seat in seats if seat.workers.get("rollout"))
    stages = traffic(cfg, needs.weight_bytes, needs.gradient_bytes, engine_nodes)
    return Plan(cluster, needs, seats, checks(needs, seats, cluster), stages)
