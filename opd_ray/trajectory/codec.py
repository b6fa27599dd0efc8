"""Trajectory batches to Arrow IPC stream bytes and back; decoding copies nothing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from opd_ray.errors import SchemaError
from opd_ray.trajectory.columns import Array, ArrowArray, check_values
from opd_ray.trajectory.rows import RolloutRow
from opd_ray.trajectory.schema import (
    ROLLOUT_COLUMNS,
    STUDENT_IDS,
    TEACHER_COLUMNS,
    BatchSpec,
    check_spec,
    check_types,
    read_spec,
)
from opd_ray.trajectory.stream import StreamDraft

FIX = "check what wrote it"


def encode_rollouts(rows: Sequence[RolloutRow], spec: BatchSpec) -> pa.Buffer:
    """A rollout batch (stage 3) as bytes; raises `SchemaError` when `spec` or a value is wrong."""
    if spec.top_k:
        raise SchemaError(f"top_k = {spec.top_k} of a rollout batch: give 0, and K to add_teacher_columns")
    draft = StreamDraft()
    columns = [_column(name, [getattr(row, name) for row in rows], spec, draft) for name in spec.columns]
    return _write(columns, spec, draft)


def add_teacher_columns(
    batch: pa.RecordBatch,
    teacher_logprobs: Sequence[Array],
    teacher_topk_ids: Sequence[Array] | None,
    teacher_topk_logprobs: Sequence[Array],
    spec: BatchSpec,
) -> pa.Buffer:
    """A scored batch (stage 5) as bytes: `batch` and one array a trajectory, [T], [T, K] and [T, K].

    `teacher_topk_ids` is None where `batch` brings its support with it: its `student_topk_ids` are taken over as they
    are. Log-probs of another float type are rounded to the schema's. Raises `SchemaError` when a shape or a value is
    wrong, or `spec` speaks of another tokenizer or support than `batch`.
    """
    if not spec.top_k:
        raise SchemaError("top_k = 0 of a scored batch: give K")
    check_spec(read_spec(batch.schema), spec.rollout)
    if (teacher_topk_ids is None) != (STUDENT_IDS in batch.schema.names):
        raise SchemaError(
            f"column 'teacher_topk_ids' of a batch with support {spec.support!r}: give its arrays for 'teacher_topk', "
            "and None for 'student_topk', where the batch has them"
        )
    draft = StreamDraft()
    given = dict(zip(TEACHER_COLUMNS, (teacher_logprobs, teacher_topk_ids, teacher_topk_logprobs), strict=True))
    columns = [batch.column(name) for name in ROLLOUT_COLUMNS]
    for name, arrays in given.items():
        if arrays is None:
            columns.append(batch.column(STUDENT_IDS))
            continue
        if len(arrays) != batch.num_rows:
            raise SchemaError(
                f"column {name!r} has {len(arrays)} rows and {batch.num_rows} are expected: give one each"
            )
        columns.append(_column(name, arrays, spec, draft))
    return _write(columns, spec, draft)


def decode(buffer: Any, *, columns: Iterable[str] | None = None, expected: BatchSpec | None = None) -> pa.RecordBatch:
    """The record batch in `buffer` (`pyarrow.Buffer` or any bytes-like object), checked, without a copy.

    `columns` are the only ones kept and checked (None: all); with `expected` the metadata must match it.
    Raises `SchemaError` when the bytes are no trajectory batch, or metadata, types, lengths or values are
    wrong.
    """
    batch, names = _read(buffer)
    spec = read_spec(batch.schema)
    if expected is not None:
        check_spec(spec, expected)
    wanted = list(spec.columns) if columns is None else list(columns)
    missing = [name for name in wanted if names.count(name) != 1]
    if missing:
        raise SchemaError(f"columns {missing} are missing or doubled in a trajectory batch with {names}: {FIX}")
    kept = batch.select(wanted)
    _check(kept, spec)
    return kept


def _column(name: str, values: Sequence[Any], spec: BatchSpec, draft: StreamDraft) -> ArrowArray:
    kind = spec.type_of(name)
    if not pa.types.is_list(kind):
        return pa.array(values, type=kind)
    arrays = [np.asarray(value) for value in values]
    tail = (kind.value_type.list_size,) if pa.types.is_fixed_size_list(kind.value_type) else ()
    item = kind.value_type.value_type if tail else kind.value_type
    for row, array in enumerate(arrays):
        if array.ndim != 1 + len(tail) or array.shape[1:] != tail:
            expected = f"[T, {tail[0]}]" if tail else "[T]"
            raise SchemaError(f"column {name!r}, row {row}, has shape {array.shape} and {expected} is expected: {FIX}")
    starts = np.zeros(len(arrays) + 1, dtype=np.int32)
    np.cumsum([len(array) for array in arrays], out=starts[1:])
    _check_convertible(name, arrays, np.dtype(item.to_pandas_dtype()))
    leaf = draft.room(arrays, item)
    inner: ArrowArray = pa.FixedSizeListArray.from_arrays(leaf, type=kind.value_type) if tail else leaf
    return pa.ListArray.from_arrays(pa.array(starts, type=pa.int32()), inner, type=kind)


def _check_convertible(name: str, arrays: Sequence[Array], dtype: np.dtype[Any]) -> None:
    """Raise `SchemaError` where floats would become integers, or integers wrap."""
    for array in arrays:
        if array.dtype == dtype or not array.size:
            continue
        if (array.dtype.kind in "iu") != (dtype.kind == "i"):
            raise SchemaError(f"column {name!r} has dtype {array.dtype} and {dtype} is expected: {FIX}")
        if dtype.kind == "i":
            limits = np.iinfo(dtype.name)
            for value in (array.max(), array.min()):
                if not limits.min <= value <= limits.max:
                    raise SchemaError(f"column {name!r} has the value {value}, which does not fit {dtype}: {FIX}")


def _write(columns: Sequence[ArrowArray], spec: BatchSpec, draft: StreamDraft) -> pa.Buffer:
    """Stream bytes of one checked batch."""
    stream = draft.write(pa.RecordBatch.from_arrays(list(columns), schema=spec.schema()))
    _check(_read(stream)[0], spec)
    return stream


def _read(stream: Any) -> tuple[pa.RecordBatch, list[str]]:
    """The batch in a stream, and the names of its columns."""
    try:
        with pa.ipc.open_stream(stream) as reader:
            names = reader.schema.names
            batches = list(reader)
    except (pa.ArrowException, OSError, EOFError, ValueError) as error:
        raise SchemaError(f"bytes are not an Arrow stream of a trajectory batch ({error}): {FIX}") from error
    if len(batches) != 1:
        raise SchemaError(f"an Arrow stream has {len(batches)} record batches and 1 is expected: {FIX}")
    return batches[0], names


def _check(batch: pa.RecordBatch, spec: BatchSpec) -> None:
    check_types(batch, spec)
    try:
        batch.validate(full=True)
    except pa.ArrowInvalid as error:
        raise SchemaError(f"a trajectory batch is broken ({error}): {FIX}") from error
    check_values(batch)
