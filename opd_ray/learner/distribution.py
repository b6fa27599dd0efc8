"""Summaries of many values that add up over microbatches and ranks and do not grow with their number. numpy only."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum

import numpy as np
import numpy.typing as npt

from opd_ray.types import Histogram

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


def _powers(exponents: npt.NDArray[np.float64]) -> list[float]:
    """10 to the exponents, in six digits: short in `metrics.jsonl`, and equal in fine and coarse edges."""
    return [float(f"{10.0**exponent:.6g}") for exponent in exponents]


# Last bins are one step wide and take everything above them, so that a picture is not mostly overflow.
DRIFT_EDGES = (0.0, *_powers(np.arange(-30, 7) / 5))
"""|drift| in nats: [0, 1e-6), five bins a decade up to 10, and one for 10 and above."""

UNIT_EDGES = tuple(round(i / 40, 3) for i in range(41))
"""Gates and probability masses: 40 equal bins of [0, 1]."""

WEIGHT_EDGES = (0.0, 1e-300, *_powers(np.arange(-61, 25, 2) / 20))
"""Normalised token weights: exact zeros (weights are float32), under 10^-3.05, ten bins a decade with one around 1
(0.89 to 1.12) up to 10^1.05, and one for what is above."""

_FINE_DRIFT = np.array([0.0, *_powers(np.arange(-600, 101) / 100), DRIFT_EDGES[-1]])
_FINE_UNIT = np.union1d(1 / (1 + np.exp(-np.arange(-700, 701) / 50)), UNIT_EDGES)


class Grid(Enum):
    """The bins of a `Distribution`: those it counts in, and the coarser ones of its `Histogram`.

    Resolution of quantiles, the width of a bin: 2.3 % of |drift| between 1e-6 and 10; for gates and masses 2 % of
    g (1 - g) or less, so that 0.9990 and 0.9995 are told apart.
    """

    drift = "drift"
    unit = "unit"
    weight = "weight"

    @property
    def edges(self) -> FloatArray:
        """Rising edges of the bins that are counted."""
        return {Grid.drift: _FINE_DRIFT, Grid.unit: _FINE_UNIT, Grid.weight: np.array(WEIGHT_EDGES)}[self]

    @property
    def histogram_edges(self) -> tuple[float, ...]:
        """Rising edges of the histogram, all of them among `edges`."""
        return {Grid.drift: DRIFT_EDGES, Grid.unit: UNIT_EDGES, Grid.weight: WEIGHT_EDGES}[self]


@dataclass(slots=True)
class Distribution:
    """Values >= 0 by bins [edge, next edge): how many, and their sum; exact minimum and maximum."""

    grid: Grid
    counts: IntArray
    sums: FloatArray
    minimum: float = math.inf
    maximum: float = -math.inf

    @classmethod
    def empty(cls, grid: Grid) -> Distribution:
        """No values."""
        size = len(grid.edges) - 1
        return cls(grid, np.zeros(size, dtype=np.int64), np.zeros(size))

    def add(self, values: FloatArray, times: int = 1) -> None:
        """Count every value `times` times; values beyond the edges count in the first or last bin."""
        if not len(values) or not times:
            return
        size = len(self.counts)
        bins = np.clip(np.searchsorted(self.grid.edges, values, side="right") - 1, 0, size - 1)
        self.counts += times * np.bincount(bins, minlength=size)
        self.sums += times * np.bincount(bins, weights=values, minlength=size)
        self.minimum = min(self.minimum, float(values.min()))
        self.maximum = max(self.maximum, float(values.max()))

    def merge(self, other: Distribution) -> None:
        """Count the values of another one of the same grid."""
        self.counts += other.counts
        self.sums += other.sums
        self.minimum = min(self.minimum, other.minimum)
        self.maximum = max(self.maximum, other.maximum)

    @property
    def count(self) -> int:
        """Number of values."""
        return int(self.counts.sum())

    @property
    def total(self) -> float:
        """Sum of the values."""
        return float(self.sums.sum())

    @property
    def mean(self) -> float:
        """Mean of the values; there must be one."""
        return self.total / self.count

    def num_below(self, edge: float) -> int:
        """Number of values < `edge`, exact where it is one of the grid's edges."""
        return int(self.counts[self.grid.edges[1:] <= edge].sum())

    def quantile(self, share: float) -> float:
        """What `numpy.quantile` gives if all values of a bin are replaced by their mean; there must be a value.

        So it is exact where no bin holds two different values, else off by less than a bin's width (`Grid`); in the
        bin of values above the last edge but one, up to that bin's spread.
        """
        rank = share * (self.count - 1)
        low = math.floor(rank)
        first, second = self._ranked(low), self._ranked(min(low + 1, self.count - 1))
        return first + (rank - low) * (second - first)

    def _ranked(self, rank: int) -> float:
        index = int(np.searchsorted(np.cumsum(self.counts), rank, side="right"))
        mean = float(self.sums[index] / self.counts[index])
        return min(max(mean, self.minimum), self.maximum)

    def histogram(self) -> Histogram:
        """The counts in the grid's coarser bins."""
        edges = self.grid.histogram_edges
        starts = np.searchsorted(self.grid.edges, edges[:-1])
        counts = np.add.reduceat(self.counts, starts)
        return Histogram(edges, tuple(float(count) for count in counts))


@dataclass(slots=True)
class Moments:
    """Weighted means, squares and products of pairs (x, y) around their means.

    Merged as in Chan, Golub and LeVeque, "Algorithms for computing the sample variance", 1983: plain sums of squares
    would lose the variance of gates that are all near 1.
    """

    num_pairs: int = 0
    weight: float = 0.0
    mean_x: float = 0.0
    mean_y: float = 0.0
    xx: float = 0.0
    yy: float = 0.0
    xy: float = 0.0

    @classmethod
    def of(cls, x: FloatArray, y: FloatArray, weights: FloatArray) -> Moments:
        """Moments of pairs with weights > 0, all [P]."""
        if not len(x):
            return cls()
        weight = float(weights.sum())
        mean_x, mean_y = float(weights @ x) / weight, float(weights @ y) / weight
        x, y = x - mean_x, y - mean_y
        return cls(
            len(x), weight, mean_x, mean_y, float(weights @ x**2), float(weights @ y**2), float(weights @ (x * y))
        )

    def merge(self, other: Moments) -> None:
        """Take in the pairs of another one."""
        weight = self.weight + other.weight
        if not other.num_pairs or not weight:
            return
        step_x, step_y = other.mean_x - self.mean_x, other.mean_y - self.mean_y
        share = other.weight / weight
        self.xx += other.xx + step_x**2 * self.weight * share
        self.yy += other.yy + step_y**2 * self.weight * share
        self.xy += other.xy + step_x * step_y * self.weight * share
        self.mean_x += step_x * share
        self.mean_y += step_y * share
        self.weight = weight
        self.num_pairs += other.num_pairs

    def correlation(self) -> float | None:
        """Pearson's; None below three pairs (two always give 1 or -1) or where x or y does not vary."""
        if self.num_pairs < 3 or not (self._varies(self.xx, self.mean_x) and self._varies(self.yy, self.mean_y)):
            return None
        return min(max(self.xy / math.sqrt(self.xx) / math.sqrt(self.yy), -1.0), 1.0)

    def _varies(self, squares: float, mean: float) -> bool:
        """Tell a spread from rounding: a standard deviation of more than 1e-12 of the mean."""
        return math.sqrt(squares / self.weight) > 1e-12 * abs(mean)
