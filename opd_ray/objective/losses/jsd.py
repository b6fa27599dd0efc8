"""Generalised Jensen-Shannon divergence, renormalised on the support (arXiv 2306.13649)."""

from torch import Tensor

from opd_ray.config.schema import ObjectiveConfig
from opd_ray.objective.divergences import jsd_topk

NEEDS = "support_logits"


def loss(student: Tensor, teacher: Tensor, cfg: ObjectiveConfig) -> Tensor:
    """See `jsd_topk`."""
    return jsd_topk(student, teacher, beta=cfg.beta)
