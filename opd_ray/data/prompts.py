"""Prompt files to `Prompt` records: JSON lines, parquet, a folder of parquet files, or a hub data set."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from opd_ray.data.fields import FieldMap
from opd_ray.errors import DataError
from opd_ray.types import Prompt

HUB_PREFIX = "hub:"
JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")

Rows = Iterator[tuple[str, Any]]  # where a row stands, and the row


def read_prompts(
    path: str,
    limit: int | None = None,
    *,
    fields: Mapping[str, str] | None = None,
    unique: bool = False,
) -> list[Prompt]:
    """The prompts of a file, a folder of parquet files, or ``hub:OWNER/NAME[:CONFIG]:SPLIT``, in their order.

    At most `limit` of them (None: all), `index` being the row number in the source. `fields` maps problem,
    answer, solution and id to other keys (`FieldMap`). With `unique` only the first row of each problem text
    is taken; ids must be distinct in any case, and rows without one are called ``row-<index>``. Raises
    `DataError` in one line that names file and line.
    """
    field_map = FieldMap(fields)
    prompts: list[Prompt] = []
    ids: dict[str, str] = {}
    problems: set[str] = set()
    for index, (where, row) in enumerate(_rows(path, field_map)):
        if limit is not None and len(prompts) >= limit:
            break
        prompt = field_map.prompt(row, index, where)
        if unique and prompt.problem in problems:
            continue
        if prompt.id in ids:
            raise DataError(
                f"{where}: id {prompt.id!r} was used before, in {ids[prompt.id]}: make ids distinct, or set "
                "data.fields.id to '' to number the rows"
            )
        problems.add(prompt.problem)
        ids[prompt.id] = where
        prompts.append(prompt)
    if not prompts:
        raise DataError(f"{path}: no prompts were found: give at least one row")
    return prompts


def _rows(path: str, field_map: FieldMap) -> Rows:
    if path.startswith(HUB_PREFIX):
        return _hub_rows(path)
    source = Path(path).expanduser()
    if source.is_dir():
        files = sorted(source.glob("*.parquet"))
        if not files:
            raise DataError(f"{path}: the folder has no .parquet file: give a file or a folder that has some")
        return (row for file in files for row in _parquet_rows(file, field_map))
    if not source.is_file():
        raise DataError(f"{path}: no such file: give a .jsonl or .parquet file, a folder, or hub:OWNER/NAME:SPLIT")
    if source.suffix == ".parquet":
        return _parquet_rows(source, field_map)
    if source.suffix in JSON_SUFFIXES:
        return _json_rows(source)
    raise DataError(f"{path}: suffix {source.suffix!r} is unknown: give {', '.join(JSON_SUFFIXES)} or .parquet")


def _json_rows(file: Path) -> Rows:
    try:
        with file.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                text = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
                if text.strip():
                    yield f"{file}:{number}", _parse(text, f"{file}:{number}")
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror}): check its permissions") from error


def _parse(line: bytes, where: str) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:  # UnicodeDecodeError too
        raise DataError(f"{where}: the line is not JSON ({error}): write one JSON object a line, in UTF-8") from error


def _parquet_rows(file: Path, field_map: FieldMap) -> Rows:
    try:
        with pq.ParquetFile(file) as parquet:
            columns = field_map.columns(parquet.schema_arrow.names)
            number = 0
            for batch in parquet.iter_batches(batch_size=1024, columns=columns):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{file}:{number}", row
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{file}: cannot be read as parquet ({error}): write the file again") from error


def _hub_rows(path: str) -> Rows:
    name, *rest = path.removeprefix(HUB_PREFIX).split(":")
    if name.count("/") != 1 or len(rest) > 2 or "" in (*name.split("/"), *rest):
        raise DataError(f"{path}: not a data set's name: write hub:OWNER/NAME:SPLIT or hub:OWNER/NAME:CONFIG:SPLIT")
    try:
        datasets = importlib.import_module("datasets")
    except ImportError as error:
        raise DataError(
            f"{path}: the package `datasets` is not installed: pip install datasets, or give a local file"
        ) from error
    split = rest[-1] if rest else "train"
    config = rest[0] if len(rest) == 2 else None
    try:
        rows: Iterable[Any] = datasets.load_dataset(name, config, split=split)
    except Exception as error:  # noqa: BLE001 - whatever the hub's client raises, from no network to no such split
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise DataError(f"{path}: cannot be loaded from the hub ({reason}): check name, split and network") from error
    return ((f"{path}:{number}", row) for number, row in enumerate(rows, start=1))
