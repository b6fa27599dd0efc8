"""Views of a batch's columns without a copy, and the check of their values."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from opd_ray.errors import SchemaError

Array = npt.NDArray[Any]
ArrowArray = Any  # the stubs do not type the children of nested arrays

TOKEN_COLUMNS = (
    "behavior_logprobs",
    "student_topk_ids",
    "teacher_logprobs",
    "teacher_topk_ids",
    "teacher_topk_logprobs",
)
ID_COLUMNS = ("prompt_token_ids", "response_token_ids", "student_topk_ids", "teacher_topk_ids", "version_values")


def offsets(column: ArrowArray) -> npt.NDArray[np.int32]:
    """Offsets [B + 1] of a list column's rows in its flat values."""
    array: npt.NDArray[np.int32] = column.offsets.to_numpy()
    return array


def flat_values(column: ArrowArray) -> Array:
    """Values of a column without a copy: [N] of a numeric or list column, [N, K] of a top-K one."""
    values = column.values if pa.types.is_list(column.type) else column
    if not pa.types.is_fixed_size_list(values.type):
        array: Array = values.to_numpy(zero_copy_only=True)
        return array
    flat: Array = values.flatten().to_numpy(zero_copy_only=True)
    return flat.reshape(-1, values.type.list_size)


def row_views(batch: pa.RecordBatch, name: str) -> list[Array]:
    """One view a trajectory of a list column: [T] (or [P], [S]), or [T, K]; read-only, without a copy.

    Raises `SchemaError` when the batch was decoded without that column.
    """
    if name not in batch.schema.names:
        raise SchemaError(f"column {name!r} is not among the decoded {batch.schema.names}: add it to `columns`")
    column = batch.column(name)
    flat, bounds = flat_values(column), offsets(column).tolist()
    return [flat[start:end] for start, end in zip(bounds, bounds[1:], strict=False)]


def check_values(batch: pa.RecordBatch) -> None:
    """Raise `SchemaError` naming the first column (and row) whose values cannot be right.

    Checked among the columns that are there: no nulls; one entry a response token in behaviour, teacher and
    top-K columns; at least one response token; version segments that start at 0, rise, and stay inside the
    response; ids and versions of at least 0. Non-finite log-probs are legal here: the learner masks and
    counts them.
    """
    present = dict(zip(batch.schema.names, batch.columns, strict=True))
    for name, column in present.items():
        _check_nulls(name, column)
    if "response_token_ids" in present:
        lengths = np.diff(offsets(present["response_token_ids"]))
        _refuse(lengths < 1, "response_token_ids", "an empty response: fail its trajectory instead")
        for name in TOKEN_COLUMNS:
            if name in present:
                wrong = np.diff(offsets(present[name])) != lengths
                _refuse(wrong, name, "another number of entries than response tokens: give one a token")
    if "version_starts" in present:
        _check_segments(present)
    for name in ID_COLUMNS:
        if name in present:
            values = _used_values(present[name])
            if values.size and values.min() < 0:
                raise SchemaError(
                    f"column {name!r} has the value {values.min()} and the least is 0: check what wrote it"
                )


def _check_segments(present: dict[str, ArrowArray]) -> None:
    bounds = offsets(present["version_starts"])
    starts = flat_values(present["version_starts"])
    first, counts = bounds[:-1], np.diff(bounds)
    if "version_values" in present:
        wrong = np.diff(offsets(present["version_values"])) != counts
        _refuse(wrong, "version_values", "another number of segments than version_starts: give one each")
    _refuse(counts < 1, "version_starts", "no segment: the first starts at 0")
    _refuse(starts[first] != 0, "version_starts", "a first segment that does not start at 0: it must")
    rises = np.diff(starts[bounds[0] : bounds[-1]]) > 0
    # From the last segment of one trajectory to the first of the next.
    rises[bounds[1:-1] - bounds[0] - 1] = True
    if not rises.all():
        row = int(np.searchsorted(bounds, bounds[0] + 1 + rises.argmin(), side="right")) - 1
        raise SchemaError(f"column 'version_starts', row {row}: segments must start one after the other, each once")
    if "response_token_ids" in present:
        lengths = np.diff(offsets(present["response_token_ids"]))
        outside = starts[bounds[1:] - 1] >= lengths
        _refuse(outside, "version_starts", "a segment that starts after the response's end: keep inside it")


def _used_values(column: ArrowArray) -> Array:
    bounds = offsets(column)
    return flat_values(column)[bounds[0] : bounds[-1]]


def _check_nulls(name: str, column: ArrowArray) -> None:
    level: ArrowArray = column
    while level is not None:
        if level.null_count:
            raise SchemaError(f"column {name!r} has {level.null_count} nulls and none is expected: give every value")
        nested = pa.types.is_list(level.type) or pa.types.is_fixed_size_list(level.type)
        level = level.values if nested else None


def _refuse(wrong: Array, name: str, what: str) -> None:
    if wrong.any():
        raise SchemaError(f"column {name!r}, row {int(wrong.argmax())} ({int(wrong.sum())} rows in all), has {what}")
