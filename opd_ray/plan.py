"""Compare what a run needs with what there is: ``python -m opd_ray.plan +experiment=lsm_block64``.

Takes the arguments of training. The hardware is the running Ray cluster, else this machine, else what
``+hardware=8xa800_80g`` or ``hardware.nodes=2 hardware.gpus_per_node=8 ...`` describe. Exit code 1 and one line where
a number does not fit.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from dataclasses import dataclass, field

from opd_ray.config.checks import check_config
from opd_ray.config.schema import RunConfig, ranged
from opd_ray.main import Composed, command
from opd_ray.planning.cluster import Cluster, Hardware, described
from opd_ray.planning.model_files import read_shape
from opd_ray.training.sources import model_path


@dataclass(kw_only=True, slots=True)
class HardwareConfig:
    """Equal nodes to plan for; `nodes` 0 is what is really there."""

    nodes: int = ranged(0, "nodes, 0 = the running Ray cluster, else this machine", ge=0)
    cpus_per_node: float = ranged(0.0, "CPUs of a node", ge=0)
    memory_gib: float = ranged(0.0, "memory of a node, GiB", ge=0)
    gpus_per_node: float = ranged(0.0, "GPUs of a node", ge=0)
    gpu_gib: float = ranged(0.0, "memory of one GPU, GiB", ge=0)


@dataclass(kw_only=True, slots=True)
class PlanConfig(RunConfig):
    """A run, and the hardware that it is planned for."""

    hardware: HardwareConfig = field(default_factory=HardwareConfig)


def show_plan(found: Composed[PlanConfig]) -> None:
    """Write the plan to stdout; raises `OpdError`, `ResourceError` where a number does not fit."""
    cfg = found.cfg
    check_config(cfg)
    from opd_ray.planning.text import write_plan
    from opd_ray.planning.whole_plan import make_plan

    student, teacher = (read_shape(model_path(path)) for path in (cfg.student.path, cfg.teacher.path))
    plan = make_plan(cfg, student, teacher, _cluster(cfg.hardware))
    write_plan(plan, sys.stdout)
    sys.stdout.flush()
    plan.require_fit(at_full_length=True)
    for warning in plan.warnings:
        sys.stderr.write(f"opd_ray: note: {warning}\n")
    sys.stdout.write("\nit fits\n")


def _cluster(hardware: HardwareConfig) -> Cluster:
    if hardware.nodes:
        return described(
            Hardware(
                nodes=hardware.nodes,
                cpus_per_node=hardware.cpus_per_node,
                memory_gib=hardware.memory_gib,
                gpus_per_node=hardware.gpus_per_node,
                gpu_gib=hardware.gpu_gib,
            )
        )
    from opd_ray.cluster.probe import connected, ray_cluster, this_machine

    logging.getLogger("opd_ray").setLevel(logging.WARNING)
    with connected() as is_connected:
        return asyncio.run(ray_cluster()) if is_connected else this_machine()


def main() -> None:
    """Console entry: exit code 0 where nothing is sure to fail, 1 where a number does not fit or an error."""
    command("run", PlanConfig, show_plan)


if __name__ == "__main__":
    main()
