"""The tables of a comparison, the same for the terminal, Markdown and the page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from opd_ray.comparison.record import (
    MEAN,
    Comparison,
    ConditionResult,
    Difference,
    Estimate,
    Spread,
    VariantResult,
)
from opd_ray.comparison.run_figures import (
    DRIFT_P50,
    DRIFT_P95,
    EFFECTIVE,
    GATE_P05,
    LOSS_TOKENS,
    STALENESS,
    STALENESS_MAX,
    STEPS,
    TOKENS_PER_S,
    TRAINING_S,
    WALL_S,
    answer_figures,
)

NONE = "–"
NO_SAMPLES = "no samples"
_MEAN_TITLE = "mean of benchmarks"


@dataclass(frozen=True, slots=True)
class Table:
    """Cells as text; `numbers` says which columns are right-aligned."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    numbers: list[bool]
    note: str = ""


def score_table(condition: ConditionResult, metric: str) -> Table:
    """One row a variant, one column a benchmark, and their mean: percent with the 95 % interval."""
    names = [*condition.benchmarks, *([MEAN] if len(condition.benchmarks) > 1 else [])]
    rows = [
        [
            variant.name,
            *(_score(variant.scores.get(name, {}).get(metric)) for name in names or [MEAN]),
            _seeds(variant, metric, names),
        ]
        for variant in condition.variants
    ]
    columns = ["variant", *(_MEAN_TITLE if name == MEAN else name for name in names or ["score"]), "seeds"]
    one_seed = any(len(variant.seeds) == 1 for variant in condition.variants)
    note = "Percent, mean over seeds [95 % interval over seeds]."
    note += " With one seed the interval is over problems only." if one_seed else ""
    return Table(f"{metric}, %", columns, rows, [False, *[True] * (len(columns) - 1)], note)


def _score(estimate: Estimate | None) -> str:
    if estimate is None:
        return NO_SAMPLES
    return f"{100 * estimate.mean:.1f} [{100 * estimate.low:.1f}, {100 * estimate.high:.1f}]"


def _seeds(variant: VariantResult, metric: str, names: Sequence[str]) -> str:
    """Seeds in the row's last score, and how many there are if that is more."""
    estimate = variant.scores.get(names[-1], {}).get(metric) if names else None
    used, there = (estimate.num_seeds if estimate else 0), len(variant.seeds)
    return f"{there}" if used == there else f"{used} of {there}"


def short_table(condition: ConditionResult) -> Table:
    """One row a variant: score and difference to the ungated base in the headline benchmark, with the verdict."""
    against = {(found.variant, found.metric): found for found in condition.headlines() if found.relation == "base"}
    columns, numbers = ["variant", "seeds"], [False, True]
    for metric in condition.metrics:
        columns += [f"{metric}, %", "minus base", "verdict"]
        numbers += [True, True, False]
    rows = []
    for variant in condition.variants:
        row = [variant.name, str(len(variant.seeds))]
        for metric in condition.metrics:
            estimate = variant.scores.get(condition.headline, {}).get(metric)
            found = against.get((variant.name, metric))
            row.append(f"{100 * estimate.mean:.1f}" if estimate else NO_SAMPLES)
            row += [difference_text(found), _short_verdict(found)] if found else [NONE, ""]
        rows.append(row)
    return Table("", columns, rows, numbers)


def _short_verdict(found: Difference) -> str:
    return f"{found.verdict} ({found.seeds_needed} seeds)" if found.seeds_needed else found.verdict


def verdict_table(title: str, differences: Sequence[Difference], show_benchmark: bool = False) -> Table:
    """One row a comparison: difference in points with its interval, verdict, and what more seeds would show."""
    with_holm = any(found.survives_holm is not None for found in differences)
    columns = ["variant", "against", *(["benchmark"] if show_benchmark else []), "metric", "difference", "seeds"]
    columns += ["verdict", *(["all together"] if with_holm else []), "smallest visible", "remark"]
    words = {"variant", "against", "benchmark", "metric", "verdict", "all together", "remark"}
    rows = []
    for found in differences:
        benchmark = _MEAN_TITLE if found.benchmark == MEAN else found.benchmark
        row = [found.variant, found.against, *([benchmark] if show_benchmark else []), found.metric]
        row += [difference_text(found), str(found.num_seeds), found.verdict]
        row += [together(found)] if with_holm else []
        rows.append([*row, _visible(found), found.remark])
    return Table(title, columns, rows, [column not in words for column in columns])


def difference_text(found: Difference) -> str:
    """``+1.2 [-0.3, +2.7]``, in points of percent."""
    return f"{_points(found.difference)} [{_points(found.low)}, {_points(found.high)}]"


def together(found: Difference) -> str:
    """The verdict when all headline comparisons are judged together; empty for others."""
    return "" if found.survives_holm is None else found.verdict if found.survives_holm else "cannot tell"


def _visible(found: Difference) -> str:
    return NONE if found.smallest_visible is None else f"{100 * found.smallest_visible:.1f}"


def _points(share: float) -> str:
    text = f"{100 * share:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text


def gate_table(condition: ConditionResult) -> Table:
    """What the gate measured and did in the second half of the steps with anything to measure, and staleness."""
    columns = {
        "gate p05": (GATE_P05, _digits(3)),
        "effective sample share": (EFFECTIVE, _digits(4)),
        "|drift| median, nats": (DRIFT_P50, "{:.1e}".format),
        "|drift| p95, nats": (DRIFT_P95, "{:.1e}".format),
        "staleness mean": (STALENESS, _digits(2)),
        "staleness max": (STALENESS_MAX, _digits(0)),
    }
    note = "Mean over seeds [lowest, highest]; gate and drift over the second half of the steps that measure drift."
    return _figure_table("gate and drift", condition, columns, note)


def answer_table(condition: ConditionResult) -> Table:
    """How long the answers were, and how many were cut."""
    columns: dict[str, tuple[str, Callable[[float], str]]] = {}
    for benchmark in condition.benchmarks:
        cut, tokens = answer_figures(benchmark)
        columns |= {f"{benchmark}, tokens": (tokens, _digits(0)), f"{benchmark}, cut": (cut, "{:.1%}".format)}
    note = "Mean over seeds [lowest, highest] of the mean length and of the share that reached the length limit."
    return _figure_table("length of answers", condition, columns, note)


def cost_table(condition: ConditionResult) -> Table:
    """Time and tokens."""
    columns = {
        "steps": (STEPS, _digits(0)),
        "training, s": (TRAINING_S, _digits(0)),
        "whole run, s": (WALL_S, _digits(0)),
        "tokens/s": (TOKENS_PER_S, _digits(0)),
        "loss tokens": (LOSS_TOKENS, _digits(0)),
    }
    note = (
        "Mean over seeds [lowest, highest]. Tokens/s: response tokens that were trained on, each use counted, a "
        "second of training; seconds of a resumed run are those since it was resumed."
    )
    return _figure_table("time and tokens", condition, columns, note)


def _digits(number: int) -> Callable[[float], str]:
    return f"{{:,.{number}f}}".format


def _figure_table(
    title: str, condition: ConditionResult, columns: dict[str, tuple[str, Callable[[float], str]]], note: str
) -> Table:
    rows = [
        [variant.name, *(_spread(variant.figures.get(key), shown) for key, shown in columns.values())]
        for variant in condition.variants
    ]
    return Table(title, ["variant", *columns], rows, [False, *[True] * len(columns)], note)


def _spread(spread: Spread | None, shown: Callable[[float], str]) -> str:
    if spread is None:
        return NONE
    mean, low, high = shown(spread.mean), shown(spread.low), shown(spread.high)
    return mean if low == high else f"{mean} [{low}, {high}]"


def config_table(comparison: Comparison) -> Table:
    """What differs in config between the runs that are compared."""
    rows = [
        [found.key, found.role, ", ".join(f"{value} ({count_of_runs(count)})" for value, count in found.values.items())]
        for found in comparison.config_differences
    ]
    columns = ["key", "makes another", "values"]
    return Table("what differs in config", columns, rows, [False] * len(columns))


def left_out_table(comparison: Comparison) -> Table:
    """Runs that are in no table."""
    return Table(
        "runs left out", ["run", "why"], [[found.run, found.why] for found in comparison.left_out], [False, False]
    )


def settings_table(condition: ConditionResult) -> Table:
    """The values of a condition's keys."""
    rows = [[key, value] for key, value in condition.settings.items()]
    return Table("settings", ["key", "value"], rows, [False, False], "Of the keys that differ between conditions.")


def runs_table(condition: ConditionResult) -> Table:
    """Which runs a variant is made of."""
    rows = [
        [variant.name, variant.base or variant.remark or NONE, ", ".join(variant.runs)]
        for variant in condition.variants
    ]
    return Table("runs", ["variant", "ungated base", "run folders"], rows, [False] * 3)


def count_of_runs(count: int) -> str:
    """``1 run``, ``2 runs``."""
    return "1 run" if count == 1 else f"{count} runs"


def as_markdown(table: Table) -> str:
    """A pipe table, without its title; characters that Markdown would read are escaped."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(map(_escaped, cells)) + " |"

    rule = "|" + "|".join("--:" if number else ":--" for number in table.numbers) + "|"
    return "\n".join([line(table.columns), rule, *(line(row) for row in table.rows)])


def _escaped(cell: str) -> str:
    return cell.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")


def as_text(table: Table) -> str:
    """Columns of text for a terminal, without its title."""
    lines = [table.columns, *table.rows]
    widths = [max(len(line[place]) for line in lines) for place in range(len(table.columns))]

    def padded(cells: Sequence[str]) -> str:
        aligned = zip(cells, widths, table.numbers, strict=True)
        return "  ".join(f"{cell:>{width}}" if number else f"{cell:<{width}}" for cell, width, number in aligned)

    return "\n".join(padded(line).rstrip() for line in lines)
