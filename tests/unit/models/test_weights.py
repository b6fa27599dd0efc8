"""Weight buckets: packed, checked and unpacked without loss."""

from __future__ import annotations

import pickle

import pytest
import torch

from opd_ray.errors import WeightSyncError
from opd_ray.models.weights import WeightBucket, check_same, combined_checksum, pack_buckets, unpack_bucket


def tensors() -> list[tuple[tuple[str, ...], torch.Tensor]]:
    torch.manual_seed(0)
    named = [("a", (3, 5)), ("b.weight", (7,)), ("scalar", ()), ("c", (64, 2))]
    return [((name,), torch.randn(shape)) for name, shape in named]


@pytest.mark.parametrize("bucket_bytes", [1, 100, 10**6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip(bucket_bytes: int, dtype: torch.dtype) -> None:
    buckets = list(pack_buckets(tensors(), dtype, bucket_bytes))
    found = {name: tensor for bucket in buckets for name, tensor in unpack_bucket(bucket)}
    assert list(found) == [name for (name,), _ in tensors()]
    for (name,), tensor in tensors():
        assert torch.equal(found[name], tensor.to(dtype))
    limit = max(bucket_bytes, max(t.numel() for _, t in tensors()) * dtype.itemsize)
    assert all(bucket.data.nbytes <= limit for bucket in buckets)


def test_checksum_sees_bytes_names_and_order() -> None:
    buckets = list(pack_buckets(tensors(), torch.float32, 100))
    base = combined_checksum(buckets)
    assert base == combined_checksum(pickle.loads(pickle.dumps(buckets)))
    changed = buckets[0].data.copy()
    changed[3] ^= 1
    assert combined_checksum([WeightBucket(buckets[0].specs, changed), *buckets[1:]]) != base
    assert combined_checksum(buckets[::-1]) != base


def test_a_mismatch_is_a_typed_error() -> None:
    with pytest.raises(WeightSyncError, match="rollout-3"):
        check_same("aa", "bb", "rollout-3")
    check_same("aa", "aa", "rollout-3")


def test_a_tied_tensor_is_packed_once_under_all_its_names() -> None:
    tied = torch.randn(8, 3)
    (bucket,) = pack_buckets([(("embedding", "head"), tied)], torch.float32)
    assert bucket.data.nbytes == tied.nbytes
    found = dict(unpack_bucket(bucket))
    assert torch.equal(found["embedding"], tied) and torch.equal(found["head"], tied)
