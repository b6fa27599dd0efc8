"""Every sample of an evaluation as a row of Parquet, so that verdicts can be looked at, compared, and made again."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from opd_ray.config.choices import AnswerFormat
from opd_ray.errors import DataError
from opd_ray.evaluation.grading import GradedSample
from opd_ray.evaluation.verdict import Verdict

FORMAT_VERSION = 1
METADATA_KEY = b"opd_ray"

_FIELDS: list[pa.Field[Any]] = [
    pa.field("benchmark", pa.string(), nullable=False),
    pa.field("problem_id", pa.string(), nullable=False),
    pa.field("problem_index", pa.int32(), nullable=False),
    pa.field("sample", pa.int32(), nullable=False),
    pa.field("response", pa.string(), nullable=False),
    pa.field("num_tokens", pa.int32(), nullable=False),
    pa.field("finish_reason", pa.string(), nullable=False),
    pa.field("extracted", pa.string()),
    pa.field("reference", pa.string(), nullable=False),
    pa.field("verdict", pa.string(), nullable=False),
]
SAMPLES_SCHEMA = pa.schema(_FIELDS)
"""One row a sample, ordered by benchmark, `problem_index` and `sample`; `verdict` is the name of a `Verdict`."""


@dataclass(frozen=True, slots=True)
class SamplesHeader:
    """How the samples of a file were made; lengths in tokens.

    `policy_version` is None for a model that is not in training; `answer_format` is by benchmark.
    """

    model: str
    policy_version: int | None
    temperature: float
    top_p: float
    max_response_tokens: int
    answer_format: Mapping[str, AnswerFormat]
    seed: int


def write_samples(path: Path, samples: Mapping[str, Sequence[GradedSample]], header: SamplesHeader) -> Path:
    """Write the samples of each benchmark, whole or not at all; an older file at `path` is replaced.

    Raises:
        DataError: the file cannot be written.
    """
    rows = [
        asdict(sample) | {"benchmark": name, "verdict": sample.verdict.name}
        for name in sorted(samples)
        for sample in sorted(samples[name], key=lambda sample: (sample.problem_index, sample.sample))
    ]
    values = asdict(header) | {
        "format_version": FORMAT_VERSION,
        "answer_format": {name: found.name for name, found in header.answer_format.items()},
    }
    schema = SAMPLES_SCHEMA.with_metadata({METADATA_KEY: json.dumps(values).encode()})
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            pq.write_table(pa.Table.from_pylist(rows, schema=schema), file, compression="zstd")
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise DataError(
            f"{path} cannot be written ({error.strerror or error}): make room or choose another place"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
    return path


def read_samples(path: Path) -> pa.Table:
    """The rows of a file, with its header in the metadata of the schema.

    Raises:
        DataError: there is no such file, or it is damaged, or not of this format.
    """
    try:
        # The file alone: a folder's name with "=" in it would otherwise become a column.
        with pq.ParquetFile(path) as file:
            table = file.read()
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path} cannot be read as Parquet ({error}): give a file that an evaluation wrote") from error
    if not table.schema.equals(SAMPLES_SCHEMA):
        raise DataError(f"{path} does not hold samples of an evaluation: its columns are {table.schema.names}")
    read_header(table, path)
    return table


def read_header(table: pa.Table, path: Path) -> SamplesHeader:
    """How the samples of a table from `path` were made; raises `DataError` where it does not say."""
    try:
        values: dict[str, Any] = json.loads((table.schema.metadata or {})[METADATA_KEY])
        version = values.pop("format_version")
        if version != FORMAT_VERSION:
            raise DataError(f"{path} has format {version}, this version of opd_ray reads {FORMAT_VERSION}")
        formats = {name: AnswerFormat[found] for name, found in values.pop("answer_format").items()}
        return SamplesHeader(**values, answer_format=formats)
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path} does not say how its samples were made ({error!r}): evaluate again") from error


def to_graded(table: pa.Table, path: Path) -> dict[str, list[GradedSample]]:
    """A table's samples by benchmark; raises `DataError` on an unknown verdict."""
    found: dict[str, list[GradedSample]] = {}
    for row in table.to_pylist():
        if row["verdict"] not in Verdict.__members__:
            raise DataError(f"{path} has the verdict {row['verdict']!r}: give a file that an evaluation wrote")
        name = row.pop("benchmark")
        found.setdefault(name, []).append(GradedSample(**row | {"verdict": Verdict[row["verdict"]]}))
    return found
