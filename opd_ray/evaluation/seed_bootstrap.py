"""Confidence of a difference between two training variants: a paired bootstrap over seeds and problems.

S is the number of seeds, P the number of problems of a benchmark.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

from opd_ray.evaluation.significance import VarianceParts, t_quantile, two_sided_p

FloatArray = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class SeedInterval:
    """A mean over seeds and problems, its interval, the p of "it is zero", and where its variance comes from."""

    mean: float
    low: float
    high: float
    p_value: float
    parts: VarianceParts


def seed_bootstrap(values: Sequence[ArrayLike], *, num_resamples: int, alpha: float, seed: int) -> SeedInterval:
    """Return the mean over benchmarks, seeds and problems, with an interval for other seeds and problems.

    Each resample draws S of the S seeds and, for each benchmark, P of its P problems, with replacement; the drawn
    problems are the same for all drawn seeds, and the drawn seeds for all benchmarks. Source: Owen, "The pigeonhole
    bootstrap", Ann. Appl. Stat. 1 (2007).

    Such an interval counts the noise of each (seed, problem) up to three times and knows nothing of how few seeds there
    are: simulated, it covers 87 % to 99.8 % instead of 95 %. So its percentiles are scaled around the mean: from the
    resamples' own spread to the two-way standard error, in which that noise counts once (seeds + problems - their
    crossing; Cameron, Gelbach and Miller, J. Bus. Econ. Stat. 29, 2011), and from the normal to Student's t with
    Satterthwaite's degrees of freedom. That covers 94 % to 99 %.

    With one seed the interval is over problems only. `p_value` is of the t-test with the same standard error.

    Args:
        values: for each benchmark `[S, P]` finite numbers, such as differences of two variants' pass@k with the same
            seed and problem; P may differ by benchmark, S may not.
        num_resamples: at least 2; 10,000 for a stable interval.
        alpha: share outside the interval, in (0, 1).
        seed: at least 0; the same seed draws the same.

    Raises:
        ValueError: no benchmark, seed or problem, unequal numbers of seeds, numbers that are not finite, or an option
            out of range.
    """
    tables = _checked(values)
    if not 0 < alpha < 1 or num_resamples < 2 or seed < 0:
        raise ValueError(f"need alpha in (0, 1), num_resamples >= 2, seed >= 0; got {alpha}, {num_resamples}, {seed}")
    mean = float(np.mean([table.mean() for table in tables]))
    parts = variance_parts(tables)
    variance, freedom = parts.at(len(tables[0]))
    if variance == 0:
        return SeedInterval(mean, mean, mean, 1.0 if mean == 0 else 0.0, parts)
    drawn = _resampled_means(tables, num_resamples, np.random.default_rng(seed))
    error = float(np.sqrt(variance))
    student = t_quantile(1 - alpha / 2, freedom) / NormalDist().inv_cdf(1 - alpha / 2)
    spread = float(drawn.std())
    scale = student * error / spread if spread > 0 else 0.0
    low, high = mean + scale * (np.quantile(drawn, [alpha / 2, 1 - alpha / 2]) - mean)
    return SeedInterval(mean, float(low), float(high), two_sided_p(mean / error, freedom), parts)


def variance_parts(tables: Sequence[FloatArray]) -> VarianceParts:
    """Return the variance of the mean of `tables` (`[S, P]` each), split as `VarianceParts` says.

    Two-way random effects by the means of squares; a negative part counts as zero.
    """
    num_seeds, share = len(tables[0]), 1 / len(tables) ** 2
    of_problems, crossing = np.array([_problem_variances(table) for table in tables]).T * share
    freedoms = np.array([max(table.shape[1] - 1, 1) for table in tables])
    shown = float(of_problems.sum())
    freedom = shown**2 / float((of_problems**2 / freedoms).sum()) if shown > 0 else float(freedoms.sum())
    by_seed = np.mean([table.mean(axis=1) for table in tables], axis=0)
    return VarianceParts(
        seed=float(by_seed.var(ddof=1)) if num_seeds > 1 else 0.0,
        crossing=float(crossing.sum()) * num_seeds,
        problems=float(np.maximum(of_problems - crossing, 0.0).sum()),
        problems_freedom=freedom,
    )


def _problem_variances(table: FloatArray) -> tuple[float, float]:
    """Variance of a table's mean as its problems show it, and as the crossing of seeds and problems shows it."""
    num_seeds, num_problems = table.shape
    if num_problems == 1:
        return 0.0, 0.0
    by_problem = table.mean(axis=0)
    shown = float(by_problem.var(ddof=1)) / num_problems
    if num_seeds == 1:
        return shown, 0.0
    rest = table - by_problem - table.mean(axis=1, keepdims=True) + table.mean()
    square = float((rest**2).sum()) / ((num_seeds - 1) * (num_problems - 1))
    return shown, square / (num_seeds * num_problems)


def _resampled_means(tables: Sequence[FloatArray], num_resamples: int, generator: np.random.Generator) -> FloatArray:
    num_seeds = len(tables[0])
    # How often each is drawn says the same as which are drawn, and makes the means matrix products.
    seeds = generator.multinomial(num_seeds, np.full(num_seeds, 1 / num_seeds), size=num_resamples) / num_seeds
    total = np.zeros(num_resamples)
    for table in tables:
        num_problems = table.shape[1]
        problems = generator.multinomial(num_problems, np.full(num_problems, 1 / num_problems), size=num_resamples)
        total += np.einsum("rp,rp->r", seeds @ table, problems) / num_problems
    return total / len(tables)


def _checked(values: Sequence[ArrayLike]) -> list[FloatArray]:
    tables = [np.asarray(table, dtype=np.float64) for table in values]
    if not tables or any(table.ndim != 2 or table.size == 0 for table in tables):
        raise ValueError("need at least one benchmark, each a table of at least one seed and one problem")
    if len({len(table) for table in tables}) > 1:
        raise ValueError(f"benchmarks have different numbers of seeds: {[len(table) for table in tables]}")
    if not all(np.all(np.isfinite(table)) for table in tables):
        raise ValueError("all values must be finite")
    return tables
