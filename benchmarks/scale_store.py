"""The replay store alone: CPU time of its calls at any cluster's size, and checkpoints written by Ray tasks."""

from __future__ import annotations

import asyncio
import math
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray

from benchmarks.scale_actors import SCORED_BYTES_PER_TOKEN, Payload
from benchmarks.scale_model import MAX_STALENESS, RESPONSE_TOKENS, SAMPLES
from opd_ray.cluster.payload_tasks import PAYLOADS_PER_TASK, RayPayloads
from opd_ray.replay.checkpoint import INDEX
from opd_ray.replay.staleness import StoreConfig
from opd_ray.replay.store import ReplayStore
from opd_ray.storage.committed_folder import FolderDraft, ended_in_thread
from opd_ray.training.loop_lag import LoopLag
from opd_ray.types import BatchMeta, TrajectoryMeta

DEADLINE_S = 600.0
NUM_STEPS = 3
SMALL_BYTES = 4096


class NoPayloads:
    """Writes no payload: what is left of a checkpoint is the store's index."""

    async def write(self, refs: Sequence[Any], paths: Sequence[Path]) -> list[str | None]:
        """Checksums of nothing."""
        return ["00" * 16] * len(refs)


class Clock:
    """CPU milliseconds of the event loop's thread, by name."""

    def __init__(self) -> None:
        self.ms: dict[str, list[float]] = defaultdict(list)

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Add the block's."""
        begun = time.thread_time()
        yield
        self.ms[name].append(1e3 * (time.thread_time() - begun))


def scored(trajectory_ids: Sequence[int], version: int) -> BatchMeta:
    """The metadata of one request's payload."""
    rows = tuple(
        TrajectoryMeta(
            trajectory_id, f"problem-{trajectory_id // SAMPLES}", row, 200, RESPONSE_TOKENS, version, version, "stop"
        )
        for row, trajectory_id in enumerate(trajectory_ids)
    )
    return BatchMeta(rows, "teacher-0", 1.0, len(rows) * RESPONSE_TOKENS * SCORED_BYTES_PER_TOKEN)


async def fill(store: ReplayStore, num_requests: int, version: int, clock: Clock, make: Callable[[], Any]) -> None:
    """Acquire, assign and append so many requests; their time is `request`."""
    for _ in range(num_requests):
        ref = make()
        with clock.measure("request"):
            trajectory_ids = await store.acquire(SAMPLES)
            store.assign(trajectory_ids, [f"problem-{trajectory_id // SAMPLES}" for trajectory_id in trajectory_ids])
            store.append(scored(trajectory_ids, version), ref, generation=store.generation)


async def store_alone(num_trajectories: int) -> dict[str, Any]:
    """CPU time of each call in the loop with full queues, and of a checkpoint's index; without Ray and payloads."""
    io: Any = NoPayloads()
    store = ReplayStore(StoreConfig(num_trajectories, max_staleness=MAX_STALENESS), io)
    requests, clock = num_trajectories // SAMPLES, Clock()
    await fill(store, (MAX_STALENESS + 1) * requests, 0, clock, object)
    for version in range(NUM_STEPS):
        with clock.measure("sample"):
            batch = await store.sample(num_trajectories, version)
        if batch is None:
            raise RuntimeError("the store was not full: acquire more")
        with clock.measure("release"):
            store.release(batch.trajectory_ids, version + 1)
        with clock.measure("reports"):
            store.counts(), store.lengths()
        await fill(store, requests, version + 1, clock, object)
    for _ in range(NUM_STEPS):
        with clock.measure("freeze"):
            image = store.freeze()
    with tempfile.TemporaryDirectory() as name:
        written = await timed(lambda: store.write(image, Path(name)))
        index_bytes = (Path(name) / INDEX).stat().st_size
    per_call = {f"{name}_ms": statistics.median(found) for name, found in clock.ms.items()}
    steady_step = sum(per_call[f"{name}_ms"] for name in ("sample", "release", "reports"))
    return {
        "trajectories_per_step": num_trajectories,
        **per_call,
        "step_ms": steady_step + requests * per_call["request_ms"],
        "index": written | {"bytes": index_bytes},
    }


async def timed(call: Callable[[], Awaitable[Any]]) -> dict[str, float]:
    """Seconds of the clock, CPU seconds of the loop and of the driver, and how late the loop ran meanwhile (p99)."""
    lag = LoopLag(alarm_s=math.inf)
    watching = asyncio.create_task(lag.run())
    begun = time.perf_counter(), time.thread_time(), time.process_time()
    await call()
    ended = time.perf_counter(), time.thread_time(), time.process_time()
    await asyncio.sleep(0.03)
    watching.cancel()
    names = ("seconds", "loop_cpu_s", "driver_cpu_s")
    found = {name: after - before for name, before, after in zip(names, begun, ended, strict=True)}
    return found | {"loop_lag_p99_s": lag.take()["controller/loop_lag_s/p99"]}


async def checkpoint(num_payloads: int, payload_bytes: int) -> dict[str, Any]:
    """A checkpoint of so many ready requests, as a run writes it, and its restore; all payloads are on this node."""
    config, io = StoreConfig(num_payloads * SAMPLES), RayPayloads(DEADLINE_S)
    store = ReplayStore(config, io)
    await fill(store, num_payloads, 0, Clock(), lambda: ray.put(Payload(bytearray(payload_bytes))))
    with tempfile.TemporaryDirectory() as name:
        draft = FolderDraft(Path(name) / "store")
        folder, image = draft.begin(), store.freeze()
        written = await timed(lambda: store.write(image, folder))
        committed = await timed(lambda: ended_in_thread(draft.commit))
        restored = await timed(lambda: ReplayStore(config, io).restore(draft.folder))
        num_bytes = sum(path.stat().st_size for path in draft.folder.iterdir() if path.name != INDEX)
    return {
        "payloads": num_payloads,
        "tasks": -(-num_payloads // PAYLOADS_PER_TASK),
        "bytes": num_bytes,
        "write": written,
        "commit": committed,
        "restore": restored,
    }


async def checkpoints(num_large: int, num_small: int) -> dict[str, Any]:
    """Payloads of the real size tell the rate of a node, small ones what each costs whatever its size."""
    await checkpoint(PAYLOADS_PER_TASK + 1, SMALL_BYTES)  # so that Ray has the processes for its tasks
    large_bytes = SAMPLES * RESPONSE_TOKENS * SCORED_BYTES_PER_TOKEN
    return {
        "large_payloads": await checkpoint(num_large, large_bytes),
        "small_payloads": await checkpoint(num_small, SMALL_BYTES),
    }
