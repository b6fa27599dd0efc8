"""The one versioned Arrow schema of a trajectory batch, and the check of its structure.

One row a trajectory; P prompt tokens, T response tokens, S version segments, K top-K.
A *rollout* batch (stage 3) has

==================== =================== ==================================================================
trajectory                 int64               number given out by the store
prompt_id            utf8                `Prompt.id`
prompt_token_ids     list<int32> [P]     the student's prompt
response_token_ids   list<int32> [T]     sampled tokens, at least one
behavior_logprobs    list<G> [T]         log-probs of the sampled tokens under the sampling student (nats)
version_starts       list<int32> [S]     response position at which a segment starts; the first is 0
version_values       list<int64> [S]     policy version of the segment's tokens
finish_reason        utf8                why the response ended
temperature          float32             sampling temperature
top_p                float32             sampled nucleus mass
==================== =================== ==================================================================

and, where the support is the student's (``support="student_topk"``), also

===================== ================================ ======================================================
student_topk_ids      list<fixed_size_list<int32, K>>  [T, K] the sampling student's K most probable ids
===================== ================================ ======================================================

A *scored* batch (stage 5) has the columns of the first table and

===================== ================================ ======================================================
teacher_logprobs      list<G> [T]                      the teacher's log-probs of the sampled tokens (nats)
teacher_topk_ids      list<fixed_size_list<int32, K>>  [T, K] the support: K ids that the teacher was scored at
teacher_topk_logprobs list<fixed_size_list<F, K>>      [T, K] the teacher's log-probs there (nats)
===================== ================================ ======================================================

The support is the teacher's K most probable ids (``support="teacher_topk"``), or what was ``student_topk_ids`` before
(``support="student_topk"``): the ids then stand under the new name only, so that a batch never carries them twice.

F and G are float16 or float32. Metadata: schema version, tokenizer fingerprint, kind of support, K of the scored
support (0: not scored), F, K of ``student_topk_ids`` (0: no such column), and G. Nothing is null.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import pyarrow as pa

from opd_ray.errors import SchemaError

SCHEMA_VERSION = 4
FIX = "write it with replay.codec"
SUPPORT_TEACHER_TOPK = "teacher_topk"
SUPPORT_STUDENT_TOPK = "student_topk"
SUPPORTS = (SUPPORT_TEACHER_TOPK, SUPPORT_STUDENT_TOPK)
STUDENT_IDS = "student_topk_ids"
FLOAT_TYPES: dict[str, pa.DataType] = {"float16": pa.float16(), "float32": pa.float32()}
SAMPLED_LOGPROBS = ("behavior_logprobs", "teacher_logprobs")

# Types that no spec changes.
FIXED_TYPES: dict[str, pa.DataType] = {
    "trajectory_id": pa.int64(),
    "prompt_id": pa.utf8(),
    "prompt_token_ids": pa.list_(pa.int32()),
    "response_token_ids": pa.list_(pa.int32()),
    "version_starts": pa.list_(pa.int32()),
    "version_values": pa.list_(pa.int64()),
    "finish_reason": pa.utf8(),
    "temperature": pa.float32(),
    "top_p": pa.float32(),
}
ROLLOUT_COLUMNS = (
    "trajectory_id",
    "prompt_id",
    "prompt_token_ids",
    "response_token_ids",
    "behavior_logprobs",
    "version_starts",
    "version_values",
    "finish_reason",
    "temperature",
    "top_p",
)
TEACHER_COLUMNS = ("teacher_logprobs", "teacher_topk_ids", "teacher_topk_logprobs")
SCORED_COLUMNS = ROLLOUT_COLUMNS + TEACHER_COLUMNS


@dataclass(frozen=True, slots=True)
class BatchSpec:
    """What a batch's metadata say. Raises `SchemaError` on values that no batch can have.

    `top_k` is K of the scored support and 0 in a rollout batch; `logprob_dtype` (float16 or float32) is the dtype of
    `teacher_topk_logprobs`; `tokenizer_fingerprint` identifies the tokenizer that all ids belong to; `support` says
    whose most probable ids the K ids are; `student_top_k` is K of `student_topk_ids`, 0 without that column;
    `sampled_logprob_dtype` (float16 or float32) is the dtype of `behavior_logprobs` and `teacher_logprobs`.
    """

    tokenizer_fingerprint: str
    top_k: int = 0
    logprob_dtype: str = "float16"
    support: str = SUPPORT_TEACHER_TOPK
    student_top_k: int = 0
    sampled_logprob_dtype: str = "float32"

    def __post_init__(self) -> None:
        if min(self.top_k, self.student_top_k) < 0:
            raise SchemaError(
                f"top_k = {self.top_k} and student_top_k = {self.student_top_k} of a trajectory batch: give at least 0"
            )
        for name, value, allowed in (
            ("logprob_dtype", self.logprob_dtype, [*FLOAT_TYPES]),
            ("sampled_logprob_dtype", self.sampled_logprob_dtype, [*FLOAT_TYPES]),
            ("support", self.support, [*SUPPORTS]),
        ):
            if value not in allowed:
                raise SchemaError(f"{name} = {value!r} of a trajectory batch: give one of {allowed}")
        awaits_teacher = self.support == SUPPORT_STUDENT_TOPK and not self.top_k
        if awaits_teacher != bool(self.student_top_k):
            stage = f"a batch with support {self.support!r} and top_k = {self.top_k}"
            raise SchemaError(
                f"student_top_k = {self.student_top_k} of {stage}: give "
                f"{'at least 1, the ids are to be scored' if awaits_teacher else '0, it has no student_topk_ids'}"
            )

    @property
    def rollout(self) -> BatchSpec:
        """Of a scored batch's spec: the spec of the rollout batch that it is made from."""
        given = self.top_k if self.support == SUPPORT_STUDENT_TOPK else 0
        return BatchSpec(
            self.tokenizer_fingerprint,
            support=self.support,
            student_top_k=given,
            sampled_logprob_dtype=self.sampled_logprob_dtype,
        )

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of all columns, in order."""
        if self.top_k:
            return SCORED_COLUMNS
        return (*ROLLOUT_COLUMNS, STUDENT_IDS) if self.student_top_k else ROLLOUT_COLUMNS

    def type_of(self, column: str) -> pa.DataType:
        """Arrow type of one of `columns`."""
        if column in SAMPLED_LOGPROBS:
            return pa.list_(FLOAT_TYPES[self.sampled_logprob_dtype])
        if column in FIXED_TYPES:
            return FIXED_TYPES[column]
        if column == STUDENT_IDS:
            return pa.list_(pa.list_(pa.int32(), self.student_top_k))
        value = pa.int32() if column == "teacher_topk_ids" else FLOAT_TYPES[self.logprob_dtype]
        return pa.list_(pa.list_(value, self.top_k))

    def schema(self) -> pa.Schema:
        """The Arrow schema, metadata included."""
        metadata: dict[str | bytes, str | bytes] = {"schema_version": str(SCHEMA_VERSION)}
        metadata |= {field.name: str(getattr(self, field.name)) for field in fields(self)}
        columns = [pa.field(name, self.type_of(name), nullable=False) for name in self.columns]
        return pa.schema(columns, metadata=metadata)


def read_spec(schema: pa.Schema) -> BatchSpec:
    """What the metadata of `schema` say; raises `SchemaError` when they are missing or of another version."""
    metadata = {
        key.decode(errors="replace"): value.decode(errors="replace") for key, value in (schema.metadata or {}).items()
    }
    needed = ["schema_version", *(field.name for field in fields(BatchSpec))]
    missing = [key for key in needed if key not in metadata]
    if missing:
        raise SchemaError(f"metadata {missing} are missing from a trajectory batch: {FIX}")
    if metadata["schema_version"] != str(SCHEMA_VERSION):
        raise SchemaError(
            f"metadata schema_version of a trajectory batch is {metadata['schema_version']!r} and "
            f"'{SCHEMA_VERSION}' is expected: run every worker with the same version of opd_ray"
        )
    for key in ("top_k", "student_top_k"):
        if not metadata[key].isdecimal():
            raise SchemaError(f"metadata {key} = {metadata[key]!r} of a trajectory batch is no number: {FIX}")
    return BatchSpec(
        tokenizer_fingerprint=metadata["tokenizer_fingerprint"],
        top_k=int(metadata["top_k"]),
        logprob_dtype=metadata["logprob_dtype"],
        support=metadata["support"],
        student_top_k=int(metadata["student_top_k"]),
        sampled_logprob_dtype=metadata["sampled_logprob_dtype"],
    )


def check_spec(found: BatchSpec, expected: BatchSpec) -> None:
    """Raise `SchemaError` naming the first metadata entry that differs."""
    for field in fields(BatchSpec):
        have, want = getattr(found, field.name), getattr(expected, field.name)
        if have != want:
            raise SchemaError(
                f"metadata {field.name} of a trajectory batch is {have!r} and {want!r} is expected: "
                "give student, teacher and learner the same tokenizer and the same top-K and log-prob settings"
            )


def check_types(batch: pa.RecordBatch, spec: BatchSpec) -> None:
    """Raise `SchemaError` naming the first column that `spec` does not know or that has another type."""
    for field in batch.schema:
        if field.name not in spec.columns:
            raise SchemaError(
                f"column {field.name!r} is not one of a trajectory batch's {list(spec.columns)}: leave it out"
            )
        expected = spec.type_of(field.name)
        if field.type != expected:
            raise SchemaError(f"column {field.name!r} has type {field.type} and {expected} is expected: {FIX}")
