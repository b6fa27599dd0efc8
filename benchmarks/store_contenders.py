"""The contenders of `bench_store`, and the first of them: the replay store of opd_ray.

Each contender has a producer actor, which stands for the teacher and holds the trajectories as numpy arrays, and a
consumer actor, which stands for a learner rank; whatever is between them is the contender's own.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import ray

from benchmarks.store_workload import ARRAYS, Sums, Workload, make_rows, read
from opd_ray.cluster.payload_tasks import RayPayloads
from opd_ray.cluster.remote_calls import remote_result
from opd_ray.cluster.worker_group import MALLOC_ENV, worker_env
from opd_ray.config.choices import LogprobDtype
from opd_ray.config.schema import ReplayConfig, RunConfig
from opd_ray.planning.placement import Share
from opd_ray.replay.batch import SampledBatch
from opd_ray.replay.staleness import StoreConfig
from opd_ray.replay.store import ReplayStore
from opd_ray.types import BatchMeta, TrajectoryMeta

DEADLINE_S = 120.0
THREAD_ENV = {name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")} | {"PYTHONWARNINGS": "ignore"}


def start_actor(worker_class: type, env: Mapping[str, str], *args: Any) -> Any:
    """An actor of the class with one thread for numerics and the allocator's settings of the teacher group."""
    remote_class: Any = ray.remote(worker_class)
    env_vars = THREAD_ENV | MALLOC_ENV | dict(env)
    return remote_class.options(num_cpus=0, runtime_env={"env_vars": env_vars}).remote(*args)


class Contender:
    """One way to bring a batch from the producer to the consumer; `start` must be called first.

    `in_order`: batches come out as they went in. Subclasses give `submit`, or `batch` and `stream`.
    """

    name = ""
    in_order = True
    settings: dict[str, Any] = {}

    def __init__(self, work: Workload, in_flight: int) -> None:
        self.work = work
        self.in_flight = in_flight

    async def start(self) -> None:
        """Start the actors and wait for them."""
        raise NotImplementedError

    async def wire_bytes(self) -> int:
        """Bytes of a batch as it leaves the producer."""
        raise NotImplementedError

    def submit(self) -> Any:
        """Send one batch on its way; returns the reference of what the consumer will have read."""
        raise NotImplementedError

    async def batch(self) -> Sums:
        """Bring one batch through."""
        sums: Sums = await remote_result(self.submit(), self.name, DEADLINE_S)
        return sums

    async def stream(self, seconds: float) -> int:
        """Bring batches through for so long, `in_flight` at a time, and then the rest; returns how many."""
        waiting: deque[Any] = deque()
        begun, count = time.perf_counter(), 0
        while waiting or time.perf_counter() - begun < seconds:
            while len(waiting) < self.in_flight and time.perf_counter() - begun < seconds:
                waiting.append(self.submit())
            await remote_result(waiting.popleft(), self.name, DEADLINE_S)
            count += 1
        return count

    def stop(self) -> None:
        """End what Ray's own shutdown does not end."""


class StoreProducer:
    """Stands for rollout engine and teacher: numpy arrays to a scored Arrow batch."""

    def __init__(self, work: Workload, logprob_dtype: LogprobDtype, sampled_logprob_dtype: LogprobDtype) -> None:
        from opd_ray.trajectory.rows import RolloutRow
        from opd_ray.trajectory.schema import BatchSpec

        self._dtypes = (sampled_logprob_dtype, logprob_dtype)
        self._spec = BatchSpec(
            "bench", work.top_k, logprob_dtype.name, sampled_logprob_dtype=sampled_logprob_dtype.name
        )
        rows = make_rows(work)
        fields = [field.name for field in dataclasses.fields(RolloutRow)]
        self._rollouts = [RolloutRow(**{name: row[name] for name in fields if name in row}) for row in rows]
        self._rows = rows

    def ping(self) -> None:
        """Answer once it is there."""

    def produce(self, trajectory_ids: tuple[int, ...], version: int) -> tuple[Any, BatchMeta]:
        """Stages 3 and 5: a payload, whose responses end at a policy version, and its metadata."""
        from opd_ray.teacher.worker import rounded
        from opd_ray.trajectory.codec import add_teacher_columns, decode, encode_rollouts

        begun = time.monotonic()
        versions = np.array([version, version], dtype=np.int64)
        rollouts = [
            dataclasses.replace(row, trajectory_id=trajectory_id, version_values=versions)
            for trajectory_id, row in zip(trajectory_ids, self._rollouts, strict=True)
        ]
        batch = decode(encode_rollouts(rollouts, self._spec.rollout), expected=self._spec.rollout)
        ids = [row["teacher_topk_ids"] for row in self._rows]
        sampled, topk = (
            rounded([row[name] for row in self._rows], dtype)
            for name, dtype in zip(("teacher_logprobs", "teacher_topk_logprobs"), self._dtypes, strict=True)
        )
        payload = add_teacher_columns(batch, sampled, ids, topk, self._spec)
        metas = tuple(
            TrajectoryMeta(
                trajectory_id=row.trajectory_id,
                prompt_id=row.prompt_id,
                row=index,
                num_prompt_tokens=len(row.prompt_token_ids),
                num_response_tokens=len(row.response_token_ids),
                oldest_version=version,
                newest_version=version,
                finish_reason=row.finish_reason,
            )
            for index, row in enumerate(rollouts)
        )
        return payload, BatchMeta(metas, "producer", time.monotonic() - begun, payload.size)


def default_bytes(work: Workload) -> int:
    """Bytes of a batch with the default dtypes of log-probs."""
    replay = ReplayConfig()
    producer = StoreProducer(work, replay.logprob_dtype, replay.sampled_logprob_dtype)
    return producer.produce(tuple(range(work.trajectories)), 0)[1].num_bytes


class StoreConsumer:
    """Stands for a learner rank: decodes the payloads as the trainer does."""

    def ping(self) -> None:
        """Answer once it is there."""

    def read(self, batch: SampledBatch) -> Sums:
        """Stage 9: the trajectories of a batch, fetched as a rank fetches its own."""
        return self.read_payloads(batch, ray.get(list(batch.refs)))

    def read_payloads(self, batch: SampledBatch, payloads: Sequence[Any]) -> Sums:
        """The sampled trajectories of the payloads."""
        from opd_ray.trajectory.codec import decode
        from opd_ray.trajectory.rows import training_rows

        decoded = [training_rows(decode(payload)) for payload in payloads]
        trajectories = [decoded[payload][row] for payload, row in batch.rows]
        return read({name: getattr(row, name) for name in ARRAYS} for row in trajectories)


class OpdRay(Contender):
    """The store in the driver's event loop, and the two loops around it as the controller has them."""

    name = "opd_ray"

    async def start(self) -> None:
        """Start the actors and wait for them."""
        cfg = RunConfig()
        cfg.rollout.prompts_per_step, cfg.rollout.samples_per_prompt = self.work.trajectories, 1
        cfg.num_steps = 10**9
        cfg.replay.reuse, cfg.replay.max_staleness = 1, self.in_flight - 1
        cfg.replay.sampled_logprob_dtype = LogprobDtype.float16
        dtypes = (cfg.replay.logprob_dtype, cfg.replay.sampled_logprob_dtype)
        self.settings = {"max_staleness": cfg.replay.max_staleness}
        self.settings |= {"logprob_dtype": dtypes[0].name, "sampled_logprob_dtype": dtypes[1].name}
        self.settings["default_bytes_per_token"] = default_bytes(self.work) / self.work.tokens
        env = worker_env(Share(ray_cpus=0, gpus=0, threads=1))
        self._store = ReplayStore(StoreConfig.of(cfg), RayPayloads(DEADLINE_S))
        self._producer = start_actor(StoreProducer, env, self.work, *dtypes)
        self._consumer = start_actor(StoreConsumer, env)
        self._version = 0
        await asyncio.gather(self._producer.ping.remote(), self._consumer.ping.remote())
        self._num_bytes = 0

    async def wire_bytes(self) -> int:
        """Bytes of a batch as it leaves the producer."""
        return self._num_bytes

    async def _result(self, ref: Any) -> Any:
        return await remote_result(ref, self.name, DEADLINE_S)

    async def batch(self) -> Sums:
        """Bring one batch through."""
        await self._produce(await self._acquire())
        return await self._step()

    async def stream(self, seconds: float) -> int:
        """Bring batches through for so long, and then the rest; returns how many."""
        until, is_last, num_started, num_read = time.perf_counter() + seconds, False, 0, 0
        async with asyncio.TaskGroup() as tasks:

            async def rollout_loop() -> None:
                nonlocal is_last, num_started
                while not is_last:
                    trajectory_ids = await self._acquire()
                    is_last = time.perf_counter() >= until
                    num_started += 1
                    tasks.create_task(self._produce(trajectory_ids))

            tasks.create_task(rollout_loop())
            while not is_last or num_read < num_started:
                await self._step()
                num_read += 1
        return num_read

    async def _acquire(self) -> tuple[int, ...]:
        trajectory_ids = await self._store.acquire(self.work.trajectories)
        self._store.assign(trajectory_ids, [f"prompt-{row}" for row in range(len(trajectory_ids))])
        return trajectory_ids

    async def _produce(self, trajectory_ids: tuple[int, ...]) -> None:
        payload, meta_ref = self._producer.produce.options(num_returns=2).remote(trajectory_ids, self._version)
        meta: BatchMeta = await self._result(meta_ref)
        self._num_bytes = meta.num_bytes
        self._store.append(meta, payload)

    async def _step(self) -> Sums:
        batch = await self._store.sample(self.work.trajectories, self._version)
        if batch is None:
            raise SystemExit("the store has no more batches")
        sums: Sums = await self._result(self._consumer.read.remote(batch))
        self._version += 1
        self._store.release(batch.trajectory_ids, self._version)
        return sums
