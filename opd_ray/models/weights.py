"""A set of weights as flat byte buckets: what the learner publishes and a rollout engine loads.

One bucket is one contiguous uint8 array, so that Ray's object store hands it over without a copy.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import xxhash

from opd_ray.errors import WeightSyncError

BUCKET_BYTES = 512 * 2**20


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Where one tensor lies in a bucket; `name` is the Hugging Face checkpoint's, `offset` counts bytes.

    Tied tensors have one spec for each of their names, all at the same offset.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class WeightBucket:
    """Some tensors of the model in one uint8 array of ``sum(num_bytes)`` bytes."""

    specs: tuple[TensorSpec, ...]
    data: npt.NDArray[np.uint8]

    @property
    def checksum(self) -> str:
        """xxh3-128 over the specs and the bytes."""
        digest = xxhash.xxh3_128(repr(self.specs).encode())
        digest.update(self.data)  # type: ignore[arg-type]  # an array is a buffer
        return digest.hexdigest()


def pack_buckets(
    tensors: Iterable[tuple[tuple[str, ...], torch.Tensor]], dtype: torch.dtype, bucket_bytes: int = BUCKET_BYTES
) -> Iterator[WeightBucket]:
    """Pack tensors, cast to `dtype`, into buckets of at most `bucket_bytes` (a larger tensor gets its own).

    Each comes with all of its names: a tied one has several, and is packed once.
    """
    pending: list[tuple[tuple[str, ...], torch.Tensor]] = []
    size = 0
    for names, tensor in tensors:
        flat = tensor.detach().to(device="cpu", dtype=dtype).contiguous()
        if pending and size + flat.nbytes > bucket_bytes:
            yield _pack(pending)
            pending, size = [], 0
        pending.append((names, flat))
        size += flat.nbytes
    if pending:
        yield _pack(pending)


def _pack(tensors: list[tuple[tuple[str, ...], torch.Tensor]]) -> WeightBucket:
    data = np.empty(sum(tensor.nbytes for _, tensor in tensors), dtype=np.uint8)
    specs = []
    offset = 0
    for names, tensor in tensors:
        end = offset + tensor.nbytes
        data[offset:end] = tensor.reshape(-1).view(torch.uint8).numpy()
        dtype, shape = str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)
        specs += [TensorSpec(name, dtype, shape, offset, end - offset) for name in names]
        offset = end
    return WeightBucket(tuple(specs), data)


def unpack_bucket(bucket: WeightBucket) -> Iterator[tuple[str, torch.Tensor]]:
    """The bucket's tensors as views of its bytes (read-only memory: copy before writing)."""
    for spec in bucket.specs:
        raw = bucket.data[spec.offset : spec.offset + spec.num_bytes]
        dtype: Any = getattr(torch, spec.dtype)
        with warnings.catch_warnings():
            # torch warns that it cannot mark the view of Ray's memory as read-only.
            warnings.filterwarnings("ignore", message="The given buffer is not writable")
            tensor = torch.frombuffer(raw, dtype=dtype).reshape(spec.shape)
        yield spec.name, tensor


def combined_checksum(buckets: Iterable[WeightBucket]) -> str:
    """One checksum of all buckets, in their order."""
    return xxhash.xxh3_128("".join(bucket.checksum for bucket in buckets).encode()).hexdigest()


def check_same(expected: str, found: str, where: str) -> None:
    """Raise `WeightSyncError` unless the two checksums agree."""
    if expected != found:
        raise WeightSyncError(
            f"{where} received weights with checksum {found}, published was {expected}: "
            "restart the run from its last checkpoint"
        )
