"""The k3 estimate of KL(behaviour || current): never negative, nearly drift^2 / 2 where drift is small."""

import torch
from torch import Tensor

from opd_ray.objective.statistics import SegmentMean


def statistic(drift: Tensor, mean: SegmentMean) -> Tensor:
    """Return mean(exp(d) - 1 - d)."""
    return mean(torch.expm1(drift) - drift)
