"""An Arrow IPC stream whose values are copied once, from where they are to their place in the stream."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from opd_ray.trajectory.columns import Array, ArrowArray


class StreamDraft:
    """The columns of a batch with room in the place of their values, until `write` puts them into the stream."""

    def __init__(self) -> None:
        # By the room's address: Arrow's writer hands on the room itself.
        self._values: dict[int, tuple[Sequence[Array], np.dtype[Any]]] = {}

    def room(self, arrays: Sequence[Array], item: pa.DataType) -> ArrowArray:
        """An array for the values of all `arrays`, one after the other, as `item`; what it holds before is anything.

        Values are cast without a check. Arrow may look at the array's length, and not at its values.
        """
        dtype: np.dtype[Any] = np.dtype(item.to_pandas_dtype())
        count = sum(array.size for array in arrays)
        # Memory that nothing touches costs nothing.
        room = pa.allocate_buffer(count * dtype.itemsize)
        if count:
            self._values[room.address] = (arrays, dtype)
        return pa.Array.from_buffers(item, count, [None, room])

    def write(self, batch: pa.RecordBatch) -> pa.Buffer:
        """The stream of `batch`, which is made of rooms and of other arrays, in a buffer of exactly its size."""
        sink: Any = _Chunks()
        with pa.ipc.new_stream(sink, batch.schema) as writer:
            writer.write_batch(batch)
        stream = pa.allocate_buffer(sink.num_bytes)
        rest = memoryview(stream).cast("B")
        for chunk in sink.chunks:
            part, rest = rest[: len(chunk)], rest[len(chunk) :]
            values = self._values.get(chunk.address) if isinstance(chunk, pa.Buffer) else None
            if values is None:
                part[:] = memoryview(chunk).cast("B")
            else:
                arrays, dtype = values
                target: Array = np.frombuffer(part, dtype)
                np.concatenate([array.reshape(-1) for array in arrays], out=target, casting="unsafe")
        return stream


class _Chunks:
    """A file for Arrow's writer that keeps what it is given: bytes of metadata, and buffers as they are."""

    closed = False

    def __init__(self) -> None:
        self.chunks: list[bytes | pa.Buffer] = []
        self.num_bytes = 0

    def write(self, chunk: bytes | pa.Buffer) -> int:
        self.chunks.append(chunk)
        self.num_bytes += len(chunk)
        return len(chunk)

    def flush(self) -> None:
        """Nothing is held back."""

    def close(self) -> None:
        """Nothing is open."""
