"""What is refused when a batch is written or read, and what the refusal says."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from opd_ray.errors import SchemaError
from opd_ray.trajectory.codec import add_teacher_columns, decode, encode_rollouts
from opd_ray.trajectory.columns import row_views
from opd_ray.trajectory.rows import scored_rows
from opd_ray.trajectory.schema import BatchSpec
from tests.unit.replay.batches import (
    FINGERPRINT,
    ROLLOUT,
    scored_buffer,
    teacher_arrays,
    trajectories,
    with_student_ids,
)

INT32 = np.int32


def stream(batch: pa.RecordBatch, times: int = 1) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        for _ in range(times):
            writer.write_batch(batch)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"behavior_logprobs": np.zeros(4, np.float32)},
            "'behavior_logprobs', row 1 .*another number of entries",
        ),
        ({"response_token_ids": np.zeros(0, INT32)}, "'response_token_ids', row 1 .*empty response"),
        ({"response_token_ids": np.array([1, -1, 2, 3, 4], INT32)}, "'response_token_ids' has the value -1"),
        ({"response_token_ids": np.array([1, 2**31, 2, 3, 4])}, "value 2147483648, which does not fit int32"),
        ({"response_token_ids": np.array([1, -(2**31) - 1, 2, 3, 4])}, "value -2147483649, which does not fit int32"),
        ({"response_token_ids": np.zeros(5, np.float32)}, "dtype float32 and int32 is expected"),
        ({"behavior_logprobs": np.zeros(5, np.int64)}, "dtype int64 and float32 is expected"),
        ({"behavior_logprobs": np.zeros((5, 1), np.float32)}, r"has shape \(5, 1\) and \[T\] is expected"),
        ({"prompt_token_ids": np.array([-7], INT32)}, "'prompt_token_ids' has the value -7"),
        ({"version_starts": np.array([1], INT32), "version_values": np.array([0])}, "does not start at 0"),
        ({"version_starts": np.array([], INT32), "version_values": np.array([], np.int64)}, "has no segment"),
        (
            {"version_starts": np.array([0, 2, 2], INT32), "version_values": np.arange(3)},
            "'version_starts', row 1: seg",
        ),
        (
            {"version_starts": np.array([0, 3, 2], INT32), "version_values": np.arange(3)},
            "one after the other",
        ),
        (
            {"version_starts": np.array([0, 5], INT32), "version_values": np.arange(2)},
            "after the response's end",
        ),
        ({"version_starts": np.array([0, 2], INT32), "version_values": np.arange(3)}, "number of segments"),
        (
            {"version_starts": np.array([0], INT32), "version_values": np.array([-1])},
            "'version_values' has the value -1",
        ),
    ],
)
def test_wrong_rollouts_are_not_encoded(changes: dict[str, Any], message: str) -> None:
    rows = trajectories([4, 5, 6])
    rows[1] = dataclasses.replace(rows[1], **changes)
    with pytest.raises(SchemaError, match=message) as caught:
        encode_rollouts(rows, ROLLOUT)
    assert "\n" not in str(caught.value)


def test_wrong_teacher_columns_are_not_encoded() -> None:
    batch = decode(encode_rollouts(trajectories([4, 5]), ROLLOUT))
    spec = BatchSpec(FINGERPRINT, top_k=3)
    logprobs, ids, topk = teacher_arrays([4, 5], 3)
    with pytest.raises(SchemaError, match="'teacher_logprobs' has 1 rows and 2 are expected"):
        add_teacher_columns(batch, logprobs[:1], ids, topk, spec)
    with pytest.raises(SchemaError, match=r"'teacher_topk_ids', row 0, has shape \(4, 2\) and \[T, 3\]"):
        add_teacher_columns(batch, logprobs, [ids[0][:, :2], ids[1]], topk, spec)
    with pytest.raises(SchemaError, match="'teacher_topk_logprobs', row 1 .*another number of entries"):
        add_teacher_columns(batch, logprobs, ids, [topk[0], topk[1][:4]], spec)
    with pytest.raises(SchemaError, match="'teacher_topk_ids' has the value -1"):
        add_teacher_columns(batch, logprobs, [ids[0] * 0 - 1, ids[1]], topk, spec)
    with pytest.raises(SchemaError, match="tokenizer_fingerprint .* is 'tok-1' and 'tok-2' is expected"):
        add_teacher_columns(batch, logprobs, ids, topk, BatchSpec("tok-2", top_k=3))
    with pytest.raises(SchemaError, match="top_k = 0 of a scored batch"):
        add_teacher_columns(batch, logprobs, ids, topk, ROLLOUT)
    with pytest.raises(SchemaError, match="top_k = 3 of a rollout batch"):
        encode_rollouts(trajectories([4]), spec)


@pytest.mark.parametrize(
    "expected",
    [
        BatchSpec("tok-2", top_k=3),
        BatchSpec(FINGERPRINT, top_k=4),
        BatchSpec(FINGERPRINT, top_k=3, logprob_dtype="float32"),
        BatchSpec(FINGERPRINT, top_k=3, support="student_topk"),
        BatchSpec(FINGERPRINT, top_k=3, sampled_logprob_dtype="float16"),
        ROLLOUT,
    ],
)
def test_metadata_must_be_the_expected(expected: BatchSpec) -> None:
    with pytest.raises(SchemaError, match="^metadata .* is expected"):
        decode(scored_buffer([4], BatchSpec(FINGERPRINT, top_k=3)), expected=expected)


def test_each_hop_checks_the_dtype_of_sampled_logprobs() -> None:
    halves = BatchSpec(FINGERPRINT, top_k=3, sampled_logprob_dtype="float16")
    message = "metadata sampled_logprob_dtype .* is 'float32' and 'float16' is expected"
    plain = encode_rollouts(trajectories([4]), ROLLOUT)
    with pytest.raises(SchemaError, match=message):
        decode(plain, expected=halves.rollout)
    with pytest.raises(SchemaError, match=message):
        add_teacher_columns(decode(plain), *teacher_arrays([4], 3), halves)
    metadata = decode(plain).schema.metadata | {b"sampled_logprob_dtype": b"float16"}
    with pytest.raises(SchemaError, match=r"'behavior_logprobs' has type list<.*float.* and list<.*halffloat"):
        decode(stream(decode(plain).replace_schema_metadata(metadata)))


STUDENT = BatchSpec(FINGERPRINT, top_k=3, support="student_topk")


def test_wrong_student_ids_are_not_encoded() -> None:
    (row,) = with_student_ids(trajectories([4]), 3)
    ids = row.student_topk_ids
    assert ids is not None
    wrong: Any
    for wrong, message in (
        (ids[:, :2], r"'student_topk_ids', row 0, has shape \(4, 2\) and \[T, 3\] is expected"),
        (ids[:3], "'student_topk_ids', row 0 .*another number of entries than response tokens"),
        (ids - 101, "'student_topk_ids' has the value -"),
        (ids.astype(np.float32), "'student_topk_ids' has dtype float32 and int32 is expected"),
        (None, r"'student_topk_ids', row 0, has shape \(\) and \[T, 3\] is expected"),
    ):
        with pytest.raises(SchemaError, match=message):
            encode_rollouts([dataclasses.replace(row, student_topk_ids=wrong)], STUDENT.rollout)


def test_each_hop_checks_whose_support_it_is() -> None:
    plain = encode_rollouts(trajectories([4]), ROLLOUT)
    handed = encode_rollouts(with_student_ids(trajectories([4]), 3), STUDENT.rollout)
    own = BatchSpec(FINGERPRINT, top_k=3)
    logprobs, ids, topk = teacher_arrays([4], 3)
    with pytest.raises(SchemaError, match="metadata support .* is 'teacher_topk' and 'student_topk' is expected"):
        decode(plain, expected=STUDENT.rollout)
    with pytest.raises(SchemaError, match="metadata support .* is 'student_topk' and 'teacher_topk' is expected"):
        decode(handed, expected=ROLLOUT)
    with pytest.raises(SchemaError, match="metadata support .* is 'student_topk' and 'teacher_topk' is expected"):
        add_teacher_columns(decode(handed), logprobs, ids, topk, own)
    with pytest.raises(SchemaError, match="metadata support .* is 'teacher_topk' and 'student_topk' is expected"):
        add_teacher_columns(decode(plain), logprobs, None, topk, STUDENT)
    wider = BatchSpec(FINGERPRINT, top_k=4, support="student_topk")
    with pytest.raises(SchemaError, match="metadata student_top_k .* is 3 and 4 is expected"):
        decode(handed, expected=wider.rollout)
    with pytest.raises(SchemaError, match="metadata top_k .* is 0 and 3 is expected"):
        decode(handed, expected=STUDENT)
    for given_ids, batch, spec in ((ids, handed, STUDENT), (None, plain, own)):
        with pytest.raises(SchemaError, match="'teacher_topk_ids' .*: give its arrays for 'teacher_topk', and None"):
            add_teacher_columns(decode(batch), logprobs, given_ids, topk, spec)


def test_bytes_of_another_schema_version_are_refused() -> None:
    batch = decode(encode_rollouts(trajectories([4]), ROLLOUT))
    older = batch.replace_schema_metadata((batch.schema.metadata or {}) | {b"schema_version": b"1"})
    with pytest.raises(SchemaError, match="schema_version of a trajectory batch is '1' and '4' is expected"):
        decode(stream(older))


def test_bytes_that_are_no_batch_are_refused() -> None:
    whole = encode_rollouts(trajectories([4]), ROLLOUT).to_pybytes()
    for broken in (b"", b"nonsense", whole[:40], whole[: len(whole) // 2]):
        with pytest.raises(SchemaError):
            decode(broken)
    for times in (0, 2):
        with pytest.raises(SchemaError, match=f"has {times} record batches and 1 is expected"):
            decode(stream(decode(whole), times))


def test_offsets_outside_the_values_are_refused() -> None:
    whole = encode_rollouts(trajectories([4, 9]), ROLLOUT).to_pybytes()
    right, wrong = (np.array(offsets, INT32).tobytes() for offsets in ([0, 4, 13], [0, 4, 1000]))
    assert whole.count(right) == 2  # ids and log-probs, still of equal lengths after the change
    with pytest.raises(SchemaError, match="is broken"):
        decode(whole.replace(right, wrong))


def test_damaged_bytes_are_refused_or_read() -> None:
    whole = bytearray(encode_rollouts(trajectories([4, 9]), ROLLOUT).to_pybytes())
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(300):
        damaged = bytearray(whole)
        damaged[rng.integers(len(whole))] ^= 1 << rng.integers(8)
        try:
            decode(bytes(damaged))
        except SchemaError:
            refused += 1
    assert refused > 50


def test_foreign_columns_and_types_are_refused() -> None:
    batch = decode(encode_rollouts(trajectories([4]), ROLLOUT))
    metadata = batch.schema.metadata

    def changed(name: str, values: Any, kind: pa.DataType) -> bytes:
        index = batch.schema.get_field_index(name)
        other = batch.set_column(index, pa.field(name, kind), pa.array(values, type=kind))
        return stream(other.replace_schema_metadata(metadata))

    with pytest.raises(SchemaError, match="'trajectory_id' has type int32 and int64 is expected"):
        decode(changed("trajectory_id", [1], pa.int32()))
    with pytest.raises(SchemaError, match="'prompt_id' has 1 nulls"):
        decode(changed("prompt_id", [None], pa.utf8()))
    with pytest.raises(SchemaError, match="'response_token_ids' has 1 nulls"):
        decode(changed("response_token_ids", [[1, None, 3, 4]], pa.list_(pa.int32())))
    decode(changed("prompt_id", [None], pa.utf8()), columns=["trajectory_id"])  # not asked for, not checked
    with pytest.raises(SchemaError, match=r"columns \['top_p'\] are missing or doubled"):
        decode(stream(batch.drop_columns(["top_p"])))
    with pytest.raises(SchemaError, match=r"\['reward'\] are missing or doubled"):
        decode(stream(batch), columns=["reward"])
    with pytest.raises(SchemaError, match=r"metadata .* are missing"):
        decode(stream(batch.replace_schema_metadata({})))
    with pytest.raises(SchemaError, match="schema_version of a trajectory batch is '99'"):
        decode(stream(batch.replace_schema_metadata({**metadata, b"schema_version": b"99"})))
    with pytest.raises(SchemaError, match="top_k = 'many'"):
        decode(stream(batch.replace_schema_metadata({**metadata, b"top_k": b"many"})))


def test_reading_a_column_that_was_left_out_says_so() -> None:
    batch = decode(scored_buffer([4], BatchSpec(FINGERPRINT, top_k=2)), columns=["trajectory_id"])
    with pytest.raises(SchemaError, match="'teacher_topk_ids' is not among the decoded"):
        row_views(batch, "teacher_topk_ids")
    with pytest.raises(SchemaError, match="'prompt_id' is not among the decoded"):
        scored_rows(batch)


@pytest.mark.parametrize(
    "options",
    [
        {"top_k": -1},
        {"logprob_dtype": "float64"},
        {"sampled_logprob_dtype": "bfloat16"},
        {"support": "union"},
        {"student_top_k": 3},
        {"student_top_k": -1, "support": "student_topk"},
        {"support": "student_topk"},
        {"support": "student_topk", "top_k": 3, "student_top_k": 3},
    ],
)
def test_impossible_specs_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(SchemaError):
        BatchSpec(FINGERPRINT, **options)
