"""Forward KL on the support: the teacher's top-K cross-entropy (arXiv 2306.13649)."""

from torch import Tensor

from opd_ray.config.schema import ObjectiveConfig
from opd_ray.objective.divergences import forward_kl_topk

NEEDS = "support_logprobs"
NEEDS_RENORMALIZED = "support_logits"


def loss(student: Tensor, teacher: Tensor, cfg: ObjectiveConfig) -> Tensor:
    """See `forward_kl_topk`."""
    return forward_kl_topk(student, teacher, renormalize=cfg.renormalize)
