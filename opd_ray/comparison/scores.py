"""Scores of variants and differences between them: pass@k and avg@n by seed and problem, intervals, verdicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opd_ray.comparison.record import MEAN, Difference, Estimate, Relation, Verdict
from opd_ray.comparison.run_figures import answer_figures
from opd_ray.comparison.run_samples import BenchmarkCounts, RunSamples
from opd_ray.comparison.variants import differing
from opd_ray.evaluation.pass_at_k import pass_at_k
from opd_ray.evaluation.seed_bootstrap import SeedInterval, seed_bootstrap
from opd_ray.evaluation.significance import ALPHA, MAX_SEEDS, seeds_needed, smallest_difference, t_quantile

MAX_K = 8
"""k of pass@k where the problems have that many samples, as in the paper."""
BOOTSTRAP_SEED = 0
_NOTHING = 1e-12
"""Less is rounding: one sample more or less of a million is a million times as much."""

FloatArray = NDArray[np.float64]
BySeed = dict[int, FloatArray]
"""Seed to the scores `[P]` of a benchmark's problems."""


@dataclass(slots=True)
class ScoreBook:
    """Scores of all runs of a condition: metric, benchmark, name of the variant, seed.

    `values` maps (metric, benchmark) to variant to seeds; the P problems of a benchmark are the same everywhere.
    """

    benchmarks: list[str]
    metrics: list[str]
    values: dict[tuple[str, str], dict[str, BySeed]]
    num_resamples: int
    notes: list[str] = field(default_factory=list)
    answers: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    """Variant to figures of its runs' answers, one dict a run and benchmark."""

    def of(self, variant: str, metric: str, benchmark: str) -> list[BySeed]:
        """A benchmark's scores; for the mean those of every benchmark, of the seeds that have all."""
        names = self.benchmarks if benchmark == MEAN else [benchmark]
        tables = [self.values[metric, name].get(variant, {}) for name in names]
        common = sorted(set.intersection(*(set(table) for table in tables))) if tables else []
        return [{seed: table[seed] for seed in common} for table in tables]

    def estimate(self, variant: str, metric: str, benchmark: str) -> Estimate | None:
        """Mean over seeds and its interval; None where the variant has no samples."""
        tables = self.of(variant, metric, benchmark)
        seeds = list(tables[0]) if tables else []
        if not seeds:
            return None
        by_seed = {seed: float(np.mean([table[seed].mean() for table in tables])) for seed in seeds}
        num_problems = sum(table[seeds[0]].size for table in tables)
        if len(seeds) == 1:
            found = self._bootstrap([np.stack(list(table.values())) for table in tables])
            return Estimate(found.mean, max(found.low, 0.0), min(found.high, 1.0), by_seed, num_problems)
        means = np.array(list(by_seed.values()))
        half = t_quantile(1 - ALPHA / 2, len(means) - 1) * float(means.std(ddof=1)) / np.sqrt(len(means))
        mean = float(means.mean())
        return Estimate(mean, max(mean - half, 0.0), min(mean + half, 1.0), by_seed, num_problems)

    def difference(self, variant: str, against: str, metric: str, benchmark: str) -> SeedDifference | None:
        """`variant` minus `against` over the seeds that both have; None without one."""
        mine, other = (self.of(name, metric, benchmark) for name in (variant, against))
        seeds = sorted(set(mine[0]) & set(other[0])) if mine else []
        if not seeds:
            return None
        tables = [np.stack([a[seed] - b[seed] for seed in seeds]) for a, b in zip(mine, other, strict=True)]
        return SeedDifference(len(seeds), sum(table.shape[1] for table in tables), self._bootstrap(tables))

    def _bootstrap(self, tables: Sequence[FloatArray]) -> SeedInterval:
        return seed_bootstrap(tables, num_resamples=self.num_resamples, alpha=ALPHA, seed=BOOTSTRAP_SEED)


@dataclass(frozen=True, slots=True)
class SeedDifference:
    """A difference over seeds that were paired by number."""

    num_seeds: int
    num_problems: int
    interval: SeedInterval

    def record(self, names: tuple[str, str], relation: Relation, metric: str, benchmark: str) -> Difference:
        """The difference with its verdict, `names` being the variant's and the other's."""
        found = self.interval
        verdict = self._verdict()
        is_open = self.num_seeds > 1 and verdict == "cannot tell" and abs(found.mean) >= _NOTHING
        needed = seeds_needed(found.mean, found.parts) if is_open else None
        return Difference(
            variant=names[0],
            against=names[1],
            relation=relation,
            metric=metric,
            benchmark=benchmark,
            difference=found.mean,
            low=found.low,
            high=found.high,
            p_value=found.p_value,
            verdict=verdict,
            num_seeds=self.num_seeds,
            num_problems=self.num_problems,
            smallest_visible=smallest_difference(found.parts, self.num_seeds) if self.num_seeds > 1 else None,
            seeds_needed=needed,
            remark=self._remark(verdict, needed),
        )

    def _verdict(self) -> Verdict:
        # One seed says nothing about the next: its interval is over problems, and no verdict on a variant rests on it.
        if self.num_seeds == 1 or self.interval.low <= 0 <= self.interval.high:
            return "cannot tell"
        return "better" if self.interval.low > 0 else "worse"

    def _remark(self, verdict: Verdict, needed: int | None) -> str:
        found = self.interval
        if self.num_seeds == 1:
            return "one seed: the interval is over problems only; at least 2 seeds are needed"
        if verdict != "cannot tell":
            return ""
        if abs(found.mean) < _NOTHING:
            return "no difference was seen"
        if needed is not None:
            return f"{needed} seeds would show a difference of this size"
        # What is left of the smallest visible difference when seeds cost nothing.
        if smallest_difference(found.parts, MAX_SEEDS * MAX_SEEDS) > abs(found.mean):
            return "no number of seeds would show a difference of this size: more problems are needed"
        return f"more than {MAX_SEEDS} seeds would be needed to show a difference of this size"


def score_book(variants: Mapping[str, Mapping[int, RunSamples]], num_resamples: int) -> ScoreBook:
    """Line up the samples of a condition's runs, given by variant and seed.

    A benchmark's samples are those of `opd_ray.evaluate` where at least as many runs have them as have samples of it
    from the end of training, else the latter. Problems that not all of these runs have are left out, with a note.
    """
    notes: list[str] = []
    chosen: dict[str, dict[tuple[str, int], BenchmarkCounts]] = {}
    for name in sorted(
        {name for runs in variants.values() for s in runs.values() for name in {**s.after, **s.student}}
    ):
        counts = _chosen_counts(variants, name)
        shared = set.intersection(*(set(found.counts) for found in counts.values()))
        largest = max(len(found.counts) for found in counts.values())
        if len(shared) < largest:
            notes.append(f"{name}: {len(shared)} of up to {largest} problems are in all runs, and only these count")
        notes += [
            f"{name}: sampled with different {key} ({', '.join(values)}), so scores do not compare"
            for key, values in differing(found.settings for found in counts.values()).items()
        ]
        if shared:
            chosen[name] = {run: found.only(sorted(shared)) for run, found in counts.items()}
    k, average = _metric_names(chosen, notes)
    book = ScoreBook(list(chosen), [f"pass@{k}", average] if chosen else [], {}, num_resamples, notes)
    for name, counts in chosen.items():
        for (variant, _), found in counts.items():
            cut, tokens = answer_figures(name)
            book.answers.setdefault(variant, []).append({cut: found.truncated_share, tokens: found.mean_tokens})
        for metric in book.metrics:
            table = book.values.setdefault((metric, name), {})
            for (variant, seed), found in counts.items():
                n, c = zip(*found.counts.values(), strict=True)
                table.setdefault(variant, {})[seed] = pass_at_k(n, c, k if metric.startswith("pass@") else 1)
    return book


def _chosen_counts(
    variants: Mapping[str, Mapping[int, RunSamples]], benchmark: str
) -> dict[tuple[str, int], BenchmarkCounts]:
    runs = [(variant, seed, samples) for variant, by_seed in variants.items() for seed, samples in by_seed.items()]
    after = {(variant, seed): s.after[benchmark] for variant, seed, s in runs if benchmark in s.after}
    student = {(variant, seed): s.student[benchmark] for variant, seed, s in runs if benchmark in s.student}
    return student if len(student) >= len(after) else after


def _metric_names(chosen: Mapping[str, Mapping[Any, BenchmarkCounts]], notes: list[str]) -> tuple[int, str]:
    """k of pass@k, the same for all benchmarks, and the name of avg@n."""
    bounds = [found.num_samples for counts in chosen.values() for found in counts.values()]
    least, most = min((low for low, _ in bounds), default=1), max((high for _, high in bounds), default=1)
    if least < most:
        notes.append(f"problems have {least} to {most} samples: avg@n is over all that each has")
    return min(MAX_K, least), f"avg@{least}" if least == most else "avg@n"
