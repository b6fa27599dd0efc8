"""Right answers by problem, from the Parquet files of samples that a run and `opd_ray.evaluate` leave behind."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from opd_ray.errors import DataError

FOLDER = "evaluation"
AFTER = "after"
"""Samples of the trained student, drawn at the end of its training."""
STUDENT = "student"
"""Samples of the trained student, drawn by `opd_ray.evaluate`, one file a benchmark."""
_COLUMNS = ("benchmark", "problem_id", "problem_index", "verdict", "num_tokens", "finish_reason")
_SETTINGS = ("temperature", "top_p", "max_response_tokens")


@dataclass(frozen=True, slots=True)
class BenchmarkCounts:
    """`counts`: problem id to (samples, right ones); `truncated_share` and `mean_tokens` are over all samples.

    `settings` are how the samples were made, as far as the file says.
    """

    counts: dict[str, tuple[int, int]]
    truncated_share: float
    mean_tokens: float
    settings: dict[str, str] = field(default_factory=dict)

    @property
    def num_samples(self) -> tuple[int, int]:
        """Smallest and largest number of samples of a problem."""
        samples = [n for n, _ in self.counts.values()]
        return min(samples), max(samples)

    def only(self, problems: Sequence[str]) -> BenchmarkCounts:
        """The counts of some problems, in their order."""
        return replace(self, counts={problem: self.counts[problem] for problem in problems})


@dataclass(frozen=True, slots=True)
class RunSamples:
    """Counts by benchmark: `after` from the end of training, `student` from `opd_ray.evaluate`."""

    after: dict[str, BenchmarkCounts]
    student: dict[str, BenchmarkCounts]


def read_run_samples(run: Path) -> RunSamples:
    """Read what there is of a run's samples; both parts are empty for a run without.

    Raises:
        DataError: a file is not Parquet with the columns of samples.
    """
    student: dict[str, BenchmarkCounts] = {}
    for path in sorted((run / FOLDER).glob(f"{STUDENT}-*.parquet")):
        student |= read_counts(path)
    after = run / FOLDER / f"{AFTER}.parquet"
    return RunSamples(read_counts(after) if after.is_file() else {}, student)


def read_counts(path: Path) -> dict[str, BenchmarkCounts]:
    """Read one file of samples, one row each; responses themselves are not read.

    Raises:
        DataError: it is not Parquet with the columns of samples.
    """
    # Only here: the other readers of this package work without pyarrow.
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    try:
        schema = pq.read_schema(path)
        missing = set(_COLUMNS) - set(schema.names)
        if missing:
            raise DataError(f"{path} has no column {', '.join(sorted(missing))}: evaluate again with opd_ray.evaluate")
        table = pq.read_table(path, columns=list(_COLUMNS))
        rows = table.append_column(
            "right", pc.cast(pc.equal(table["verdict"], pa.scalar("correct")), pa.int32())
        ).append_column("cut", pc.cast(pc.equal(table["finish_reason"], pa.scalar("length")), pa.int32()))
        problems = rows.group_by(["benchmark", "problem_id", "problem_index"]).aggregate(
            [("right", "count"), ("right", "sum"), ("cut", "sum"), ("num_tokens", "sum")]
        )
        header = json.loads((schema.metadata or {}).get(b"opd_ray", b"{}"))
    except (pa.ArrowException, OSError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path} is not a Parquet file of samples: evaluate again with opd_ray.evaluate") from error
    records: dict[str, list[dict[str, Any]]] = {}
    for record in problems.to_pylist():
        records.setdefault(record["benchmark"], []).append(record)
    return {name: _gathered(records[name], _settings(header, name)) for name in sorted(records)}


def _gathered(records: list[dict[str, Any]], settings: dict[str, str]) -> BenchmarkCounts:
    samples = sum(record["right_count"] for record in records)
    ids = [record["problem_id"] for record in records]
    # Where a source repeats an id, its row tells the problems apart.
    keys = ids if len(set(ids)) == len(ids) else [f"{r['problem_id']}#{r['problem_index']}" for r in records]
    return BenchmarkCounts(
        counts={key: (r["right_count"], r["right_sum"]) for key, r in zip(keys, records, strict=True)},
        truncated_share=sum(record["cut_sum"] for record in records) / samples,
        mean_tokens=sum(record["num_tokens_sum"] for record in records) / samples,
        settings=settings,
    )


def _settings(header: object, benchmark: str) -> dict[str, str]:
    if not isinstance(header, Mapping):
        return {}
    formats = header.get("answer_format")
    found = {key: header.get(key) for key in _SETTINGS}
    found["answer_format"] = formats.get(benchmark) if isinstance(formats, Mapping) else None
    return {key: str(value) for key, value in found.items() if value is not None}
