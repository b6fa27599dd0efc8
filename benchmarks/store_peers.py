"""TransferQueue (verl's data plane) and TorchRL's replay buffer, as `bench_store` drives them.

Both take tensors of one shape for all trajectories, which spares them padding and nested tensors on the way in, and
neither is given the columns of text or scalars, which are slow there.
"""

from __future__ import annotations

import asyncio
from functools import partial
from importlib import import_module
from typing import Any

from benchmarks.store_contenders import Contender, start_actor
from benchmarks.store_workload import ARRAYS, Sums, Workload, make_rows, read

PARTITION = "train"
NUM_STORAGE_UNITS = 2  # TransferQueue's default, and what it recommends for one node


def tensor_batch(work: Workload) -> Any:
    """The trajectories as a TensorDict, one stacked tensor a column."""
    import numpy as np
    import torch

    tensordict: Any = import_module("tensordict")

    rows = make_rows(work)
    columns = {name: torch.from_numpy(np.stack([row[name] for row in rows])) for name in ARRAYS}
    return tensordict.TensorDict(columns, batch_size=[work.trajectories])


def tensor_bytes(batch: Any) -> int:
    """Bytes of a TensorDict's values; what frames them is not counted."""
    return sum(batch[name].nbytes for name in ARRAYS)


def read_tensors(batch: Any) -> Sums:
    """Look at every value of a TensorDict of stacked or nested tensors."""
    columns = {name: [value.numpy() for value in batch[name].unbind()] for name in ARRAYS}
    return read(dict(zip(ARRAYS, row, strict=True)) for row in zip(*columns.values(), strict=True))


class TransferQueueProducer:
    """Puts batches of keys and fields."""

    def __init__(self, work: Workload) -> None:
        transfer_queue: Any = import_module("transfer_queue")
        transfer_queue.init()
        self._put = transfer_queue.kv_batch_put
        self._batch = tensor_batch(work)
        self._count = 0

    def ping(self) -> None:
        """Answer once it is there."""

    def wire_bytes(self) -> int:
        """Bytes of a batch's values."""
        return tensor_bytes(self._batch)

    def put(self) -> Any:
        """One batch under new keys; returns TransferQueue's metadata of it."""
        keys = [f"{self._count}-{row}" for row in range(len(self._batch))]
        self._count += 1
        return self._put(keys=keys, partition_id=PARTITION, fields=self._batch)


class TransferQueueConsumer:
    """Gets batches by their metadata and clears them."""

    def __init__(self) -> None:
        transfer_queue: Any = import_module("transfer_queue")
        transfer_queue.init()
        self._get = transfer_queue.kv_batch_get_by_meta
        self._clear = transfer_queue.kv_clear

    def ping(self) -> None:
        """Answer once it is there."""

    def read(self, meta: Any) -> Sums:
        """One batch."""
        sums = read_tensors(self._get(meta, select_fields=list(ARRAYS)))
        self._clear(keys=meta.keys, partition_id=PARTITION)
        return sums


class TransferQueue(Contender):
    """TransferQueue's key-value interface with SimpleStorage, its storage for one machine without further services."""

    name = "transferqueue"

    async def start(self) -> None:
        """Start the actors and wait for them."""
        self.settings = {"api": "kv_batch_put, kv_batch_get_by_meta, kv_clear", "storage_backend": "SimpleStorage"}
        self.settings["num_data_storage_units"] = NUM_STORAGE_UNITS
        await asyncio.to_thread(self._init)
        self._producer = start_actor(TransferQueueProducer, {}, self.work)
        self._consumer = start_actor(TransferQueueConsumer, {})
        await asyncio.gather(self._producer.ping.remote(), self._consumer.ping.remote())

    @staticmethod
    def _init() -> None:
        from omegaconf import OmegaConf

        transfer_queue: Any = import_module("transfer_queue")

        storage = {"SimpleStorage": {"num_data_storage_units": NUM_STORAGE_UNITS}}
        transfer_queue.init(OmegaConf.create({"backend": {"storage_backend": "SimpleStorage", **storage}}))

    async def wire_bytes(self) -> int:
        """Bytes of a batch as it leaves the producer."""
        num_bytes: int = await self._producer.wire_bytes.remote()
        return num_bytes

    def submit(self) -> Any:
        """Send one batch on its way; returns the reference of what the consumer will have read."""
        return self._consumer.read.remote(self._producer.put.remote())

    def stop(self) -> None:
        """End TransferQueue's actors."""
        transfer_queue: Any = import_module("transfer_queue")
        transfer_queue.close()


class TorchRLProducer:
    """Extends the buffer."""

    def __init__(self, work: Workload, buffer: Any) -> None:
        self._buffer = buffer
        self._batch = tensor_batch(work)

    def ping(self) -> None:
        """Answer once it is there."""

    def wire_bytes(self) -> int:
        """Bytes of a batch's values."""
        return tensor_bytes(self._batch)

    def put(self) -> None:
        """One batch."""
        self._buffer.extend(self._batch)


class TorchRLConsumer:
    """Samples from the buffer."""

    def __init__(self, buffer: Any) -> None:
        self._buffer = buffer

    def ping(self) -> None:
        """Answer once it is there."""

    def read(self, _: None) -> Sums:
        """One batch, of trajectories that it has not had since it saw all."""
        return read_tensors(self._buffer.sample())


class TorchRL(Contender):
    """TorchRL's ReplayBuffer with LazyMemmapStorage in an actor of its own (`RayReplayBuffer`)."""

    name = "torchrl"
    in_order = False  # it is a buffer to sample from, not a queue

    async def start(self) -> None:
        """Start the actors and wait for them."""
        data: Any = import_module("torchrl.data")

        size = self.work.trajectories * self.in_flight
        self.settings = {"class": "RayReplayBuffer", "storage": "LazyMemmapStorage", "max_size": size}
        self.settings |= {"sampler": "SamplerWithoutReplacement"}
        self._buffer = await asyncio.to_thread(
            data.RayReplayBuffer,
            storage=partial(data.LazyMemmapStorage, size),
            sampler=data.SamplerWithoutReplacement,
            batch_size=self.work.trajectories,
            remote_config={"num_cpus": 0},
        )
        self._producer = start_actor(TorchRLProducer, {}, self.work, self._buffer.client())
        self._consumer = start_actor(TorchRLConsumer, {}, self._buffer.client())
        await asyncio.gather(self._producer.ping.remote(), self._consumer.ping.remote())

    async def wire_bytes(self) -> int:
        """Bytes of a batch as it leaves the producer."""
        num_bytes: int = await self._producer.wire_bytes.remote()
        return num_bytes

    def submit(self) -> Any:
        """Send one batch on its way; returns the reference of what the consumer will have read."""
        return self._consumer.read.remote(self._producer.put.remote())
