"""The one versioned Arrow schema of a trajectory batch, and the check of its structure.

One row a trajectory; P prompt tokens, T response tokens, S version segments, K top-K.
A *rollout* batch (hop 3) has

==================== =================== ==================================================================
slot                 int64               number given out by the store
prompt_id            utf8                `Prompt.id`
prompt_token_ids     list<int32> [P]     the student's prompt
response_token_ids   list<int32> [T]     sampled tokens, at least one
behavior_logprobs    list<float32> [T]   log-probs of the sampled tokens under the sampling student (nats)
version_starts       list<int32> [S]     response position at which a segment starts; the first is 0
version_values       list<int64> [S]     policy version of the segment's tokens
finish_reason        utf8                why the response ended
temperature          float32             sampling temperature
top_p                float32             sampled nucleus mass
==================== =================== ==================================================================

and a *scored* batch (hop 5) has besides

===================== ================================ ======================================================
teacher_logprobs      list<float32> [T]                the teacher's log-probs of the sampled tokens (nats)
teacher_topk_ids      list<fixed_size_list<int32, K>>  [T, K] the support: the teacher's K most probable ids
teacher_topk_logprobs list<fixed_size_list<F, K>>      [T, K] their log-probs (nats); F is float16 or float32
===================== ================================ ======================================================

Metadata: schema version, K (0: not scored), F, tokenizer fingerprint, kind of support. Nothing is null.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import pyarrow as pa

from opd_ray.errors import SchemaError

SCHEMA_VERSION = 1
FIX = "write it with replay.codec"
SUPPORT_TEACHER_TOPK = "teacher_topk"
FLOAT_TYPES: dict[str, pa.DataType] = {"float16": pa.float16(), "float32": pa.float32()}

ROLLOUT_TYPES: dict[str, pa.DataType] = {
    "slot": pa.int64(),
    "prompt_id": pa.utf8(),
    "prompt_token_ids": pa.list_(pa.int32()),
    "response_token_ids": pa.list_(pa.int32()),
    "behavior_logprobs": pa.list_(pa.float32()),
    "version_starts": pa.list_(pa.int32()),
    "version_values": pa.list_(pa.int64()),
    "finish_reason": pa.utf8(),
    "temperature": pa.float32(),
    "top_p": pa.float32(),
}
ROLLOUT_COLUMNS = tuple(ROLLOUT_TYPES)
TEACHER_COLUMNS = ("teacher_logprobs", "teacher_topk_ids", "teacher_topk_logprobs")
SCORED_COLUMNS = ROLLOUT_COLUMNS + TEACHER_COLUMNS


@dataclass(frozen=True, slots=True)
class BatchSpec:
    """What a batch's metadata say; `top_k` is 0 in a rollout batch. Raises `SchemaError` on bad values.

    `logprob_dtype` (float16 or float32) is the dtype of `teacher_topk_logprobs`; `tokenizer_fingerprint`
    identifies the tokenizer that all ids belong to; `support` says how the K ids were chosen.
    """

    tokenizer_fingerprint: str
    top_k: int = 0
    logprob_dtype: str = "float16"
    support: str = SUPPORT_TEACHER_TOPK

    def __post_init__(self) -> None:
        if self.top_k < 0:
            raise SchemaError(f"top_k = {self.top_k} of a trajectory batch: give at least 0")
        if self.logprob_dtype not in FLOAT_TYPES:
            raise SchemaError(
                f"logprob_dtype = {self.logprob_dtype!r} of a trajectory batch: give one of {[*FLOAT_TYPES]}"
            )

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of all columns, in order."""
        return SCORED_COLUMNS if self.top_k else ROLLOUT_COLUMNS

    def type_of(self, column: str) -> pa.DataType:
        """Arrow type of one of `columns`."""
        if column in ROLLOUT_TYPES:
            return ROLLOUT_TYPES[column]
        if column == "teacher_logprobs":
            return pa.list_(pa.float32())
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
    if not metadata["top_k"].isdecimal():
        raise SchemaError(f"metadata top_k = {metadata['top_k']!r} of a trajectory batch: a whole number is expected")
    return BatchSpec(
        tokenizer_fingerprint=metadata["tokenizer_fingerprint"],
        top_k=int(metadata["top_k"]),
        logprob_dtype=metadata["logprob_dtype"],
        support=metadata["support"],
    )


def check_spec(found: BatchSpec, expected: BatchSpec) -> None:
    """Raise `SchemaError` naming the first metadata entry that differs."""
    for field in fields(BatchSpec):
        have, want = getattr(found, field.name), getattr(expected, field.name)
        if have != want:
            raise SchemaError(
                f"metadata {field.name} of a trajectory batch is {have!r} and {want!r} is expected: "
                "give student, teacher and learner the same tokenizer and the same top-K settings"
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
