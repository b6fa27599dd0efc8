"""Arrow bytes of trajectory batches: round trips, sizes, projections, copies."""

from __future__ import annotations

import dataclasses
import pickle
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opd_ray.trajectory.codec import add_teacher_columns, decode, encode_rollouts
from opd_ray.trajectory.columns import row_views
from opd_ray.trajectory.rows import rollout_rows, scored_rows, training_rows
from opd_ray.trajectory.schema import BatchSpec, read_spec
from opd_ray.trajectory.versions import expand_versions, version_segments
from tests.unit.replay.batches import (
    FINGERPRINT,
    ROLLOUT,
    scored_buffer,
    teacher_arrays,
    trajectories,
    with_student_ids,
)


def assert_same_fields(found: Any, expected: Any) -> None:
    for field in dataclasses.fields(type(expected)):
        have, want = getattr(found, field.name), getattr(expected, field.name)
        if isinstance(want, np.ndarray):
            np.testing.assert_array_equal(have, want)
            assert have.dtype == want.dtype, field.name
        else:
            assert have == want, field.name


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.integers(0, 1000))
def test_rollouts_come_back_as_they_were(lengths: list[int], seed: int) -> None:
    given_rows = trajectories(lengths, seed)
    batch = decode(encode_rollouts(given_rows, ROLLOUT), expected=ROLLOUT)
    for found, expected in zip(rollout_rows(batch), given_rows, strict=True):
        assert_same_fields(found, expected)
        assert found.token_versions.shape == found.response_token_ids.shape


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_scored_batches_come_back_as_they_were(dtype: str) -> None:
    lengths, spec = [7, 1, 30], BatchSpec(FINGERPRINT, top_k=4, logprob_dtype=dtype)
    batch = decode(scored_buffer(lengths, spec), expected=spec)
    assert read_spec(batch.schema) == spec
    arrays = teacher_arrays(lengths, 4)
    for row, rollout, logprobs, ids, topk in zip(scored_rows(batch), trajectories(lengths), *arrays, strict=True):
        assert_same_fields(row, rollout)
        np.testing.assert_array_equal(row.teacher_logprobs, logprobs)
        np.testing.assert_array_equal(row.teacher_topk_ids, ids)
        np.testing.assert_array_equal(row.teacher_topk_logprobs, topk.astype(dtype))
        assert row.teacher_topk_ids.dtype == np.int32
        assert row.teacher_topk_logprobs.dtype == np.dtype(dtype)
        assert row.teacher_topk_ids.shape == (len(logprobs), 4)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.integers(1, 9))
def test_the_students_ids_come_back_as_they_were(lengths: list[int], top_k: int) -> None:
    given_rows = with_student_ids(trajectories(lengths), top_k)
    spec = BatchSpec(FINGERPRINT, support="student_topk", student_top_k=top_k)
    batch = decode(encode_rollouts(given_rows, spec), expected=spec)
    assert read_spec(batch.schema) == spec
    for found, expected in zip(rollout_rows(batch), given_rows, strict=True):
        assert_same_fields(found, expected)


@pytest.mark.parametrize("rows", [slice(0, 3), slice(1, 2)])
def test_the_students_ids_become_the_support(rows: slice) -> None:
    lengths, spec = [7, 1, 30], BatchSpec(FINGERPRINT, 4, "float32", "student_topk")
    given_rows = with_student_ids(trajectories(lengths), 4)
    start, count = rows.start, rows.stop - rows.start
    batch = decode(encode_rollouts(given_rows, spec.rollout), expected=spec.rollout).slice(start, count)
    logprobs, _, topk = teacher_arrays(lengths[rows], 4)
    scored = decode(add_teacher_columns(batch, logprobs, None, topk, spec), expected=spec)
    assert scored.schema.names.count("teacher_topk_ids") == 1
    assert "student_topk_ids" not in scored.schema.names
    for row, rollout, values in zip(scored_rows(scored), given_rows[rows], topk, strict=True):
        assert_same_fields(dataclasses.replace(row, student_topk_ids=row.teacher_topk_ids), rollout)
        np.testing.assert_array_equal(row.teacher_topk_logprobs, values)


@pytest.mark.parametrize(("dtype", "error"), [("float16", 2.0**-11), ("float32", 0.0)])
def test_sampled_logprobs_are_rounded_to_the_specs_dtype(dtype: str, error: float) -> None:
    lengths, spec = [7, 1, 30], BatchSpec(FINGERPRINT, top_k=4, sampled_logprob_dtype=dtype)
    batch = decode(scored_buffer(lengths, spec), expected=spec)
    teacher = teacher_arrays(lengths, 4)[0]
    found_rows: list[Any] = [scored_rows(batch), training_rows(batch)]
    for rows in found_rows:
        for row, rollout, logprobs in zip(rows, trajectories(lengths), teacher, strict=True):
            for found, given_values in (
                (row.behavior_logprobs, rollout.behavior_logprobs),
                (row.teacher_logprobs, logprobs),
            ):
                assert found.dtype == np.dtype(dtype)
                np.testing.assert_allclose(found.astype(np.float32), given_values, rtol=error, atol=0)


@pytest.mark.parametrize("top_k", [1, 3])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_the_bytes_are_those_that_arrow_writes(top_k: int, dtype: str) -> None:
    buffer = scored_buffer([7, 1, 30], BatchSpec(FINGERPRINT, top_k, dtype, sampled_logprob_dtype=dtype))
    batch = decode(buffer)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    assert buffer.to_pybytes() == sink.getvalue().to_pybytes()


def test_arrays_in_any_layout_are_written() -> None:
    logprobs, ids, topk = teacher_arrays([6, 2], 3)
    batch, spec = decode(encode_rollouts(trajectories([6, 2]), ROLLOUT)), BatchSpec(FINGERPRINT, 3, "float32")
    plain = add_teacher_columns(batch, logprobs, ids, topk, spec)
    turned = [np.asfortranarray(values) for values in topk]
    reversed_twice = [values[::-1].copy()[::-1] for values in ids]
    assert add_teacher_columns(batch, logprobs, reversed_twice, turned, spec).equals(plain)


@pytest.mark.parametrize("support", ["teacher_topk", "student_topk"])
def test_bytes_per_token_on_the_wire(support: str) -> None:
    top_k, lengths = 32, [1024] * 32
    spec = BatchSpec(FINGERPRINT, top_k=top_k, support=support)
    size = scored_buffer(lengths, spec).size
    tokens = sum(lengths)
    # 6 bytes for each support entry; id, behaviour and teacher log-prob of the token; little for each row.
    assert size <= tokens * (6 * top_k + 12) + 32 * 256 + 4096
    assert size / tokens <= 6 * top_k + 16
    halved = scored_buffer(lengths, dataclasses.replace(spec, sampled_logprob_dtype="float16")).size
    assert size - halved == pytest.approx(4 * tokens, abs=64)


def test_reading_copies_nothing() -> None:
    buffer = scored_buffer([50, 60], BatchSpec(FINGERPRINT, top_k=8))
    low, high = buffer.address, buffer.address + buffer.size
    before = pa.total_allocated_bytes()
    batch = decode(buffer)
    rows = scored_rows(batch)
    assert pa.total_allocated_bytes() - before < 2000
    for row in rows:
        for field in dataclasses.fields(row):
            value = getattr(row, field.name)
            if isinstance(value, np.ndarray):
                assert low <= value.__array_interface__["data"][0] < high, field.name
                assert not value.flags.writeable, field.name


def test_a_projection_has_only_its_columns() -> None:
    buffer = scored_buffer([5, 6], BatchSpec(FINGERPRINT, top_k=3))
    batch = decode(buffer, columns=["trajectory_id", "response_token_ids", "teacher_topk_ids"])
    assert batch.schema.names == ["trajectory_id", "response_token_ids", "teacher_topk_ids"]
    assert [view.shape for view in row_views(batch, "teacher_topk_ids")] == [(5, 3), (6, 3)]
    for name in ("response_token_ids", "teacher_topk_ids"):
        for view in row_views(batch, name):
            assert 0 <= view.__array_interface__["data"][0] - buffer.address < buffer.size, "a copy was made"
    assert read_spec(batch.schema).top_k == 3


def test_slices_of_a_batch_read_right() -> None:
    batch = decode(scored_buffer([5, 6, 7], BatchSpec(FINGERPRINT, top_k=3)))
    for found, expected in zip(scored_rows(batch.slice(1)), scored_rows(batch)[1:], strict=True):
        assert_same_fields(found, expected)


def test_a_sliced_rollout_batch_can_be_scored() -> None:
    batch = decode(encode_rollouts(trajectories([5, 6, 7]), ROLLOUT)).slice(1, 1)
    buffer = add_teacher_columns(batch, *teacher_arrays([6], 2), BatchSpec(FINGERPRINT, top_k=2))
    (row,) = scored_rows(decode(buffer))
    assert_same_fields(row, trajectories([5, 6, 7])[1])
    assert buffer.size < 4000


@pytest.mark.parametrize("wrap", [bytes, memoryview, lambda b: pickle.loads(pickle.dumps(b, protocol=5))])
def test_any_bytes_like_object_is_decoded(wrap: Any) -> None:
    assert decode(wrap(encode_rollouts(trajectories([3]), ROLLOUT))).num_rows == 1


def test_an_empty_batch_and_a_non_finite_logprob_are_legal() -> None:
    assert decode(encode_rollouts([], ROLLOUT)).num_rows == 0
    (row,) = trajectories([3])
    row.behavior_logprobs[1] = -np.inf
    (found,) = rollout_rows(decode(encode_rollouts([row], ROLLOUT)))
    assert np.isneginf(found.behavior_logprobs[1])


@given(st.lists(st.integers(0, 3), max_size=30))
def test_version_segments_expand_to_what_they_were(versions: list[int]) -> None:
    starts, values = version_segments(versions)
    assert expand_versions(starts, values, len(versions)).tolist() == versions
    assert (np.diff(values) != 0).all()  # shortest form
    assert starts.dtype == np.int32
    assert values.dtype == np.int64


def test_version_segments_by_example() -> None:
    starts, values = version_segments([4, 4, 4, 5, 7, 7])
    assert (starts.tolist(), values.tolist()) == ([0, 3, 4], [4, 5, 7])
