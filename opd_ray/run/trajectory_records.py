"""The trajectories of a run that can be looked into: one Parquet file a step and learner rank, for `opd_ray.inspect`.

``RUN/trajectories/step-000010-rank-0.parquet`` holds what rank 0 had of the step's recorded trajectories, one row each;
step 10 is the one that led to policy version 10. A rank without any writes no file. The tokens' text is in it, so that
a reader needs neither tokenizer nor model. The file's metadata say the schema version and, as JSON, the settings of the
objective and the gate. NaN stands for what was not computed.
"""

from __future__ import annotations

import contextlib
import json
import re
import typing
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from opd_ray.errors import DataError, RunFolderError

RECORDS_FOLDER = "trajectories"
SCHEMA_VERSION = "2"
VERSION_KEY = b"opd_ray_trajectory_dump"
SETTINGS_KEY = b"settings"
_NAMES_IN_VERSION_1 = {"trajectory_id": "slot", "use": "visit"}

_FILE = re.compile(r"step-(\d+)-rank-(\d+)\.parquet")

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True, eq=False)
class RecordedUse:
    """One use of a trajectory in an optimizer step; P prompt and T response tokens, S segments, K top-K, all in nats.

    Attributes:
        step: policy version that the step led to.
        is_fresh: first use at staleness 0, where drift is zero by definition.
        is_measured: the gate measured the drift of this use's segments.
        behavior_from_engine: `behavior_logprobs` are the sampling engine's, not the learner's own of the first use.
        response_pieces: text of each response token; joined they are the response. A token that ends within a
            character has the text of the characters that it completes, which may be none.
        engine_logprobs: log-probs of the sampled tokens as the sampling engine saw them.
        behavior_logprobs: the ones that drift is measured against.
        drift: `current_logprobs` - `behavior_logprobs`; 0 in a fresh use, NaN where the gate does not measure it
            (``gate.drift_tokens``).
        mask: the token takes part in the loss.
        token_weights: weight in the step's loss; the mean over the step's tokens is 1 (``gate.normalize=step``).
        losses: of each token, before its weight.
        kl: KL(student || teacher) over the support, both renormalised on it (the LSM loss).
        entropy: of the student's full distribution.
        segment_drift, segment_gate: the gate's statistic and raw gate of each segment; `segment_tokens` counts the
            tokens that take part.
        teacher_topk_ids: the support, whose most probable ids the replay schema says; with the teacher's and the
            student's log-probs there (of the full vocabulary).
        student_topk_ids: the student's own most probable ids at this step, and their log-probs.
        text_ids, texts: text of every id that the top-K columns name.
    """

    trajectory_id: int
    step: int
    use: int
    staleness: int
    is_fresh: bool
    is_measured: bool
    behavior_from_engine: bool
    tau: float
    prompt_id: str
    finish_reason: str
    temperature: float
    top_p: float
    prompt_token_ids: Ints  # [P]
    prompt_text: str
    response_token_ids: Ints  # [T]
    response_pieces: tuple[str, ...]  # [T]
    token_versions: Ints  # [T]
    mask: Bools  # [T]
    engine_logprobs: Floats  # [T]
    behavior_logprobs: Floats  # [T]
    current_logprobs: Floats  # [T]
    teacher_logprobs: Floats  # [T]
    drift: Floats  # [T]
    token_weights: Floats  # [T]
    losses: Floats  # [T]
    kl: Floats  # [T]
    entropy: Floats  # [T]
    segment_ids: Ints  # [T]
    segment_drift: Floats  # [S]
    segment_gate: Floats  # [S]
    segment_tokens: Ints  # [S]
    teacher_topk_ids: Ints  # [T, K]
    teacher_topk_logprobs: Floats  # [T, K]
    student_at_support_logprobs: Floats  # [T, K]
    student_topk_ids: Ints  # [T, K]
    student_topk_logprobs: Floats  # [T, K]
    text_ids: Ints  # [U]
    texts: tuple[str, ...]  # [U]

    @property
    def drift_abs_max(self) -> float:
        """Largest |drift| of a segment with tokens that take part; 0 where none was measured."""
        return largest_drift(self.segment_drift)


def largest_drift(segment_drift: npt.ArrayLike) -> float:
    """Largest magnitude of a use's segment drifts, NaN left out."""
    values = np.abs(np.asarray(segment_drift, dtype=np.float64))
    return float(np.nanmax(values)) if np.isfinite(values).any() else 0.0


_SCALARS: dict[Any, pa.DataType] = {int: pa.int64(), bool: pa.bool_(), float: pa.float64(), str: pa.utf8()}
_ITEMS: dict[Any, pa.DataType] = {
    Floats: pa.float32(),
    Ints: pa.int64(),
    Bools: pa.bool_(),
    tuple[str, ...]: pa.utf8(),
}
_TOP_K = (
    "teacher_topk_ids",
    "teacher_topk_logprobs",
    "student_at_support_logprobs",
    "student_topk_ids",
    "student_topk_logprobs",
)
_KINDS: dict[str, Any] = typing.get_type_hints(RecordedUse)


def record_schema(settings: Mapping[str, Any]) -> pa.Schema:
    """The Arrow schema of a file, its metadata included; `settings` must be JSON-able."""
    columns = []
    for name in (field.name for field in fields(RecordedUse)):
        kind = _KINDS[name]
        arrow = _SCALARS[kind] if kind in _SCALARS else pa.list_(_ITEMS[kind])
        columns.append(pa.field(name, pa.list_(arrow) if name in _TOP_K else arrow, nullable=False))
    return pa.schema(columns, metadata={VERSION_KEY: SCHEMA_VERSION, SETTINGS_KEY: json.dumps(settings)})


def record_file(folder: Path, step: int, rank: int) -> Path:
    """The file of a step and rank in the record's folder."""
    return folder / f"step-{step:06d}-rank-{rank}.parquet"


def write_records(folder: Path, rank: int, uses: Sequence[RecordedUse], settings: Mapping[str, Any]) -> Path:
    """Write one step's uses, at least one, in place of an older file; it appears whole or not at all.

    Raises:
        RunFolderError: the file cannot be written.
    """
    target = record_file(folder, uses[0].step, rank)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:12]}.tmp")
    schema = record_schema(settings)
    columns = [pa.array([_plain(getattr(use, f.name)) for use in uses], type=f.type) for f in schema]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_arrays(columns, schema=schema), temporary, compression="zstd")
        temporary.replace(target)
    except OSError as error:
        raise RunFolderError(
            f"cannot write {target}: {error.strerror or error}; make room, or set telemetry.record_trajectories=0"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    return target


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, np.ndarray) and value.ndim == 2 else value


def drop_after(folder: Path, step: int) -> None:
    """Remove the files of steps beyond `step`, and what a writer that died left behind."""
    for path in folder.glob(".*.tmp"):
        path.unlink(missing_ok=True)
    for found, path in _files(folder):
        if found > step:
            path.unlink(missing_ok=True)


@dataclass(frozen=True, slots=True)
class DumpEntry:
    """What the overview tells of a recorded use, and where it lies: row `row` of the file `path`."""

    path: Path
    row: int
    trajectory_id: int
    step: int
    use: int
    staleness: int
    num_tokens: int
    drift_abs_max: float


def record_entries(run: Path) -> list[DumpEntry]:
    """All recorded uses of a run folder, in order of step and trajectory.

    Raises:
        DataError: there are none, or a file is damaged or of another version.
    """
    folder = run / RECORDS_FOLDER
    if not run.is_dir():
        raise DataError(f"{run} is no folder: give a run folder (runs/latest is the newest finished one)")
    found = [entry for _, path in _files(folder) for entry in _entries_of(path)]
    if not found:
        raise DataError(f"{run} has no recorded trajectories: run it with telemetry.record_trajectories=1 or more")
    return sorted(found, key=lambda entry: (entry.step, entry.trajectory_id))


def read_uses(entries: Iterable[DumpEntry]) -> list[RecordedUse]:
    """The uses of some entries, in order; raises `DataError` as `record_entries` does."""
    return [_use(_read(entry.path, None).slice(entry.row, 1)) for entry in entries]


def read_settings(path: Path) -> dict[str, Any]:
    """The objective's and the gate's settings that stand in a file; raises `DataError` as `record_entries` does."""
    metadata = _read(path, ["trajectory_id"]).schema.metadata
    try:
        return dict(json.loads(metadata[SETTINGS_KEY]))
    except (KeyError, ValueError, TypeError) as error:
        raise _damaged(path, "its settings cannot be read") from error


def _files(folder: Path) -> list[tuple[int, Path]]:
    """Step and path of all files, in order of step."""
    names = ((_FILE.fullmatch(path.name), path) for path in folder.glob("step-*.parquet"))
    return sorted((int(match[1]), path) for match, path in names if match)


def _entries_of(path: Path) -> list[DumpEntry]:
    names = ["trajectory_id", "step", "use", "staleness", "response_token_ids", "segment_drift"]
    columns = _read(path, names).to_pydict()
    rows = zip(*(columns[name] for name in names), strict=True)
    return [
        DumpEntry(path, row, trajectory_id, step, use, staleness, len(ids), largest_drift(drift))
        for row, (trajectory_id, step, use, staleness, ids, drift) in enumerate(rows)
    ]


def _read(path: Path, columns: list[str] | None) -> pa.Table:
    try:
        schema = pq.read_schema(path)
        version = (schema.metadata or {}).get(VERSION_KEY, b"").decode(errors="replace")
        if version not in ("1", SCHEMA_VERSION):
            raise DataError(
                f"{path} has version {version or 'none'!r} and {SCHEMA_VERSION!r} is expected: read it with the "
                "opd_ray that wrote it"
            )
        old = _NAMES_IN_VERSION_1 if version == "1" else {}
        names = None if columns is None else [old.get(name, name) for name in columns]
        table = pq.read_table(path, columns=names, partitioning=None)
        new = {name: column for column, name in old.items()}
        renamed = table.rename_columns([new.get(name, name) for name in table.column_names])
        return renamed.replace_schema_metadata(table.schema.metadata)
    except (pa.ArrowException, OSError) as error:
        raise _damaged(path, str(error)) from error


def _damaged(path: Path, why: str) -> DataError:
    return DataError(f"{path} is damaged ({why[:200]}): remove it to see the other steps")


def _use(row: pa.Table) -> RecordedUse:
    """The one row of a table."""
    values: dict[str, Any] = {}
    for name, kind in _KINDS.items():
        value = row.column(name)[0]
        if kind in _SCALARS:
            values[name] = value.as_py()
        elif kind == tuple[str, ...]:
            values[name] = tuple(value.as_py())
        elif name in _TOP_K:
            inner = value.values
            flat = inner.flatten().to_numpy(zero_copy_only=False)
            values[name] = flat.reshape(len(inner), -1) if len(inner) else flat.reshape(0, 0)
        else:
            values[name] = value.values.to_numpy(zero_copy_only=False)
    return RecordedUse(**values)
