"""Policy gradient on the sampled token (the base loss of arXiv 2606.24084)."""

from torch import Tensor

from opd_ray.config.schema import ObjectiveConfig
from opd_ray.objective.sampled_token import sampled_token_loss

NEEDS = "sampled_logprobs"


def loss(current: Tensor, behavior: Tensor, teacher: Tensor, cfg: ObjectiveConfig) -> Tensor:
    """See `sampled_token_loss`."""
    return sampled_token_loss(
        current,
        behavior,
        teacher,
        advantage=cfg.advantage,
        clip_low=cfg.clip_low,
        clip_high=cfg.clip_high,
        dual_clip=cfg.dual_clip,
    )
