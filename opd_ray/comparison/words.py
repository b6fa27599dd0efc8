"""Sentences of a comparison: the answer at the top, the notes, and the method."""

from __future__ import annotations

from opd_ray.comparison.record import Comparison, Difference


def answer(comparison: Comparison) -> list[str]:
    """The headline verdicts in sentences: how many comparisons there are and how each kind came out."""
    found = [difference for difference in comparison.headlines() if difference.relation == "base"]
    controls = [difference for difference in comparison.headlines() if difference.relation == "control"]
    if not found and not controls:
        return ["No variant can be compared with an ungated base: there is none among the runs, or no samples of it."]
    lines = [f"{_count(found, 'of variants with their ungated base')}: {_tally(found)}."] if found else []
    lines += [f"{_count(controls, 'of gates with their controls')}: {_tally(controls)}."] if controls else []
    every = len(found) + len(controls)
    claims = sum(difference.verdict != "cannot tell" for difference in found + controls)
    if every > 1 and claims:
        kept = sum(bool(difference.survives_holm) for difference in found + controls)
        lines.append(
            f"Where there is no difference, a comparison is wrong one time in 20: {every} of them can give about "
            f"{every / 20:.1f} false verdicts by chance. Judged together by metric (Holm), {kept} of the {claims} stay."
        )
    needed = [difference.seeds_needed for difference in found if difference.seeds_needed is not None]
    if needed:
        lines.append(
            f"Where it cannot be told, {_range(needed)} seeds would show the difference that was seen, if that is the "
            "true one."
        )
    return lines


def _count(found: list[Difference], of: str) -> str:
    return f"{len(found)} comparison{'s' if len(found) > 1 else ''} {of}"


def _tally(found: list[Difference]) -> str:
    counts = {verdict: sum(one.verdict == verdict for one in found) for verdict in ("better", "worse", "cannot tell")}
    return ", ".join(f"{count} {verdict}" for verdict, count in counts.items())


def _range(numbers: list[int]) -> str:
    low, high = min(numbers), max(numbers)
    return str(low) if low == high else f"{low} to {high}"


def method(comparison: Comparison) -> list[str]:
    """How the figures were made and what they mean."""
    every = len(comparison.headlines())
    others = sum(len(condition.differences) for condition in comparison.conditions) - every
    return [
        "Variants: runs whose config differs in nothing but the seed (and what is local to a run) are one variant. "
        "Differences in experiment, objective, gate or support make another variant, any other difference another "
        "condition; variants are compared within a condition only.",
        "Ungated base: the variant of the same condition with the same objective and support and gate.kind=off, found "
        "by config, not by name. A control (gate.control) is also shown against the gate that it imitates.",
        "Scores: unbiased pass@k and avg@n of every problem, averaged over problems; Student's t interval over seeds.",
        f"Differences: seeds paired by number, problem by problem; {comparison.num_resamples:,} resamples of seeds and "
        "problems, the drawn problems shared by all seeds; percentiles scaled to the two-way standard error and to "
        "Student's t, because with few seeds plain percentiles are too narrow or too wide. In simulations the 95 % "
        "interval covers the truth in 94 to 99 % of the cases.",
        "Verdict: better or worse where the 95 % interval excludes 0 and there are two seeds at least; else cannot "
        "tell.",
        "Smallest visible: the true difference, in points, that these seeds would find in 80 % of the cases. Seeds "
        "needed: the least number for which that is no more than the difference that was seen. More seeds do not "
        "lessen the part that comes from the choice of problems.",
        f"All together: the headline comparisons, {every} in number (the mean of benchmarks, or the only one), "
        "judged so that in each metric, over all conditions, the chance of any false verdict is 5 % (Holm). "
        + (f"{others} comparisons by benchmark are not adjusted." if others else "There are no others."),
        "Bands of the curves run from the lowest to the highest seed. Loss and staleness are smoothed.",
    ]
