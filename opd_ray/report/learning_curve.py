"""One picture of a run: loss, gate, drift and evaluation over the steps.

``python -m opd_ray.report.learning_curve runs/latest --out curve.png``, with matplotlib installed.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from opd_ray.errors import DataError
from opd_ray.report.figures import (
    COLORS,
    INK,
    draw_line,
    finish_axes,
    new_figure,
    plot_command,
    read_records,
    save_figure,
)

Series = dict[str, dict[int, float]]
"""Metric key to its finite values by step."""

_GATE_KEYS = ("gate/value/min", "gate/value/p05")
_LOSS_KEY = "learner/loss/mean"
_DRIFT_PREFIX = "gate/drift_abs/staleness_"
_EVALUATION_PREFIX = "evaluation/avg_at_"
_SMOOTHING = 0.8


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    return plot_command("opd_ray.report.learning_curve", __doc__, plot_run, arguments)


def plot_run(run: Path, out: Path) -> None:
    """Plot the run folder `run` into the picture `out`.

    Raises:
        DataError: the folder has no metrics, matplotlib is missing, or the picture cannot be written.
    """
    series = read_series(run / "metrics.jsonl")
    summary = _read_summary(run / "summary.json")
    figure = new_figure(run.resolve().name, 9.6, 5.6)
    (loss, gate), (drift, evaluation) = figure.subplots(2, 2)
    _draw_loss(loss, series)
    _draw_gate(gate, series)
    _draw_drift(drift, series)
    _draw_evaluation(evaluation, series, summary)
    save_figure(figure, out)


def read_series(path: Path) -> Series:
    """Read `metrics.jsonl`; of a step that was logged twice (a resumed run) the later value counts.

    Histograms are left out.

    Raises:
        DataError: the file is missing, empty, or not made of JSON objects with a step.
    """
    series: Series = {}
    for step, record in read_records(path):
        for key, value in record.items():
            if isinstance(value, int | float):
                series.setdefault(key, {})[step] = float(value)
    if not series:
        raise DataError(f"{path} has no metrics yet")
    return series


def _read_summary(path: Path) -> Mapping[str, Any]:
    """The summary of a finished run; empty for one that is still going."""
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return summary if isinstance(summary, dict) else {}


def _draw_loss(axes: Any, series: Series) -> None:
    values = series.get(_LOSS_KEY, {})
    if values:
        steps = sorted(values)
        raw = [values[step] for step in steps]
        axes.plot(steps, raw, color=COLORS[0], linewidth=0.8, alpha=0.35)
        axes.plot(steps, smoothed(raw), color=COLORS[0], linewidth=1.8)
    finish_axes(axes, "loss", "", bool(values))


def _draw_gate(axes: Any, series: Series) -> None:
    keys = [key for key in _GATE_KEYS if key in series]
    for key, color in zip(keys, COLORS[1:], strict=False):
        draw_line(axes, series[key], color, key.rsplit("/", 1)[1])
    if keys:
        axes.axhline(1.0, color=INK, linewidth=0.8, linestyle=":")
    finish_axes(axes, "gate of a segment", "1 = open", bool(keys))


def _draw_drift(axes: Any, series: Series) -> None:
    levels = _drift_levels(series)
    for level, color in zip(levels, COLORS, strict=False):
        draw_line(axes, series[f"{_DRIFT_PREFIX}{level}"], color, f"{level}")
    finish_axes(axes, "mean |drift| by staleness", "nats a token", bool(levels))


def _drift_levels(series: Series) -> list[int]:
    """The stalenesses (optimizer steps) that drift was recorded for, in order."""
    found = (key.removeprefix(_DRIFT_PREFIX) for key in series if key.startswith(_DRIFT_PREFIX))
    return sorted(int(level) for level in found if level.isdecimal())


def _draw_evaluation(axes: Any, series: Series, summary: Mapping[str, Any]) -> None:
    keys = sorted(key for key in series if key.startswith(_EVALUATION_PREFIX))
    label = "avg@n"
    for key in keys[:1]:
        n = key.removeprefix(_EVALUATION_PREFIX)
        label = f"avg@{n}"
        draw_line(axes, series[key], COLORS[2], "student", marker="o", markersize=4)
        teacher = (summary.get("eval") or {}).get("teacher") or {}
        if f"avg_at_{n}" in teacher:
            axes.axhline(teacher[f"avg_at_{n}"], color=INK, linewidth=1.0, linestyle="--", label="teacher")
        axes.set_ylim(0, 1.05)
    finish_axes(axes, f"{label} on held-out problems", "", bool(keys))


def smoothed(values: Iterable[float]) -> list[float]:
    """Exponential moving average without the pull of its start value."""
    smooth: list[float] = []
    total = weight = 0.0
    for value in values:
        total = _SMOOTHING * total + (1 - _SMOOTHING) * value
        weight = _SMOOTHING * weight + (1 - _SMOOTHING)
        smooth.append(total / weight)
    return smooth


if __name__ == "__main__":
    sys.exit(main())
