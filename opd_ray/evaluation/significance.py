"""t-tests, the number of seeds that a test would need, and corrections for many tests. S is the number of seeds."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

ALPHA = 0.05
POWER = 0.8
MAX_SEEDS = 1000
_EXACT_FREEDOM = 200.0
_TOLERANCE = 1e-11


@dataclass(frozen=True, slots=True)
class VarianceParts:
    """What the variance of a mean over seeds and problems is made of, in squares of the mean's unit; `at` adds it up.

    `seed` is the variance of one seed's mean, noise of its samples included; `crossing` is that noise as the (seed,
    problem) pairs show it. Both fall with the number of seeds. `problems` comes from the choice of problems and stays;
    `problems_freedom` are its degrees of freedom, the number of problems less one.
    """

    seed: float
    crossing: float
    problems: float
    problems_freedom: float

    def at(self, num_seeds: int) -> tuple[float, float]:
        """Variance of the mean over that many seeds, and its degrees of freedom; with one seed of the problems only.

        No less than seeds alone, or problems and noise alone, would make it. Source of the freedom: Satterthwaite, "An
        approximate distribution of estimates of variance components", Biometrics Bulletin 2 (1946).
        """
        if num_seeds == 1:
            return self.problems, self.problems_freedom
        seeds, noise = self.seed / num_seeds, self.crossing / num_seeds
        total = max(seeds, noise) + self.problems
        # The means of squares that were added up or taken off, and the freedom of each.
        squares = (seeds, num_seeds - 1), (self.problems + noise, self.problems_freedom)
        spread = sum(part**2 / freedom for part, freedom in squares)
        spread += noise**2 / ((num_seeds - 1) * self.problems_freedom)
        least = min(num_seeds - 1.0, self.problems_freedom)
        return total, max(least, total**2 / spread) if spread > 0 else least


def t_quantile(probability: float, freedom: float) -> float:
    """Quantile of Student's t distribution, ``0.5 <= probability < 1``, `freedom` at least 1."""
    if not 0.5 <= probability < 1 or not freedom >= 1:
        raise ValueError(f"t_quantile needs 0.5 <= probability < 1 and freedom >= 1, got {probability} and {freedom}")
    # Two digits of the freedom are more than the data can say, and they make the cache work.
    return _t_quantile(probability, round(freedom, 2))


@functools.lru_cache(maxsize=4096)
def _t_quantile(probability: float, freedom: float) -> float:
    low, high = 0.0, 1.0
    while 1 - two_sided_p(high, freedom) / 2 < probability:
        low, high = high, 2 * high
    while high - low > _TOLERANCE * high:
        middle = (low + high) / 2
        low, high = (middle, high) if 1 - two_sided_p(middle, freedom) / 2 < probability else (low, middle)
    return (low + high) / 2


def two_sided_p(t: float, freedom: float) -> float:
    """Chance of a Student's t at least as far from zero, for `freedom` of at least 1, to 1e-6.

    ``I_x(f / 2, 1 / 2)`` at ``x = f / (f + t^2)``; above 200 degrees of freedom by the normal. Source of the latter:
    Wallace, "Bounds on normal approximations to Student's and the chi-square distributions", Ann. Math. Stat. 30
    (1959).
    """
    if freedom > _EXACT_FREEDOM:
        z = (8 * freedom + 1) / (8 * freedom + 3) * math.sqrt(freedom * math.log1p(t * t / freedom))
        return math.erfc(z / math.sqrt(2))
    from mpmath import fp  # type: ignore[import-untyped]  # 0.1 s to import, needed only here

    return float(fp.betainc(freedom / 2, 0.5, 0, freedom / (freedom + t * t), regularized=True))


def smallest_difference(parts: VarianceParts, num_seeds: int, alpha: float = ALPHA, power: float = POWER) -> float:
    """Return the true difference that `num_seeds` would find significant with probability `power`.

    ``(t_{1 - alpha/2} + t_{power}) * sqrt(variance)``, the usual approximation by central t quantiles; source: Bloom,
    "Minimum detectable effects", Evaluation Review 19 (1995).
    """
    variance, freedom = parts.at(num_seeds)
    return float((t_quantile(1 - alpha / 2, freedom) + t_quantile(power, freedom)) * np.sqrt(variance))


def seeds_needed(difference: float, parts: VarianceParts, alpha: float = ALPHA, power: float = POWER) -> int | None:
    """Return the least number of seeds (2 to 1000) whose `smallest_difference` is no more than ``|difference|``.

    None where 1000 are too few, as for a difference of zero, or one that the choice of problems alone can make.
    """

    def enough(num_seeds: int) -> bool:
        return smallest_difference(parts, num_seeds, alpha, power) <= abs(difference)

    if difference == 0 or not enough(MAX_SEEDS):
        return None
    low, high = 1, MAX_SEEDS
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def holm(p_values: Sequence[float], alpha: float = ALPHA) -> list[bool]:
    """Return which of several tests stay significant when the chance of any false one is to be `alpha`.

    Source: Holm, "A simple sequentially rejective multiple test procedure", Scand. J. Statist. 6 (1979).
    """
    rejected = [False] * len(p_values)
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        if p_values[index] > alpha / (len(p_values) - rank):
            break
        rejected[index] = True
    return rejected
