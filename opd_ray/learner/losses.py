"""The loss of every response token of a microbatch, as the config's objective says.

Imports torch: learner workers only.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from opd_ray.config.registry import LOSSES, Needs
from opd_ray.config.schema import ObjectiveConfig
from opd_ray.learner.microbatch import Microbatch
from opd_ray.learner.policy_model import HeadValues


def needs_logprobs(cfg: ObjectiveConfig) -> bool:
    """Whether the loss itself needs full-vocabulary log-probs with gradient."""
    return cfg.needs is not Needs.support_logits


def requested_ids(batch: Microbatch, cfg: ObjectiveConfig) -> Tensor | None:
    """[N, K] ids whose logits `token_losses` needs; None for a loss on sampled tokens only."""
    if cfg.needs is Needs.sampled_logprobs:
        return None
    if cfg.needs is Needs.support_logprobs:
        # The sampled token's logit beside its log-prob gives the log-sum-exp.
        return torch.cat([batch.support_ids, batch.sampled_ids[:, None]], dim=1)
    return batch.support_ids


def token_losses(batch: Microbatch, cfg: ObjectiveConfig, values: HeadValues, behavior: Tensor) -> Tensor:
    """Loss of every response token, [N] float32; the logits in `values` are of `requested_ids`, `behavior` is [N]."""
    logits, current, teacher = values.logits, values.logprobs, batch.teacher_topk_logprobs
    loss: Callable[..., Tensor] = LOSSES.load(cfg.kind).loss
    if logits is not None and cfg.needs is Needs.support_logits:
        return loss(logits, teacher, cfg)
    if current is None:
        raise ValueError(f"the loss {cfg.kind} needs the current log-probs: compute them in the forward pass")
    if logits is None:
        return loss(current, behavior, batch.teacher_logprobs, cfg)
    log_normalizer = logits[:, -1:] - current[:, None]
    return loss(logits[:, :-1] - log_normalizer, teacher, cfg)
