"""What parts of a step cost the driver, measured alone on an idle cluster: publication, and a step's dispatch."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import Any

import ray

from benchmarks.machine import spread
from benchmarks.scale_actors import CHECKSUM, Payload
from benchmarks.scale_run import Cluster
from opd_ray.data.packing import plan_microbatches
from opd_ray.replay.batch import SampledBatch
from opd_ray.types import SampleInfo, WeightsMeta

REPEATS = 5
TRAJECTORIES = 4096
LENGTH = 16_584


def batch_of(num_trajectories: int, num_payloads: int) -> SampledBatch:
    """A step's trajectories in so many small payloads."""
    refs = tuple(ray.put(Payload(bytearray(4096))) for _ in range(num_payloads))
    infos = tuple(SampleInfo(trajectory_id, 0, 1, 1.0, 200, LENGTH - 200) for trajectory_id in range(num_trajectories))
    rows = tuple(
        (trajectory_id % num_payloads, trajectory_id // num_payloads) for trajectory_id in range(num_trajectories)
    )
    return SampledBatch(refs, rows, infos)


async def _cost(call: Callable[[], Awaitable[Any]]) -> dict[str, Any]:
    """Seconds of the clock, and CPU seconds of the driver's loop and of the whole driver."""
    wall, loop, driver = [], [], []
    for _ in range(REPEATS):
        begun = time.perf_counter(), time.thread_time(), time.process_time()
        await call()
        wall.append(time.perf_counter() - begun[0])
        loop.append(time.thread_time() - begun[1])
        driver.append(time.process_time() - begun[2])
    return {"wall_s": spread(wall), "loop_cpu_s": spread(loop), "driver_cpu_s": spread(driver)}


def plan_seconds(num_trajectories: int, num_ranks: int) -> float:
    """CPU seconds of spreading a step over ranks."""
    lengths = [LENGTH - index % 997 for index in range(num_trajectories)]
    begun = time.thread_time()
    plan_microbatches(lengths, num_ranks, 2 * LENGTH)
    return time.thread_time() - begun


async def parts(cluster: Cluster) -> dict[str, Any]:
    """Weights to all engines; a step to all ranks with 1, 50 and 200 payloads; the plan of a step."""
    found: dict[str, Any] = {}
    weights, bucket = WeightsMeta(0, CHECKSUM, 4096), ray.put(Payload(bytearray(4096)))
    await cluster.engines.publish(weights, [bucket])
    found["publish"] = await _cost(lambda: cluster.engines.publish(weights, [bucket]))
    found["publish"]["engines"] = len(cluster.engines.workers)
    for count, payloads in ((8, 1), (TRAJECTORIES, 1), (TRAJECTORIES, 200)):
        batch = batch_of(count, payloads)
        found[f"train_step/{count}_trajectories/{payloads}_payloads"] = await _cost(
            lambda batch=batch: cluster.learner.train_step(batch, 0)  # type: ignore[misc]
        )
    found["train_step/ranks"] = len(cluster.learner.workers)
    found["plan_s"] = {
        f"{count}_trajectories/{ranks}_ranks": plan_seconds(count, ranks)
        for count, ranks in ((TRAJECTORIES, 16), (6400, 80), (64_000, 800))
    }
    return found
