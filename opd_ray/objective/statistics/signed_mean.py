"""Signed mean of the drift (the paper's): drift in both directions cancels."""

from torch import Tensor

from opd_ray.objective.statistics import SegmentMean


def statistic(drift: Tensor, mean: SegmentMean) -> Tensor:
    """Return mean(d)."""
    return mean(drift)
