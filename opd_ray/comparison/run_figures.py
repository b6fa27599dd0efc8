"""Figures of a run's metrics and summary besides its scores: gate and drift, time and tokens, curves over its steps."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from opd_ray.comparison.record import Curve, Spread
from opd_ray.comparison.run_record import RunRecord
from opd_ray.errors import DataError
from opd_ray.report.gate_diagnostics import read_diagnostics
from opd_ray.report.learning_curve import Series, read_series, smoothed

EVALUATION, LOSS = "evaluation", "learner/loss/mean"
KL_TO_TEACHER = "learner/kl_to_teacher/mean"
GATE_P05, EFFECTIVE = "gate/value/p05", "gate/effective_sample_share"
DRIFT_P50, DRIFT_P95 = "gate/drift_abs/measured_p50", "gate/drift_abs/measured_p95"
STALENESS, STALENESS_MAX = "replay/staleness/mean", "replay/staleness/max"
STEPS, TRAINING_S, WALL_S = "steps", "training_s", "wall_s"
TOKENS_PER_S, LOSS_TOKENS = "tokens_per_s", "loss_tokens"

GATE_FIGURES = (GATE_P05, EFFECTIVE, DRIFT_P50, DRIFT_P95)
"""Means over the second half of the steps in which the gate had anything to measure."""
STALENESS_FIGURES = (STALENESS, STALENESS_MAX)
COST_FIGURES = (STEPS, TRAINING_S, WALL_S, TOKENS_PER_S, LOSS_TOKENS)
_GATED_CURVES = frozenset(GATE_FIGURES)
_CURVES = (KL_TO_TEACHER, LOSS, *GATE_FIGURES, STALENESS)
_SMOOTHED = frozenset((KL_TO_TEACHER, LOSS, STALENESS))
"""Staleness goes up and down with each use; its level is what tells variants apart."""
_AVG_AT = re.compile(r"evaluation/avg_at_[0-9]+")
_MAX_POINTS = 300


@dataclass(frozen=True, slots=True)
class RunFigures:
    """One run's figures by name, and its series by curve and step."""

    figures: dict[str, float]
    series: Series


def read_figures(run: RunRecord) -> RunFigures:
    """Read `metrics.jsonl` and the summary; a run without metrics has the summary's figures only.

    Raises:
        DataError: the metrics are malformed.
    """
    figures = {key: float(run.summary[key]) for key in COST_FIGURES if _is_number(run.summary.get(key))}
    path = run.path / "metrics.jsonl"
    if not path.is_file() or path.stat().st_size == 0:
        return RunFigures(figures, {})
    every = read_series(path)
    series = {key: values for key, values in every.items() if key in _CURVES and key not in _GATED_CURVES}
    for key in _SMOOTHED & series.keys():
        steps = sorted(series[key])
        series[key] = dict(zip(steps, smoothed(series[key][step] for step in steps), strict=True))
    averages = sorted(key for key in every if _AVG_AT.fullmatch(key))
    if averages:
        series[EVALUATION] = every[averages[0]]
    if "learner/tokens/loss" in every:
        figures[LOSS_TOKENS] = sum(every["learner/tokens/loss"].values())
    try:
        gated = read_diagnostics(path).of_gated_steps()
    except DataError:
        gated = None
    if gated is not None:
        series |= {key: gated.numbers[key] for key in GATE_FIGURES if gated.numbers.get(key)}
        late = {key: gated.late_mean(key) for key in GATE_FIGURES}
        figures |= {key: value for key, value in late.items() if value is not None}
    for key in STALENESS_FIGURES:
        if every.get(key):
            values = every[key].values()
            figures[key] = max(values) if key == STALENESS_MAX else sum(values) / len(values)
    return RunFigures(figures, series)


def answer_figures(benchmark: str) -> tuple[str, str]:
    """Names of the figures of a benchmark's answers: the share that was cut at the limit, and the mean tokens."""
    return f"answers/truncated_share/{benchmark}", f"answers/mean_tokens/{benchmark}"


def figures_of(runs: Sequence[Mapping[str, float]]) -> dict[str, Spread]:
    """Mean, lowest and highest of each figure over the runs that have it."""
    spreads = {}
    for key in dict.fromkeys(key for run in runs for key in run):
        values = [run[key] for run in runs if key in run]
        spreads[key] = Spread(sum(values) / len(values), min(values), max(values))
    return spreads


def curves_of(runs: Sequence[RunFigures]) -> dict[str, Curve]:
    """Each curve's mean, lowest and highest over the runs that have the step; long ones thinned to 300 points."""
    curves = {}
    for key in dict.fromkeys(key for run in runs for key in run.series):
        series = [run.series[key] for run in runs if key in run.series]
        steps = _thinned(sorted(set().union(*series)))
        values = [[one[step] for one in series if step in one] for step in steps]
        curves[key] = Curve(
            steps,
            [sum(found) / len(found) for found in values],
            [min(found) for found in values],
            [max(found) for found in values],
        )
    return curves


def _thinned(steps: list[int]) -> list[int]:
    """At most 300 of the steps, evenly, the first and the last among them."""
    if len(steps) <= _MAX_POINTS:
        return steps
    return [steps[index] for index in np.linspace(0, len(steps) - 1, _MAX_POINTS).round().astype(int)]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
