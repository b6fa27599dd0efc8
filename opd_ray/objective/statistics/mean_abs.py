"""Mean of the drift's magnitude."""

from torch import Tensor

from opd_ray.objective.statistics import SegmentMean


def statistic(drift: Tensor, mean: SegmentMean) -> Tensor:
    """Return mean(|d|)."""
    return mean(drift.abs())
