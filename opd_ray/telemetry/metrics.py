"""`metrics.jsonl`: one JSON object a line, ``{"step": ..., "time": ..., "role/quantity/stat": ...}``.

A value is a number, null, or a histogram: ``{"edges": [N + 1 numbers], "counts": [N numbers]}``.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import SupportsFloat

from opd_ray.errors import RunFolderError
from opd_ray.types import Histogram

METRICS_FILE = "metrics.jsonl"

Metric = SupportsFloat | Histogram
"""What can be logged under a key."""

_KEY = re.compile(r"[a-z0-9_]+(?:/[a-z0-9_]+)+")
_TAIL_BYTES = 1 << 16
_MAX_BINS = 512


def checked_metrics(metrics: Mapping[str, Metric]) -> dict[str, float | Histogram]:
    """Return the metrics with plain float values and histograms of plain floats.

    Raises:
        ValueError: a key is not ``role/quantity`` or longer in lower case, a value is neither a number nor a
            histogram, or a histogram is not one: edges that do not rise or are not finite, counts that are
            negative or not finite or not one fewer than edges, no bin or more than W&B takes (512).
    """
    checked: dict[str, float | Histogram] = {}
    for key, value in metrics.items():
        if not _KEY.fullmatch(key):
            raise ValueError(f"metric key {key!r} must be role/quantity or role/quantity/stat in lower case")
        if isinstance(value, Histogram):
            checked[key] = _checked_histogram(key, value)
            continue
        try:
            checked[key] = float(value)
        except (TypeError, ValueError):
            raise ValueError(f"metric {key} must be a number or a histogram, got {value!r}") from None
    return checked


def _checked_histogram(key: str, histogram: Histogram) -> Histogram:
    edges = tuple(float(edge) for edge in histogram.edges)
    counts = tuple(float(count) for count in histogram.counts)
    if len(edges) != len(counts) + 1 or not 1 <= len(counts) <= _MAX_BINS:
        raise ValueError(
            f"histogram {key} has {len(edges)} edges and {len(counts)} counts; "
            f"give 1 to {_MAX_BINS} counts and one edge more"
        )
    if not all(map(math.isfinite, edges)) or any(low >= high for low, high in itertools.pairwise(edges)):
        raise ValueError(f"histogram {key} has edges that do not rise or are not finite")
    if not all(math.isfinite(count) and count >= 0 for count in counts):
        raise ValueError(f"histogram {key} has counts that are negative or not finite")
    return Histogram(edges, counts)


class MetricsWriter:
    """Appends to `metrics.jsonl`. A line is handed to the system as a whole, so a kill can cut the last one at most.

    Opening an existing file goes on after its last whole line. Raises `RunFolderError` when the file cannot
    be opened or written.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / METRICS_FILE
        self._fd: int | None = None
        try:
            self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
            _drop_broken_line(self._fd)
        except OSError as error:
            self.close()
            raise RunFolderError(f"cannot write {self.path}: {error.strerror}") from error

    def log(self, step: int, metrics: Mapping[str, Metric]) -> None:
        """Append one line; `time` is the wall clock in seconds since 1970, non-finite values become null.

        Raises:
            RunFolderError: the line cannot be written (nothing of it is left) or the writer is closed.
            ValueError: a key or a value is not a metric's (`checked_metrics`).
        """
        values = {key: _as_json(value) for key, value in checked_metrics(metrics).items()}
        record = {"step": int(step), "time": round(time.time(), 3), **values}
        self._append(json.dumps(record, allow_nan=False).encode() + b"\n")

    def close(self) -> None:
        """Close the file; closing twice does no harm."""
        fd, self._fd = self._fd, None
        if fd is not None:
            os.close(fd)

    def _append(self, line: bytes) -> None:
        if self._fd is None:
            raise RunFolderError(f"cannot write {self.path}: the writer is closed")
        size = os.fstat(self._fd).st_size
        try:
            written = 0
            while written < len(line):
                written += os.write(self._fd, line[written:])
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, size)
            raise RunFolderError(f"cannot write {self.path}: {error.strerror}") from error


def _as_json(value: float | Histogram) -> float | dict[str, tuple[float, ...]] | None:
    if isinstance(value, Histogram):
        return {"edges": value.edges, "counts": value.counts}
    return value if math.isfinite(value) else None


def _drop_broken_line(fd: int) -> None:
    """Cut off what follows the last line end: a line that a killed machine did not finish."""
    size = keep = os.fstat(fd).st_size
    while keep > 0:
        start = max(0, keep - _TAIL_BYTES)
        newline = os.pread(fd, keep - start, start).rfind(b"\n")
        if newline >= 0:
            keep = start + newline + 1
            break
        keep = start
    if keep != size:
        os.ftruncate(fd, keep)
