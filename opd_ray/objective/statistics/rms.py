"""Root mean square of the drift."""

from torch import Tensor

from opd_ray.objective.statistics import SegmentMean


def statistic(drift: Tensor, mean: SegmentMean) -> Tensor:
    """Return sqrt(mean(d^2))."""
    return mean(drift.square()).sqrt()
