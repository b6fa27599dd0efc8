"""Probe of Ray's cluster for the planner: Ray's own numbers, and what a task on each node with GPUs reads."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from opd_ray.cluster.machine import Machine, read_machine
from opd_ray.cluster.remote_calls import remote_result
from opd_ray.errors import OpdError, ResourceError
from opd_ray.planning.amounts import GIB, Origin
from opd_ray.planning.cluster import ACCELERATOR_GIB, OBJECT_STORE_SHARE, Cluster, Node

PROBE_S = 60.0
_ACCELERATOR = "accelerator_type:"

logger = logging.getLogger(__name__)


@contextmanager
def connected() -> Iterator[bool]:
    """Within the block this process is connected to the cluster that training would use; False: none runs.

    That is the cluster of RAY_ADDRESS, else the one that ``ray start`` has started on this machine. Raises
    `ResourceError` when it does not answer.
    """
    address = running_cluster()
    if ray.is_initialized() or address is None:
        yield ray.is_initialized()
        return
    try:
        ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ResourceError(
            f"Ray at {address} does not answer ({' '.join(str(error).split())[:150]}): start it, or run `ray stop` and "
            "unset RAY_ADDRESS to plan for this machine alone"
        ) from error
    try:
        yield True
    finally:
        ray.shutdown()


def running_cluster() -> str | None:
    """Address of the cluster that `ray.init` would join (None: it would start its own)."""
    if address := os.environ.get("RAY_ADDRESS"):
        return None if address == "local" else address
    # Asking for "auto" instead would also find, and be turned away by, clusters that other programs keep to themselves.
    file = Path(os.environ.get("RAY_TMPDIR", "/tmp")) / "ray" / "ray_current_cluster"
    try:
        return file.read_text().strip() or None
    except OSError:
        return None


def this_machine() -> Cluster:
    """The machine that this process runs on, where no Ray runs."""
    machine = read_machine()
    store = OBJECT_STORE_SHARE * machine.memory
    gpu_bytes = float(min(machine.gpus)) if machine.gpus else None
    node = Node(
        name="here",
        cpus=float(machine.cpus),
        memory=float(machine.memory),
        object_store=store,
        gpus=float(len(machine.gpus)),
        gpu_bytes=gpu_bytes,
        free=float(machine.free),
    )
    return Cluster((node,), "this machine (no Ray runs)")


async def ray_cluster() -> Cluster:
    """All living nodes of the connected cluster, the driver's first."""
    known: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    alive = [entry for entry in known if entry.get("Alive")]
    here = ray.get_runtime_context().get_node_id()
    alive.sort(key=lambda entry: (entry["NodeID"] != here, entry.get("NodeManagerAddress", "")))
    nodes = await asyncio.gather(*(_node(entry, is_here=entry["NodeID"] == here) for entry in alive))
    return Cluster(tuple(nodes), f"Ray cluster of {len(nodes)} node(s)")


async def _node(entry: dict[str, Any], *, is_here: bool) -> Node:
    resources: dict[str, float] = entry.get("Resources", {})
    gpus = resources.get("GPU", 0.0)
    machine: Machine | None = None
    if is_here:
        machine = read_machine()
    elif gpus:
        machine = await _probe(entry["NodeID"])
    # Ray counts what was free when it started: less than the machine has.
    known_to_ray = resources.get("memory", 0.0) + resources.get("object_store_memory", 0.0)
    gpu_bytes, origin = _gpu_bytes(resources, machine) if gpus else (None, Origin.measured)
    return Node(
        name=str(entry.get("NodeName") or entry.get("NodeManagerAddress") or entry["NodeID"][:8]),
        cpus=resources.get("CPU", 0.0),
        memory=max(known_to_ray, float(machine.memory) if machine else 0.0),
        object_store=resources.get("object_store_memory", 0.0),
        gpus=gpus,
        gpu_bytes=gpu_bytes,
        free=float(machine.free) if machine else None,
        gpu_origin=origin,
    )


def _gpu_bytes(resources: dict[str, float], machine: Machine | None) -> tuple[float | None, Origin]:
    if machine is not None and machine.gpus:
        return float(min(machine.gpus)), Origin.measured
    kinds = [key.removeprefix(_ACCELERATOR) for key in resources if key.startswith(_ACCELERATOR)]
    known = [ACCELERATOR_GIB[kind] for kind in kinds if kind in ACCELERATOR_GIB]
    return (float(min(known) * GIB) if known else None), Origin.assumed


async def _probe(node_id: str) -> Machine | None:
    """What a short task on a node reads; None where it does not answer, which is no reason to stop."""
    remote: Any = ray.remote(read_machine)
    strategy = NodeAffinitySchedulingStrategy(node_id, soft=False)
    ref = remote.options(num_cpus=0, max_retries=0, scheduling_strategy=strategy).remote()
    try:
        found: Machine = await remote_result(ref, f"probe of node {node_id[:8]}", PROBE_S)
    except OpdError as error:
        logger.warning("the memory of a node's GPUs is unknown: %s", error)
        return None
    return found
