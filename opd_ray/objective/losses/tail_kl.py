"""KL over K + 1 bins: the support's ids and the rest of the vocabulary (arXiv 2601.19897)."""

from torch import Tensor

from opd_ray.config.schema import ObjectiveConfig
from opd_ray.objective.divergences import tail_kl

NEEDS = "support_logprobs"


def loss(student: Tensor, teacher: Tensor, cfg: ObjectiveConfig) -> Tensor:
    """See `tail_kl`."""
    return tail_kl(student, teacher, direction=cfg.direction)
