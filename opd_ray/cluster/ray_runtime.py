"""Ray for a verb that needs some engines and no more: started, sized, and ended."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import ray

from opd_ray.cluster.placement import cluster_nodes
from opd_ray.cluster.worker_group import WorkerGroup
from opd_ray.errors import ResourceError
from opd_ray.planning.node_fit import NodeResources

STOP_S = 5.0

logger = logging.getLogger(__name__)


@contextmanager
def started_ray() -> Iterator[None]:
    """Within the block Ray runs: the cluster of RAY_ADDRESS, a running one, or one for this process alone.

    Raises `ResourceError` where there is a cluster that does not answer.
    """
    owns_ray = not ray.is_initialized()
    if owns_ray:
        try:
            ray.init(logging_level=logging.ERROR, log_to_driver=False)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise ResourceError(
                f"Ray cannot be started or joined ({' '.join(str(error).split())[:150]}): start the cluster, or set "
                "RAY_ADDRESS=local to use this machine alone"
            ) from error
    try:
        yield
    finally:
        if owns_ray and ray.is_initialized():
            ray.shutdown()


def cluster_size() -> tuple[float, float, list[NodeResources]]:
    """CPUs, GPUs, and the living nodes that have them."""
    nodes = cluster_nodes()
    return sum(node.cpus for node in nodes), sum(node.gpus for node in nodes), nodes


async def stop_groups(groups: Sequence[WorkerGroup]) -> None:
    """End every actor; they are asked first, as an engine's interpreter can hang at its exit."""
    try:
        async with asyncio.timeout(STOP_S):
            await asyncio.gather(*(group.stop() for group in groups), return_exceptions=True)
    except TimeoutError:
        logger.warning("some actors did not stop within %g s and are killed", STOP_S)
    for group in groups:
        group.shutdown()
