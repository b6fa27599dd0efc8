"""Ray placement groups: one a role, one bundle a worker, so that a lost node's workers are placed again one by one.

A bundle is one worker's whole share: also an engine that is split over several GPUs has them on one node.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any

import ray
from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from opd_ray.config.choices import PlacementStrategy
from opd_ray.errors import ResourceError
from opd_ray.planning.node_fit import Demand, NodeResources, nodes_text
from opd_ray.planning.placement import Share

# How often Ray is asked whether room was found.
LOOK_S = 1.0
_FIRST_LOOKS_S = 0.02
# Ray keeps the room of a task that has just ended for about a second, in case another one comes.
_PATIENCE_S = 5.0

logger = logging.getLogger(__name__)


def cluster_nodes() -> list[NodeResources]:
    """What each living node has."""
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    alive = (node["Resources"] for node in nodes if node["Alive"])
    return [NodeResources(has.get("CPU", 0.0), has.get("GPU", 0.0)) for has in alive]


class Placement:
    """Where a group's workers are: one bundle for each, kept until `remove`.

    When a node dies, Ray looks for other nodes for the bundles that it had, for as long as it takes.
    """

    def __init__(self, role: str, share: Share, num_workers: int, strategy: PlacementStrategy) -> None:
        self._demand = Demand(role, num_workers, share.ray_cpus, share.gpus, strategy)
        amounts = {"CPU": share.ray_cpus, "GPU": share.gpus}
        bundle = {name: amount for name, amount in amounts.items() if amount}
        self._group = placement_group([dict(bundle) for _ in range(num_workers)], strategy=strategy.name.upper())

    def options(self, index: int) -> dict[str, Any]:
        """Options that put an actor into the bundle of worker `index`."""
        return {"scheduling_strategy": PlacementGroupSchedulingStrategy(self._group, index)}

    async def wait(self, deadline_s: float) -> None:
        """Wait until every worker has a node; raises `ResourceError` with what was asked and what there is."""
        begun = time.monotonic()
        pause_s, has_warned = _FIRST_LOOKS_S, False
        while not all(await self._placed()):
            waited_s = time.monotonic() - begun
            if waited_s > deadline_s:
                raise self.no_room(waited_s)
            if waited_s > _PATIENCE_S and not has_warned:
                has_warned = True
                logger.warning("%s waits for room: it may be in use by others", self._demand)
            await asyncio.sleep(pause_s)
            pause_s = min(LOOK_S, 2 * pause_s)

    async def is_placed(self, index: int) -> bool:
        """Whether worker `index` has a node."""
        return (await self._placed())[index]

    def no_room(self, waited_s: float) -> ResourceError:
        """The error of a wait that came to nothing."""
        free: dict[str, float] = ray.available_resources()  # type: ignore[no-untyped-call]
        return ResourceError(
            f"{self._demand} found no room in {waited_s:.3g} s; there are {nodes_text(cluster_nodes())}, free of all "
            f"are {free.get('CPU', 0.0):g} CPUs and {free.get('GPU', 0.0):g} GPUs: add a node, end what else runs "
            "there, or lower the number of workers"
        )

    def remove(self) -> None:
        """Give the room back."""
        remove_placement_group(self._group)

    async def _placed(self) -> list[bool]:
        # In a thread: it asks Ray's head node.
        table: dict[str, Any] = await asyncio.to_thread(placement_group_table, self._group)
        nodes = table["bundles_to_node_id"]
        return [bool(nodes.get(index)) for index in range(self._demand.num_workers)]


def place(role: str, share: Share, num_workers: int, strategy: PlacementStrategy) -> Placement | None:
    """Ask for room for a group; None where its workers ask for nothing, and may be anywhere."""
    if share.ray_cpus == 0 and share.gpus == 0:
        return None
    return Placement(role, share, num_workers, strategy)
