"""Local support matching: the renormalised reverse KL on the support (arXiv 2603.25562)."""

from torch import Tensor

from opd_ray.config.schema import ObjectiveConfig
from opd_ray.objective.divergences import lsm_loss

NEEDS = "support_logits"


def loss(student: Tensor, teacher: Tensor, cfg: ObjectiveConfig) -> Tensor:
    """See `lsm_loss`."""
    return lsm_loss(student, teacher)
