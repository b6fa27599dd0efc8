"""Diagnostics of a step's tokens, segments and probes, which show what the gate does. numpy only.

A rank makes `StepDiagnostics` of its facts once the step's normaliser is known; the driver joins those of all ranks.
The result does not depend on how tokens were split over facts and ranks, as long as a segment's stay together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields

import numpy as np
import numpy.typing as npt

from opd_ray.learner.distribution import Distribution, FloatArray, Grid, IntArray, Moments
from opd_ray.types import Histogram

NUM_DECILES = 10

Metrics = dict[str, float | Histogram]


@dataclass(frozen=True, slots=True)
class TokenStats:
    """The valid response tokens of some trajectories, all [N].

    `position` is the token's response position over the response's length, in [0, 1). `weight` is its weight before the
    step's normaliser, `kl` the one-sample estimate log p - log q in nats (p student, q teacher), `staleness` its
    trajectory's, in optimizer steps. `segment` numbers the entries of the `SegmentFacts` at the same place; -1 is none.
    """

    position: FloatArray
    weight: FloatArray
    kl: FloatArray
    staleness: IntArray
    segment: IntArray


@dataclass(frozen=True, slots=True)
class SegmentFacts:
    """Gate segments, all [S]; those without valid tokens take no part.

    `drift` in nats, `gate` raw in [0, 1], `num_tokens` valid ones, `staleness` in optimizer steps. Where `measured` is
    false the trajectory is fresh, and drift is zero by definition.
    """

    drift: FloatArray
    gate: FloatArray
    num_tokens: IntArray
    staleness: IntArray
    measured: npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class ProbeFacts:
    """Positions at which the student's full distribution was looked at, all [M].

    `position` as in `TokenStats`, `support_mass` the student's probability of the teacher's K ids, `overlap` the share
    of these that are among the student's own top K, `entropy` the student's, in nats.
    """

    position: FloatArray
    support_mass: FloatArray
    overlap: FloatArray
    entropy: FloatArray


@dataclass(slots=True)
class Groups:
    """Counts and sums of numbered groups, for instance stalenesses; a few numbers each."""

    counts: dict[int, int] = field(default_factory=dict)
    sums: dict[int, float] = field(default_factory=dict)

    def add(self, groups: IntArray, values: FloatArray) -> None:
        """Add the values to their groups, both [N]."""
        numbers, index = np.unique(groups, return_inverse=True)
        sums = np.bincount(index, weights=values, minlength=len(numbers))
        self._add(numbers.tolist(), np.bincount(index, minlength=len(numbers)).tolist(), sums.tolist())

    def merge(self, other: Groups) -> None:
        """Add the values of another one."""
        self._add(list(other.counts), list(other.counts.values()), list(other.sums.values()))

    def _add(self, numbers: Sequence[int], counts: Sequence[int], sums: Sequence[float]) -> None:
        for number, count, total in zip(numbers, counts, sums, strict=True):
            self.counts[number] = self.counts.get(number, 0) + count
            self.sums[number] = self.sums.get(number, 0.0) + total

    def means(self, key: str) -> Metrics:
        """Mean of each group, as `key` with the group's number."""
        return {f"{key}{number}": self.sums[number] / count for number, count in sorted(self.counts.items())}

    def shares(self, sums_key: str, counts_key: str) -> Metrics:
        """Each group's share of the sum and of the number of all values, as the keys with the group's number."""
        total, number_of_all = sum(self.sums.values()), sum(self.counts.values())
        metrics: Metrics = {}
        for number, count in sorted(self.counts.items()):
            if total > 0:
                metrics[f"{sums_key}{number}"] = self.sums[number] / total
            metrics[f"{counts_key}{number}"] = count / number_of_all
        return metrics


@dataclass(slots=True)
class StepDiagnostics:
    """Sums, counts, extremes and fixed-bin counts of a step; additive, and some 60 kB whatever the number of tokens."""

    weights: Distribution = field(default_factory=lambda: Distribution.empty(Grid.weight))  # normalised, of tokens
    weight_square_sum: float = 0.0
    weight_by_position: Groups = field(default_factory=Groups)
    weight_by_staleness: Groups = field(default_factory=Groups)
    kl_by_position: Groups = field(default_factory=Groups)
    gates: Distribution = field(default_factory=lambda: Distribution.empty(Grid.unit))  # raw, of segments
    drift: Distribution = field(default_factory=lambda: Distribution.empty(Grid.drift))  # |drift|, measured only
    drift_by_staleness: Groups = field(default_factory=Groups)  # |drift|, fresh ones included
    gate_and_kl: Moments = field(default_factory=Moments)  # measured segments, weighted by tokens
    support_mass: Distribution = field(default_factory=lambda: Distribution.empty(Grid.unit))
    mass_by_position: Groups = field(default_factory=Groups)
    overlap_sum: float = 0.0
    entropy_sum: float = 0.0

    @classmethod
    def of(
        cls,
        tokens: Sequence[TokenStats],
        segments: Sequence[SegmentFacts],
        probes: Sequence[ProbeFacts],
        *,
        weight_scale: float,
    ) -> StepDiagnostics:
        """Summarize facts: ``tokens[i].segment`` numbers the entries of ``segments[i]``.

        `weight_scale` is what the step multiplies token weights by, tokens over the sum of weights of all ranks; 1
        where that sum is 0. Without a gate `segments` is empty, and weights are all equal.

        Raises:
            ValueError: `weight_scale` is not positive and finite, or a token's segment is not among the facts.
        """
        if not (math.isfinite(weight_scale) and weight_scale > 0):
            raise ValueError(f"weight_scale is {weight_scale}; give tokens / sum of weights, or 1 where the sum is 0")
        result = cls()
        for index, facts in enumerate(tokens):
            result._add_tokens(facts, weight_scale)
            if (facts.segment >= 0).any():
                result._relate(facts, segments[index] if index < len(segments) else None)
        for segment_facts in segments:
            result._add_segments(segment_facts)
        for probe_facts in probes:
            result.support_mass.add(probe_facts.support_mass)
            result.mass_by_position.add(_deciles(probe_facts.position), probe_facts.support_mass)
            result.overlap_sum += float(probe_facts.overlap.sum())
            result.entropy_sum += float(probe_facts.entropy.sum())
        return result

    @classmethod
    def join(cls, parts: Sequence[StepDiagnostics]) -> StepDiagnostics:
        """All parts as one; they stay as they are."""
        result = cls()
        for part in parts:
            for entry in fields(cls):
                mine, theirs = getattr(result, entry.name), getattr(part, entry.name)
                if isinstance(mine, float):
                    setattr(result, entry.name, mine + theirs)
                else:
                    mine.merge(theirs)
        return result

    def metrics(self, *, min_support_mass: float) -> Metrics:
        """`gate/*`, `learner/kl/*` and `support/*` of the step; what is undefined or not finite is left out.

        There are gate metrics where segments were reported or weights differ. `support/alarm` is 1 where the mean
        student mass on the support is below `min_support_mass`, else 0.
        """
        metrics = self.kl_by_position.means("learner/kl/position_")
        if self.gates.count:
            metrics |= self._segment_metrics()
        if self.weights.count and (self.gates.count or self.weights.minimum != self.weights.maximum):
            metrics |= self._weight_metrics()
        if self.support_mass.count:
            metrics |= self._support_metrics(min_support_mass)
        return {key: value for key, value in metrics.items() if isinstance(value, Histogram) or math.isfinite(value)}

    def _add_tokens(self, facts: TokenStats, weight_scale: float) -> None:
        weight = facts.weight * weight_scale
        decile = _deciles(facts.position)
        self.weights.add(weight)
        self.weight_square_sum += float(weight @ weight)
        self.weight_by_position.add(decile, weight)
        self.weight_by_staleness.add(facts.staleness, weight)
        self.kl_by_position.add(decile, facts.kl)

    def _add_segments(self, facts: SegmentFacts) -> None:
        used = facts.num_tokens > 0
        drift = np.where(facts.measured, np.abs(facts.drift), 0.0)
        self.gates.add(facts.gate[used])
        self.drift.add(drift[used & facts.measured])
        self.drift_by_staleness.add(facts.staleness[used], drift[used])

    def _relate(self, tokens: TokenStats, segments: SegmentFacts | None) -> None:
        """Gate against mean KL of each measured segment, weighted by its tokens."""
        size = 0 if segments is None else len(segments.gate)
        inside = tokens.segment >= 0
        last = int(tokens.segment.max())
        if segments is None or last >= size:
            raise ValueError(f"a token is in segment {last} of {size}; hand in the segments of each TokenFacts")
        counts = np.bincount(tokens.segment[inside], minlength=size)
        kl = np.bincount(tokens.segment[inside], weights=tokens.kl[inside], minlength=size)
        chosen = segments.measured & (counts > 0)
        weight = counts[chosen].astype(np.float64)
        self.gate_and_kl.merge(Moments.of(segments.gate[chosen], kl[chosen] / weight, weight))

    def _segment_metrics(self) -> Metrics:
        gates = self.gates
        all_drift = Distribution.empty(Grid.drift)
        all_drift.merge(self.drift)
        all_drift.add(np.zeros(1), times=gates.count - self.drift.count)
        metrics: Metrics = {
            "gate/value/min": gates.minimum,
            "gate/value/p05": gates.quantile(0.05),
            "gate/value/mean": gates.mean,
            "gate/value/max": gates.maximum,
            "gate/value/share_under_half": gates.num_below(0.5) / gates.count,
            "gate/value/histogram": gates.histogram(),
            "gate/drift_abs/mean": all_drift.mean,
            "gate/drift_abs/p95": all_drift.quantile(0.95),
            "gate/drift_abs/max": all_drift.maximum,
            "gate/segments": float(gates.count),
            "gate/measured_share": self.drift.count / gates.count,
        }
        if self.drift.count:
            metrics["gate/drift_abs/measured_p50"] = self.drift.quantile(0.5)
            metrics["gate/drift_abs/measured_p95"] = self.drift.quantile(0.95)
            metrics["gate/drift_abs/histogram"] = self.drift.histogram()
        correlation = self.gate_and_kl.correlation()
        if correlation is not None:
            metrics["gate/kl_correlation/pearson"] = correlation
        return metrics | self.drift_by_staleness.means("gate/drift_abs/staleness_")

    def _weight_metrics(self) -> Metrics:
        weights = self.weights
        metrics: Metrics = {
            "gate/weight/min": weights.minimum,
            "gate/weight/max": weights.maximum,
            "gate/weight/zero_share": weights.num_below(weights.grid.histogram_edges[1]) / weights.count,
            "gate/weight/histogram": weights.histogram(),
        }
        if self.weight_square_sum > 0:
            # Kish: (sum w)^2 / (n sum w^2).
            share = weights.total**2 / (weights.count * self.weight_square_sum)
            metrics["gate/effective_sample_share"] = min(share, 1.0)
        for name, groups in (("position", self.weight_by_position), ("staleness", self.weight_by_staleness)):
            metrics |= groups.shares(f"gate/weight_share/{name}_", f"gate/token_share/{name}_")
        return metrics

    def _support_metrics(self, min_support_mass: float) -> Metrics:
        mass = self.support_mass
        return {
            "support/student_mass/mean": mass.mean,
            "support/student_mass/p05": mass.quantile(0.05),
            "support/student_mass/min": mass.minimum,
            "support/overlap_ratio/mean": self.overlap_sum / mass.count,
            "support/entropy/mean": self.entropy_sum / mass.count,
            "support/probes": float(mass.count),
            "support/alarm": float(mass.mean < min_support_mass),
            **self.mass_by_position.means("support/student_mass/position_"),
        }


def _deciles(position: FloatArray) -> IntArray:
    """[N] number of the tenth of its response that a token is in, 0 to 9."""
    return np.clip(np.floor(position * NUM_DECILES), 0, NUM_DECILES - 1).astype(np.int64)
