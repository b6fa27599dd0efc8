"""Descriptions of a cluster: the nodes that Ray reports, this machine, or hardware that is only described."""

from __future__ import annotations

from dataclasses import dataclass

from opd_ray.errors import ConfigError
from opd_ray.planning.amounts import GIB, Origin

# Ray's default share of a node's memory for its object store (assumed where no Ray runs).
OBJECT_STORE_SHARE = 0.3
# Memory in GiB of the largest card sold under each of Ray's accelerator types, where it cannot be read.
ACCELERATOR_GIB = {
    "T4": 16,
    "V100": 32,
    "L4": 24,
    "A10G": 24,
    "L40S": 48,
    "A100": 80,
    "H100": 96,
    "H200": 141,
    "B200": 192,
}


@dataclass(frozen=True, slots=True)
class Node:
    """One machine; bytes. `gpu_bytes` is the least of its GPUs (None: unknown, or it has none).

    `memory` is all that the machine (or its container) may use, `free` what of it no process uses now.
    """

    name: str
    cpus: float
    memory: float
    object_store: float
    gpus: float = 0.0
    gpu_bytes: float | None = None
    free: float | None = None
    gpu_origin: Origin = Origin.measured


@dataclass(frozen=True, slots=True)
class Cluster:
    """All nodes that are alive; the driver runs on the first. `source` says where the numbers come from."""

    nodes: tuple[Node, ...]
    source: str
    origin: Origin = Origin.measured

    @property
    def cpus(self) -> float:
        """CPUs of all nodes."""
        return sum(node.cpus for node in self.nodes)

    @property
    def gpus(self) -> float:
        """GPUs of all nodes."""
        return sum(node.gpus for node in self.nodes)

    @property
    def gpu_bytes(self) -> float | None:
        """Memory of the smallest GPU (None: unknown): a worker may get any of them."""
        known = [node.gpu_bytes for node in self.nodes if node.gpus and node.gpu_bytes is not None]
        return min(known) if known else None


@dataclass(frozen=True, slots=True)
class Hardware:
    """Equal nodes that are only described, in the units of `conf/hardware`."""

    nodes: int
    cpus_per_node: float
    memory_gib: float
    gpus_per_node: float
    gpu_gib: float


def described(hardware: Hardware) -> Cluster:
    """The cluster of equal nodes; raises `ConfigError` where a size is missing."""
    for key, value in (("cpus_per_node", hardware.cpus_per_node), ("memory_gib", hardware.memory_gib)):
        if value <= 0:
            raise ConfigError(f"hardware.{key}={value:g} with hardware.nodes={hardware.nodes}: say what a node has")
    if hardware.gpus_per_node and not hardware.gpu_gib:
        raise ConfigError(
            f"hardware.gpu_gib=0 with hardware.gpus_per_node={hardware.gpus_per_node:g}: say how much memory a GPU has"
        )
    memory = hardware.memory_gib * GIB
    nodes = tuple(
        Node(
            name=f"node-{index}",
            cpus=hardware.cpus_per_node,
            memory=memory,
            object_store=OBJECT_STORE_SHARE * memory,
            gpus=hardware.gpus_per_node,
            gpu_bytes=hardware.gpu_gib * GIB if hardware.gpus_per_node else None,
            gpu_origin=Origin.assumed,
        )
        for index in range(hardware.nodes)
    )
    return Cluster(nodes, "hardware.* (described, not there)", Origin.assumed)
