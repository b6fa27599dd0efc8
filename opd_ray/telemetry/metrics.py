"""`metrics.jsonl`: one JSON object a line, ``{"step": ..., "time": ..., "role/quantity/stat": ...}``.

A value is a number, null, or a histogram: ``{"edges": [N + 1 numbers], "counts": [N numbers]}``.
"""

from __future__ import annotations

import itertools
import math
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import SupportsFloat

from opd_ray.storage.json_lines import JsonLines
from opd_ray.types import Histogram

METRICS_FILE = "metrics.jsonl"

Metric = SupportsFloat | Histogram
"""What can be logged under a key."""

_KEY = re.compile(r"[a-z0-9_]+(?:/[a-z0-9_]+)+")
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
    """Appends to `metrics.jsonl`; raises `RunFolderError` when the file cannot be opened or written (`JsonLines`)."""

    def __init__(self, folder: Path) -> None:
        self.lines = JsonLines(folder / METRICS_FILE)

    @property
    def path(self) -> Path:
        """The file."""
        return self.lines.path

    def log(self, step: int, metrics: Mapping[str, Metric]) -> None:
        """Append one line; `time` is the wall clock in seconds since 1970, non-finite values become null.

        Raises:
            RunFolderError: the line cannot be written (nothing of it is left) or the writer is closed.
            ValueError: a key or a value is not a metric's (`checked_metrics`).
        """
        values = {key: _as_json(value) for key, value in checked_metrics(metrics).items()}
        self.lines.append({"step": int(step), "time": round(time.time(), 3), **values})

    def close(self) -> None:
        """Close the file; closing twice does no harm."""
        self.lines.close()


def _as_json(value: float | Histogram) -> float | dict[str, tuple[float, ...]] | None:
    if isinstance(value, Histogram):
        return {"edges": value.edges, "counts": value.counts}
    return value if math.isfinite(value) else None
