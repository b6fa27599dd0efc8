"""From the config's objective to the loss of every response token of a microbatch.

Imports torch: learner workers only.
"""

from __future__ import annotations

import torch
from torch import Tensor

from opd_ray.config.choices import ObjectiveKind
from opd_ray.config.schema import ObjectiveConfig
from opd_ray.learner.microbatch import Microbatch
from opd_ray.learner.policy_model import HeadValues
from opd_ray.objective import forward_kl_topk, jsd_topk, lsm_loss, sampled_token_loss, tail_kl


def needs_logprobs(cfg: ObjectiveConfig) -> bool:
    """Whether the loss itself needs full-vocabulary log-probs with gradient."""
    return cfg.kind is ObjectiveKind.opd or _needs_normalizer(cfg)


def _needs_normalizer(cfg: ObjectiveConfig) -> bool:
    return cfg.kind is ObjectiveKind.tail_kl or (cfg.kind is ObjectiveKind.forward_kl and not cfg.renormalize)


def requested_ids(batch: Microbatch, cfg: ObjectiveConfig) -> Tensor | None:
    """[N, K] ids whose logits `token_losses` needs; None for a loss on sampled tokens only."""
    if cfg.kind is ObjectiveKind.opd:
        return None
    if _needs_normalizer(cfg):
        # The sampled token's logit beside its log-prob gives the log-sum-exp.
        return torch.cat([batch.support_ids, batch.sampled_ids[:, None]], dim=1)
    return batch.support_ids


def token_losses(batch: Microbatch, cfg: ObjectiveConfig, values: HeadValues, behavior: Tensor) -> Tensor:
    """Loss of every response token, [N] float32; the logits in `values` are of `requested_ids`, `behavior` is [N]."""
    teacher, logits, current = batch.teacher_topk_logprobs, values.logits, values.logprobs
    if logits is not None and cfg.kind is ObjectiveKind.lsm:
        return lsm_loss(logits, teacher)
    if logits is not None and cfg.kind is ObjectiveKind.jsd:
        return jsd_topk(logits, teacher, beta=cfg.beta)
    if logits is not None and cfg.kind is ObjectiveKind.forward_kl and cfg.renormalize:
        return forward_kl_topk(logits, teacher, renormalize=True)
    if current is None:
        raise ValueError(f"the loss {cfg.kind.name} needs the current log-probs: compute them in the forward pass")
    if logits is None:
        return _sampled_loss(batch, cfg, current, behavior)
    log_normalizer = logits[:, -1:] - current[:, None]
    logprobs = logits[:, :-1] - log_normalizer
    if cfg.kind is ObjectiveKind.forward_kl:
        return forward_kl_topk(logprobs, teacher, renormalize=False)
    return tail_kl(logprobs, teacher, direction=cfg.direction)


def _sampled_loss(batch: Microbatch, cfg: ObjectiveConfig, current: Tensor, behavior: Tensor) -> Tensor:
    return sampled_token_loss(
        current,
        behavior,
        batch.teacher_logprobs,
        advantage=cfg.advantage,
        clip_low=cfg.clip_low,
        clip_high=cfg.clip_high,
        dual_clip=cfg.dual_clip,
    )
