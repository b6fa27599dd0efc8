"""One trajectory as numpy arrays, and the trajectories of a decoded batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from opd_ray.trajectory.columns import row_views
from opd_ray.trajectory.schema import ROLLOUT_COLUMNS, SCORED_COLUMNS, STUDENT_IDS
from opd_ray.trajectory.versions import expand_versions

Row = TypeVar("Row")


@dataclass(frozen=True, slots=True, eq=False)
class RolloutRow:
    """Stage 3: one sampled trajectory of P prompt and T response tokens; units and meaning as in `schema`.

    `student_topk_ids` is there between sampling and scoring, where the support is the student's.
    """

    trajectory_id: int
    prompt_id: str
    prompt_token_ids: npt.NDArray[np.int32]  # [P]
    response_token_ids: npt.NDArray[np.int32]  # [T]
    behavior_logprobs: npt.NDArray[np.floating[Any]]  # [T]
    version_starts: npt.NDArray[np.int32]  # [S]
    version_values: npt.NDArray[np.int64]  # [S]
    finish_reason: str
    temperature: float
    top_p: float
    student_topk_ids: npt.NDArray[np.int32] | None = field(default=None, kw_only=True)  # [T, K]

    @property
    def token_versions(self) -> npt.NDArray[np.int64]:
        """Policy version of every response token, [T]."""
        return expand_versions(self.version_starts, self.version_values, len(self.response_token_ids))


@dataclass(frozen=True, slots=True, eq=False)
class ScoredRow(RolloutRow):
    """Stage 5: a trajectory with the teacher's view of its response."""

    teacher_logprobs: npt.NDArray[np.floating[Any]]  # [T]
    teacher_topk_ids: npt.NDArray[np.int32]  # [T, K]
    teacher_topk_logprobs: npt.NDArray[np.floating[Any]]  # [T, K]


@dataclass(frozen=True, slots=True, eq=False)
class TrainingRow:
    """Stage 9: what a learner reads of a trajectory; None is a column that its objective has no use for."""

    prompt_token_ids: npt.NDArray[np.int32]  # [P]
    response_token_ids: npt.NDArray[np.int32]  # [T]
    behavior_logprobs: npt.NDArray[np.floating[Any]]  # [T]
    teacher_logprobs: npt.NDArray[np.floating[Any]]  # [T]
    teacher_topk_ids: npt.NDArray[np.int32] | None = None  # [T, K]
    teacher_topk_logprobs: npt.NDArray[np.floating[Any]] | None = None  # [T, K]
    version_starts: npt.NDArray[np.int32] | None = None  # [S]
    version_values: npt.NDArray[np.int64] | None = None  # [S]

    @property
    def token_versions(self) -> npt.NDArray[np.int64] | None:
        """Policy version of every response token, [T]."""
        if self.version_starts is None or self.version_values is None:
            return None
        return expand_versions(self.version_starts, self.version_values, len(self.response_token_ids))


def rollout_rows(batch: pa.RecordBatch) -> list[RolloutRow]:
    """The trajectories of a batch that has all rollout columns; arrays are read-only views."""
    given = [STUDENT_IDS] if STUDENT_IDS in batch.schema.names else []
    return _rows(batch, [*ROLLOUT_COLUMNS, *given], RolloutRow)


def scored_rows(batch: pa.RecordBatch) -> list[ScoredRow]:
    """The trajectories of a batch that has all scored columns; arrays are read-only views."""
    return _rows(batch, SCORED_COLUMNS, ScoredRow)


def training_rows(batch: pa.RecordBatch) -> list[TrainingRow]:
    """The trajectories of a scored batch that may lack what `TrainingRow` can; arrays are read-only views."""
    given = [f.name for f in fields(TrainingRow) if f.default is MISSING or f.name in batch.schema.names]
    return _rows(batch, given, TrainingRow)


def _rows(batch: pa.RecordBatch, names: Sequence[str], make: Callable[..., Row]) -> list[Row]:
    """Columns that a projection left out raise `SchemaError`; `columns.row_views` reads single columns."""
    values: list[list[Any]] = []
    for name in names:
        if name not in batch.schema.names or pa.types.is_list(batch.schema.field(name).type):
            values.append(row_views(batch, name))
        else:
            values.append(batch.column(name).to_pylist())
    return [make(**dict(zip(names, row, strict=True))) for row in zip(*values, strict=True)]
