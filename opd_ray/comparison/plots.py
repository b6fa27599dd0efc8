"""Pictures of a comparison: scores and differences of all variants, and curves over the steps by condition."""

from __future__ import annotations

import importlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from opd_ray.comparison.record import Comparison, ConditionResult, Difference, VariantResult
from opd_ray.comparison.run_figures import (
    DRIFT_P50,
    DRIFT_P95,
    EFFECTIVE,
    EVALUATION,
    GATE_P05,
    KL_TO_TEACHER,
    LOSS,
    STALENESS,
)
from opd_ray.comparison.variants import OFF
from opd_ray.report.figures import COLORS, FAINT, INK, finish_axes, new_figure

VERDICT_COLORS = {"better": "#2a7f4f", "worse": "#b3402e", "cannot tell": FAINT}
_PALETTE = (*COLORS, "#c0504d", "#2f9aa0", "#b59a1f", "#e07bb0", "#6b7a8f", "#7a4a2b")
_DASHES = ("-", "--", "-.", ":")
_ROW_INCHES = 0.27


@dataclass(frozen=True, slots=True)
class Picture:
    """A drawn figure: `name` of its files, what it shows in words, and its bytes."""

    name: str
    title: str
    png: bytes
    svg: bytes


def score_picture(comparison: Comparison) -> Picture | None:
    """Score and difference against the base of every variant, one row each; None where nothing was evaluated."""
    conditions = [condition for condition in comparison.conditions if condition.metrics]
    if not conditions:
        return None
    rows = [(condition, variant) for condition in conditions for variant in condition.variants]
    height = 1.5 + _ROW_INCHES * (len(rows) + 1.6 * len(conditions))
    figure = new_figure("scores, and differences to the ungated base (95 % intervals)", 12.0, height)
    panels = figure.subplots(1, 4, sharey=True, width_ratios=(1, 1.25, 1, 1.25))
    places = _places(conditions)
    for number in range(2):
        scores, gaps = panels[2 * number], panels[2 * number + 1]
        _draw_scores(scores, rows, places, number)
        _draw_differences(gaps, rows, places, number)
    labels = panels[0]
    labels.set_yticks(list(places.values()), [variant.name for _, variant in rows], fontsize=7.5)
    headroom = 1.9 if conditions[0].name else 0.8
    labels.set_ylim(max(places.values()) + 0.8, min(places.values()) - headroom)
    for condition in conditions:
        top = places[condition.name, condition.variants[0].name]
        labels.text(0.0, top - 0.85, condition.name, transform=labels.get_yaxis_transform(), fontsize=7.5, color=INK)
    return _picture("comparison", "Scores, and differences to the ungated base", figure)


def _places(conditions: Sequence[ConditionResult]) -> dict[tuple[str, str], float]:
    """Height of each row, growing downwards, with a gap above each condition."""
    places: dict[tuple[str, str], float] = {}
    height = 0.0
    for condition in conditions:
        height += 1.6 if condition.name else 0.6
        for variant in condition.variants:
            places[condition.name, variant.name] = height
            height += 1
    return places


_Rows = Sequence[tuple[ConditionResult, VariantResult]]


def _draw_scores(axes: Any, rows: _Rows, places: dict[tuple[str, str], float], number: int) -> None:
    for condition, variant in rows:
        estimate = variant.scores.get(condition.headline, {}).get(condition.metrics[number])
        if estimate is None:
            continue
        place = places[condition.name, variant.name]
        color = INK if variant.gate == OFF else COLORS[0]
        axes.plot([100 * estimate.low, 100 * estimate.high], [place, place], color=color, linewidth=1.4)
        axes.plot([100 * value for value in estimate.by_seed.values()], [place] * estimate.num_seeds, "|", color=color)
        axes.plot(100 * estimate.mean, place, "o", color=color, markersize=4.5)
    finish_axes(axes, _metric(rows, number), "%", True, "percent")
    axes.tick_params(axis="y", length=0)


def _draw_differences(axes: Any, rows: _Rows, places: dict[tuple[str, str], float], number: int) -> None:
    axes.axvline(0.0, color=INK, linewidth=0.8, linestyle=":")
    for condition, variant in rows:
        found = _difference(condition, variant, condition.metrics[number])
        if found is None:
            continue
        place, color = places[condition.name, variant.name], VERDICT_COLORS[found.verdict]
        axes.plot([100 * found.low, 100 * found.high], [place, place], color=color, linewidth=1.8)
        axes.plot(100 * found.difference, place, "o", color=color, markersize=4.5)
        text = found.verdict if found.num_seeds > 1 else "one seed"
        axes.annotate(
            text, (1.0, place), xycoords=("axes fraction", "data"), fontsize=6.5, color=color, va="center", ha="right"
        )
    finish_axes(axes, f"{_metric(rows, number)}, minus base", "points", True, "points of percent")
    low, high = axes.get_xlim()
    axes.set_xlim(low, high + 0.35 * (high - low))
    axes.tick_params(axis="y", length=0)


def _metric(rows: _Rows, number: int) -> str:
    names = dict.fromkeys(condition.metrics[number] for condition, _ in rows)
    return " / ".join(names)


def _difference(condition: ConditionResult, variant: VariantResult, metric: str) -> Difference | None:
    for found in condition.headlines():
        if (found.relation, found.variant, found.metric) == ("base", variant.name, metric):
            return found
    return None


def curve_picture(condition: ConditionResult, name: str) -> Picture:
    """Evaluation (or KL to the teacher), loss, gate, drift, effective sample and staleness, with bands over seeds."""
    figure = new_figure(condition.name, 11.0, 6.2 + 0.17 * len(condition.variants))
    panels = figure.subplots(2, 3).flat
    styles = _styles(condition.variants)
    shown = (
        _learning(condition.variants),
        (LOSS, "loss", "smoothed", False),
        (STALENESS, "mean staleness", "optimizer steps, smoothed", False),
        (GATE_P05, "gate of a segment, p05", "1 = open", False),
        (EFFECTIVE, "effective sample share", "1 = no gate", False),
        (DRIFT_P95, "|drift|, p95 and (thin) median", "nats", True),
    )
    for axes, (key, title, unit, is_log) in zip(panels, shown, strict=True):
        drawn = [_draw_curve(axes, variant, key, styles[variant.name]) for variant in condition.variants]
        if key == DRIFT_P95:
            for variant in condition.variants:
                _draw_curve(axes, variant, DRIFT_P50, styles[variant.name] | {"linewidth": 0.7}, band=False)
        if is_log and any(drawn):
            axes.set_yscale("log", nonpositive="clip")
        finish_axes(axes, title, unit, any(drawn))
    handles = [_line(variant.name, styles[variant.name]) for variant in condition.variants]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    return _picture(name, f"Curves over the steps{': ' + condition.name if condition.name else ''}", figure)


def _learning(variants: Sequence[VariantResult]) -> tuple[str, str, str, bool]:
    """How the student learns: its scores if it was evaluated on the way, else its distance to the teacher."""
    curves = [variant.curves[EVALUATION] for variant in variants if EVALUATION in variant.curves]
    if curves and all(len(curve.steps) < 2 for curve in curves):
        return KL_TO_TEACHER, "sampled KL to the teacher", "nats a token, smoothed", False
    return EVALUATION, "avg@n on held-out problems", "", False


def _styles(variants: Sequence[VariantResult]) -> dict[str, dict[str, Any]]:
    """Ungated variants in ink, told apart by their dashes; gated ones each in a color."""
    styles: dict[str, dict[str, Any]] = {}
    ungated = gated = 0
    for variant in variants:
        if variant.gate == OFF:
            styles[variant.name] = {"color": INK, "linestyle": _DASHES[ungated % len(_DASHES)], "linewidth": 1.5}
            ungated += 1
        else:
            dashes = _DASHES[gated // len(_PALETTE) % len(_DASHES)]
            styles[variant.name] = {"color": _PALETTE[gated % len(_PALETTE)], "linestyle": dashes, "linewidth": 1.5}
            gated += 1
    return styles


def _draw_curve(axes: Any, variant: VariantResult, key: str, style: dict[str, Any], band: bool = True) -> bool:
    curve = variant.curves.get(key)
    if curve is None or not curve.steps:
        return False
    marker = {"marker": "o", "markersize": 3} if len(curve.steps) < 8 else {}
    axes.plot(curve.steps, curve.mean, **style, **marker)
    if band:
        axes.fill_between(curve.steps, curve.low, curve.high, color=style["color"], alpha=0.12, linewidth=0)
    return True


def _line(label: str, style: dict[str, Any]) -> Any:
    return importlib.import_module("matplotlib.lines").Line2D([], [], label=label, **style)


def _picture(name: str, title: str, figure: Any) -> Picture:
    matplotlib = importlib.import_module("matplotlib")
    # The same figures give the same file.
    with matplotlib.rc_context({"svg.hashsalt": name}):
        svg, png = io.BytesIO(), io.BytesIO()
        figure.savefig(png, format="png")
        figure.savefig(svg, format="svg", metadata={"Date": None})
    return Picture(name, title, png.getvalue(), svg.getvalue())
