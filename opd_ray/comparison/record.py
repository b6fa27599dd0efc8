"""The figures of a comparison, as plain records: what the tables, pictures and `comparison.json` are made of.

Scores are shares in [0, 1], differences are differences of shares.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, Literal

Verdict = Literal["better", "worse", "cannot tell"]
Relation = Literal["base", "control"]
"""`base`: a variant against its ungated base; `control`: a gate against its control."""
MEAN = "mean"
"""The benchmark name of the mean over all benchmarks."""


@dataclass(frozen=True, slots=True)
class Spread:
    """Mean, lowest and highest of a figure over seeds."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Estimate:
    """A score with its 95 % interval: Student's t over seeds, or over problems where there is one seed."""

    mean: float
    low: float
    high: float
    by_seed: dict[int, float]
    num_problems: int

    @property
    def num_seeds(self) -> int:
        """Seeds with samples."""
        return len(self.by_seed)


@dataclass(frozen=True, slots=True)
class Difference:
    """A variant's score minus another's: with the 95 % interval, the verdict, and what more seeds could show.

    `smallest_visible` is the
    true difference that these seeds would find with 80 % power, None with one seed; `seeds_needed` is how many would
    find the difference that was seen, None where no number up to 1,000 would or it cannot be said: `remark` says which.
    `survives_holm` is None outside the headline comparisons.
    """

    variant: str
    against: str
    relation: Relation
    metric: str
    benchmark: str
    difference: float
    low: float
    high: float
    p_value: float
    verdict: Verdict
    num_seeds: int
    num_problems: int
    smallest_visible: float | None
    seeds_needed: int | None
    remark: str
    survives_holm: bool | None = None


@dataclass(slots=True)
class VariantResult:
    """A variant within a condition. `scores` maps benchmark to metric to estimate; `figures` maps names to spreads."""

    name: str
    gate: str
    seeds: list[int]
    runs: list[str]
    base: str | None
    scores: dict[str, dict[str, Estimate]] = field(default_factory=dict)
    figures: dict[str, Spread] = field(default_factory=dict)
    curves: dict[str, Curve] = field(default_factory=dict, metadata={"json": False})
    remark: str = ""


@dataclass(frozen=True, slots=True)
class Curve:
    """A metric over optimizer steps: mean, lowest and highest over the seeds that have the step."""

    steps: list[int]
    mean: list[float]
    low: list[float]
    high: list[float]


@dataclass(slots=True)
class ConditionResult:
    """The variants that ran under the same conditions; `metrics` are pass@k and avg@n, the first is the headline."""

    name: str
    settings: dict[str, str]
    benchmarks: list[str]
    metrics: list[str]
    variants: list[VariantResult]
    differences: list[Difference] = field(default_factory=list)

    @property
    def headline(self) -> str:
        """The benchmark whose differences are judged first: the mean, or the only one there is."""
        return MEAN if len(self.benchmarks) > 1 else next(iter(self.benchmarks), MEAN)

    def headlines(self) -> list[Difference]:
        """Differences in the headline benchmark."""
        return [difference for difference in self.differences if difference.benchmark == self.headline]


@dataclass(frozen=True, slots=True)
class ConfigDifference:
    """A config key that is not the same in all runs; `values` maps each value to its number of runs."""

    key: str
    role: Literal["variant", "condition", "not compared"]
    values: dict[str, int]


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A run that is in no table, and why."""

    run: str
    why: str


@dataclass(slots=True)
class Comparison:
    """Everything that `python -m opd_ray.compare` found."""

    num_runs: int
    conditions: list[ConditionResult]
    config_differences: list[ConfigDifference]
    left_out: list[LeftOut]
    notes: list[str]
    num_resamples: int
    format_version: int = 1

    def headlines(self) -> list[Difference]:
        """The comparisons that Holm's correction is over, by family."""
        return [difference for condition in self.conditions for difference in condition.headlines()]


def families(differences: Iterable[Difference]) -> dict[tuple[Relation, str], list[Difference]]:
    """The headline comparisons that are judged together: of one relation and metric, over all conditions."""
    found: dict[tuple[Relation, str], list[Difference]] = {}
    for difference in differences:
        found.setdefault((difference.relation, difference.metric), []).append(difference)
    return found


def as_json(value: Any) -> Any:
    """Records as plain objects, without the curves; numbers that JSON lacks become null."""
    if is_dataclass(value) and not isinstance(value, type):
        return {
            part.name: as_json(getattr(value, part.name)) for part in fields(value) if part.metadata.get("json", True)
        }
    if isinstance(value, Mapping):
        return {str(key): as_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
