"""Plain Ray queues, as `bench_store` drives them."""

from __future__ import annotations

import asyncio
import pickle
from typing import Any

import numpy as np
import ray

from benchmarks.store_contenders import DEADLINE_S, Contender, start_actor
from benchmarks.store_workload import ARRAYS, Row, Sums, Workload, make_rows, read


class QueueProducer:
    """Puts the trajectories into a `ray.util.queue.Queue`, in one of three forms."""

    def __init__(self, work: Workload, queue: Any, form: str) -> None:
        self._queue = queue
        self._form = form
        rows = make_rows(work)
        self._rows = [as_lists(row) for row in rows] if form == "lists" else rows

    def ping(self) -> None:
        """Answer once it is there."""

    def wire_bytes(self) -> int:
        """Bytes of a batch, with what pickle says of them."""
        buffers: list[pickle.PickleBuffer] = []
        stream = pickle.dumps(self._rows, protocol=5, buffer_callback=buffers.append)
        return len(stream) + sum(buffer.raw().nbytes for buffer in buffers)

    def put(self) -> None:
        """One batch."""
        if self._form == "lists":
            self._queue.put(pickle.dumps(self._rows, protocol=5))
        elif self._form == "numpy":
            self._queue.put(self._rows)
        else:
            self._queue.put([ray.put(self._rows)])


class QueueConsumer:
    """Takes batches from the queue."""

    def __init__(self, queue: Any, form: str) -> None:
        self._queue = queue
        self._form = form

    def ping(self) -> None:
        """Answer once it is there."""

    def get(self) -> Sums:
        """One batch."""
        item = self._queue.get(timeout=DEADLINE_S)
        if self._form == "lists":
            return read(as_arrays(row) for row in pickle.loads(item))
        return read(item if self._form == "numpy" else ray.get(item[0]))


def as_lists(row: Row) -> Row:
    """A trajectory with Python lists in place of arrays."""
    return {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in row.items()}


def as_arrays(row: Row) -> Row:
    """The arrays of a trajectory of lists."""
    return {name: np.array(row[name], dtype=np.float32 if name.endswith("logprobs") else np.int64) for name in ARRAYS}


class RayQueue(Contender):
    """`ray.util.queue.Queue` between the two actors."""

    form = ""

    async def start(self) -> None:
        """Start the actors and wait for them."""
        from ray.util.queue import Queue

        self.settings = {"maxsize": self.in_flight, "item": f"one batch, {self.form}"}
        queue = await asyncio.to_thread(Queue, self.in_flight, {"num_cpus": 0})
        self._producer = start_actor(QueueProducer, {}, self.work, queue, self.form)
        self._consumer = start_actor(QueueConsumer, {}, queue, self.form)
        await asyncio.gather(self._producer.ping.remote(), self._consumer.ping.remote())

    async def wire_bytes(self) -> int:
        """Bytes of a batch as it leaves the producer."""
        num_bytes: int = await self._producer.wire_bytes.remote()
        return num_bytes

    def submit(self) -> Any:
        """Send one batch on its way; returns the reference of what the consumer will have read."""
        self._put = self._producer.put.remote()
        return self._consumer.get.remote()


class QueueLists(RayQueue):
    """A pickle of Python lists."""

    name, form = "queue_lists", "lists"


class QueueNumpy(RayQueue):
    """Dicts of numpy arrays."""

    name, form = "queue_numpy", "numpy"


class QueueNumpyRefs(RayQueue):
    """References to dicts of numpy arrays: what Ray's object store does without any further work."""

    name, form = "numpy_by_reference", "reference"
