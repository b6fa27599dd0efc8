"""The table at the end of a run: student before, student after, teacher."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

Evaluation = Mapping[str, float]
"""One model's figures as `evaluation.EvaluationResult.as_dict` gives them and `summary.json` keeps them."""

_AVG_AT = re.compile(r"avg_at_([0-9]+)")
_MISSING = "-"


def results_table(before: Evaluation | None, after: Evaluation | None, teacher: Evaluation | None) -> str:
    """Return the table as plain text of under 80 columns, without control codes or a final line end.

    It has pass@n and avg@n of n samples a problem, and the share of the gap in avg@n between student and
    teacher that training closed. A model that was not evaluated gets dashes.
    """
    found = [evaluation for evaluation in (before, after, teacher) if evaluation is not None]
    if not found:
        return "no evaluation was run (evaluation.path is empty)"
    n = samples_per_problem(found[0])
    lines = [f"{'':<16}{f'pass@{n}':>10}{f'avg@{n}':>10}"]
    for name, evaluation in (("student before", before), ("student after", after), ("teacher", teacher)):
        lines.append(f"{name:<16}{_cell(evaluation, f'pass_at_{n}')}{_cell(evaluation, f'avg_at_{n}')}")
    closed = gap_closed(before, after, teacher)
    if closed is not None:
        lines.append(f"{'gap closed':<16}{'':>10}{f'{100 * closed:.0f} %':>10}")
    num_problems = found[0].get("num_problems")
    if num_problems is not None:
        lines.append(f"({num_problems:.0f} problems not trained on, {n} samples each)")
    return "\n".join(line.rstrip() for line in lines)


def gap_closed(before: Evaluation | None, after: Evaluation | None, teacher: Evaluation | None) -> float | None:
    """Return ``(after - before) / (teacher - before)`` in avg@n: 1 is the teacher's level, negative is worse.

    None where one of the three is missing or the student was no worse than the teacher from the start.
    """
    if before is None or after is None or teacher is None:
        return None
    key = f"avg_at_{samples_per_problem(before)}"
    start, end, goal = (evaluation.get(key, math.nan) for evaluation in (before, after, teacher))
    if not goal > start or not math.isfinite(end):
        return None
    return (end - start) / (goal - start)


def samples_per_problem(evaluation: Evaluation) -> int:
    """Return the n of an evaluation's ``avg_at_n``; raises ValueError if it has none."""
    for key in evaluation:
        match = _AVG_AT.fullmatch(key)
        if match:
            return int(match.group(1))
    raise ValueError(f"an evaluation needs avg_at_n, got only {sorted(evaluation)}")


def _cell(evaluation: Evaluation | None, key: str) -> str:
    value = None if evaluation is None else evaluation.get(key)
    return f"{_MISSING:>10}" if value is None else f"{value:>10.3f}"
