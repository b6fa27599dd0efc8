"""One picture that answers whether the gate does anything: drift, gate, weights, KL and support over a run.

``python -m opd_ray.report.gate_diagnostics runs/latest --out gate.png``, with matplotlib installed.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

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
from opd_ray.types import Histogram

FloatArray = npt.NDArray[np.float64]

_PREFIXES = ("gate/", "support/", "learner/kl/")
_MAX_COLUMNS = 150
_FAINTEST = 1e-3
"""Rows with less of all segments, at the top and the bottom of the map, are cut off."""
_NUM_DECILES = 10
_DECILE_LABEL = "tenth of the response"
_LATE = "second half of the run"
_MAX_LEVELS = 8


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    return plot_command("opd_ray.report.gate_diagnostics", __doc__, plot_gate, arguments)


@dataclass(frozen=True, slots=True)
class RunDiagnostics:
    """A run's numbers and histograms, by key and step."""

    numbers: dict[str, dict[int, float]] = field(default_factory=dict)
    histograms: dict[str, dict[int, Histogram]] = field(default_factory=dict)

    def of_gated_steps(self) -> RunDiagnostics:
        """Without the ``gate/*`` of steps in which all segments were fresh, and so open by definition."""
        shares = self.numbers.get("gate/measured_share", {})
        fresh = {step for step, share in shares.items() if share == 0}

        def kept(key: str, step: int) -> bool:
            return step not in fresh or not key.startswith("gate/") or key.startswith("gate/engine_mismatch/")

        return RunDiagnostics(
            {key: {s: v for s, v in values.items() if kept(key, s)} for key, values in self.numbers.items()},
            {key: {s: h for s, h in values.items() if kept(key, s)} for key, values in self.histograms.items()},
        )

    def late_mean(self, key: str) -> float | None:
        """Mean over the second half of the steps that have the key; None without any."""
        values = self.numbers.get(key, {})
        late = [values[step] for step in sorted(values)[len(values) // 2 :]]
        return sum(late) / len(late) if late else None

    def late_groups(self, key: str) -> dict[int, float]:
        """`late_mean` of each ``{key}{number}``, by number."""
        numbers = sorted(int(end) for name in self.numbers if (end := name.removeprefix(key)).isdecimal())
        return {number: self.late_mean(f"{key}{number}") or 0.0 for number in numbers}

    def weight_ratio(self, groups: str) -> dict[int, float]:
        """Share of the weight over share of the tokens in the second half, by number of the group; 1 = no gate."""
        tokens = self.late_groups(f"gate/token_share/{groups}_")
        weight = self.late_groups(f"gate/weight_share/{groups}_")
        return {number: weight[number] / tokens[number] for number in weight if tokens.get(number)}

    def late_histogram(self, key: str) -> Histogram | None:
        """Sum over the second half of the steps that have the key and the newest step's edges."""
        histograms = self.histograms.get(key, {})
        late = [histograms[step] for step in sorted(histograms)[len(histograms) // 2 :]]
        if not late:
            return None
        edges = late[-1].edges
        counts = np.sum([histogram.counts for histogram in late if histogram.edges == edges], axis=0)
        return Histogram(edges, tuple(counts.tolist()))


def read_diagnostics(path: Path) -> RunDiagnostics:
    """Read the keys of `metrics.jsonl` that the picture is about; of a step logged twice the later value counts.

    Raises:
        DataError: the file is missing or malformed, or has none of these keys.
    """
    run = RunDiagnostics()
    for step, record in read_records(path):
        for key, value in record.items():
            if not key.startswith(_PREFIXES):
                continue
            if isinstance(value, Mapping):
                run.histograms.setdefault(key, {})[step] = _as_histogram(value, f"{path}, step {step}, {key}")
            elif isinstance(value, int | float):
                run.numbers.setdefault(key, {})[step] = float(value)
    if not run.numbers and not run.histograms:
        raise DataError(f"{path} has no diagnostics (gate/*, learner/kl/*, support/*): give a run with steps")
    return run


def _as_histogram(value: Mapping[str, Any], where: str) -> Histogram:
    try:
        edges, counts = (tuple(float(number) for number in value[name]) for name in ("edges", "counts"))
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{where}: not a histogram of edges and counts") from error
    if len(edges) != len(counts) + 1 or any(low >= high for low, high in itertools.pairwise(edges)):
        raise DataError(f"{where}: {len(edges)} edges and {len(counts)} counts are no histogram")
    return Histogram(edges, counts)


def plot_gate(run: Path, out: Path) -> None:
    """Plot the run folder `run` into the picture `out`; steps in which all segments were fresh show no gate.

    Raises:
        DataError: the folder has no diagnostics, matplotlib is missing, or the picture cannot be written.
    """
    found = read_diagnostics(run / "metrics.jsonl").of_gated_steps()
    figure = new_figure(f"{run.resolve().name}: is the gate doing anything?", 10.4, 11.6)
    panels = figure.subplots(4, 2)
    draws = (_draw_drift, _draw_drift_map, _draw_gate, _draw_weights, _draw_shares, _draw_kl)
    for axes, draw in zip(panels.flat, (*draws, _draw_correlation, _draw_support), strict=True):
        draw(axes, found)
    save_figure(figure, out)


def _draw_drift(axes: Any, run: RunDiagnostics) -> None:
    median, high = (run.numbers.get(f"gate/drift_abs/measured_{name}", {}) for name in ("p50", "p95"))
    mismatch = run.numbers.get("gate/engine_mismatch/rms", {})
    steps = sorted(median.keys() & high.keys())
    if steps:
        lows, highs = [median[step] for step in steps], [high[step] for step in steps]
        axes.fill_between(steps, lows, highs, color=COLORS[0], alpha=0.18, linewidth=0)
        draw_line(axes, high, COLORS[0], "p95", linewidth=1.0)
        draw_line(axes, median, COLORS[0], "median", linewidth=1.8)
    if mismatch:
        draw_line(axes, mismatch, COLORS[1], "engine mismatch", linewidth=1.2, linestyle="--")
    if any(value > 0 for values in (median, high, mismatch) for value in values.values()):
        axes.set_yscale("log", nonpositive="clip")
    finish_axes(axes, "|drift|", "nats", bool(steps or mismatch))


def _draw_drift_map(axes: Any, run: RunDiagnostics) -> None:
    grid = drift_map(run.histograms.get("gate/drift_abs/histogram", {}))
    if grid is not None:
        steps, edges, shares = grid
        mesh = axes.pcolormesh(steps, edges, shares.T, cmap="Blues", vmin=0, shading="flat")
        axes.set_yscale("log")
        bar = axes.figure.colorbar(mesh, ax=axes, pad=0.01, aspect=30)
        bar.outline.set_visible(False)
        bar.ax.tick_params(labelsize=7, colors=INK, length=2)
    finish_axes(axes, "measured segments by |drift|", "nats; share of the step's", grid is not None)


def drift_map(histograms: Mapping[int, Histogram]) -> tuple[FloatArray, FloatArray, FloatArray] | None:
    """Column edges (steps), row edges (nats) and shares [columns, rows] of the rows in use; None without any.

    At most 150 columns, each the mean of neighbouring steps with a histogram, meeting half-way. The row of zero and
    below begins a fifth of a decade down.
    """
    newest = histograms[max(histograms)].edges if histograms else ()
    steps = [s for s in sorted(histograms) if histograms[s].edges == newest and any(histograms[s].counts)]
    if not steps:
        return None
    edges = np.array(newest)
    counts = np.array([histograms[step].counts for step in steps])
    shares = counts / counts.sum(1, keepdims=True)
    groups = np.array_split(np.arange(len(steps)), min(_MAX_COLUMNS, len(steps)))
    between = [(steps[left[-1]] + steps[right[0]]) / 2 for left, right in itertools.pairwise(groups)]
    used = np.flatnonzero(shares.mean(0) >= _FAINTEST)
    low, high = max(used[0] - 1, 0), min(used[-1] + 1, len(edges) - 2)
    rows = edges[low : high + 2].copy()
    if rows[0] <= 0:
        rows[0] = rows[1] / 10**0.2
    columns = np.array([shares[group].mean(0) for group in groups])
    return np.array([steps[0] - 0.5, *between, steps[-1] + 0.5]), rows, columns[:, low : high + 1]


def _draw_gate(axes: Any, run: RunDiagnostics) -> None:
    keys = {"min": "gate/value/min", "p05": "gate/value/p05", "mean": "gate/value/mean"}
    drawn = [name for name, key in keys.items() if run.numbers.get(key)]
    for name, color in zip(drawn, (COLORS[1], COLORS[3], COLORS[0]), strict=False):
        draw_line(axes, run.numbers[keys[name]], color, name)
    share = run.numbers.get("gate/effective_sample_share", {})
    if share:
        draw_line(axes, share, COLORS[2], "effective sample", linestyle="--")
    if drawn or share:
        axes.axhline(1.0, color=INK, linewidth=0.8, linestyle=":")
    finish_axes(axes, "raw gate", "1 = open", bool(drawn or share))


def _draw_weights(axes: Any, run: RunDiagnostics) -> None:
    histogram = run.late_histogram("gate/weight/histogram")
    if histogram is not None:
        edges, counts = np.array(histogram.edges), np.array(histogram.counts)
        shares = counts / max(counts.sum(), 1)
        used = np.flatnonzero(counts[2:])
        # The first two bins, zero and nearly so, have no place on a logarithmic axis: they are told in words.
        first = 2 + (used[0] if len(used) else 0)
        last = 2 + (used[-1] if len(used) else 0)
        small = counts[:2].sum() / max(counts.sum(), 1)
        centers = np.sqrt(edges[first : last + 1] * edges[first + 1 : last + 2])
        widths = np.diff(edges[first : last + 2]) * 0.92
        axes.bar(centers, shares[first : last + 1], width=widths, color=COLORS[0], alpha=0.85)
        axes.set_xscale("log")
        if len(used):
            axes.set_yscale("log")
        axes.axvline(1.0, color=INK, linewidth=0.8, linestyle=":")
        axes.text(0.02, 0.9, f"below {edges[2]:.1g}: {small:.2%}", transform=axes.transAxes, fontsize=8, color=INK)
    finish_axes(axes, "tokens by weight", _LATE, histogram is not None, "normalised weight")


def _draw_shares(axes: Any, run: RunDiagnostics) -> None:
    ratios = run.weight_ratio("position")
    by_staleness = run.weight_ratio("staleness")
    levels = list(by_staleness)
    # Of many stalenesses some, the lowest and the highest among them.
    shown = [levels[i] for i in np.unique(np.linspace(0, len(levels) - 1, min(len(levels), _MAX_LEVELS)).astype(int))]
    places = [_NUM_DECILES + 1 + index for index in range(len(shown))]
    _draw_stems(axes, list(ratios), list(ratios.values()), COLORS[0])
    _draw_stems(axes, places, [by_staleness[level] for level in shown], COLORS[1])
    if ratios:
        axes.axhline(1.0, color=INK, linewidth=0.8, linestyle=":")
        axes.set_xticks(
            [*range(_NUM_DECILES), *places], [*range(1, _NUM_DECILES + 1), *(f"s{level}" for level in shown)]
        )
        axes.margins(y=0.2)
        axes.ticklabel_format(axis="y", useOffset=False)
    label = f"{_DECILE_LABEL}, then staleness"
    finish_axes(axes, "share of weight / share of tokens", _LATE, bool(ratios), label)


def _draw_stems(axes: Any, places: Sequence[int], ratios: Sequence[float], color: str) -> None:
    axes.vlines(places, 1.0, ratios, color=color, linewidth=2.2)
    axes.plot(places, ratios, "o", color=color, markersize=5)


def _draw_kl(axes: Any, run: RunDiagnostics) -> None:
    kl = run.late_groups("learner/kl/position_")
    if kl:
        axes.bar(list(kl), list(kl.values()), width=0.7, color=COLORS[1], alpha=0.9)
        axes.set_xticks(range(_NUM_DECILES), range(1, _NUM_DECILES + 1))
    finish_axes(axes, "KL to the teacher by position", f"nats, {_LATE}", bool(kl), _DECILE_LABEL)


def _draw_correlation(axes: Any, run: RunDiagnostics) -> None:
    correlation = run.numbers.get("gate/kl_correlation/pearson", {})
    if correlation:
        draw_line(axes, correlation, COLORS[3], "")
        axes.axhline(0.0, color=INK, linewidth=0.8, linestyle=":")
        axes.set_ylim(-1.05, 1.05)
    finish_axes(axes, "gate against KL over segments", "Pearson", bool(correlation))


def _draw_support(axes: Any, run: RunDiagnostics) -> None:
    keys = {
        "mass": "support/student_mass/mean",
        "mass p05": "support/student_mass/p05",
        "overlap": "support/overlap_ratio/mean",
    }
    drawn = [name for name, key in keys.items() if run.numbers.get(key)]
    for name in drawn:
        draw_line(axes, run.numbers[keys[name]], COLORS[list(keys).index(name)], name)
    alarms = sorted(step for step, value in run.numbers.get("support/alarm", {}).items() if value > 0)
    if alarms:
        axes.plot(alarms, [0.02] * len(alarms), "|", color="#c0392b", markersize=7, label="alarm")
    if drawn:
        axes.set_ylim(0, 1.05)
    finish_axes(axes, "student on the support", "", bool(drawn))


if __name__ == "__main__":
    sys.exit(main())
