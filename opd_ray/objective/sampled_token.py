"""Sampled-token distillation: a policy-gradient loss on the tokens that the student sampled."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from opd_ray.config.choices import Advantage
from opd_ray.objective.inputs import compute_dtype, require_name, require_same_shape


def sampled_token_loss(  # noqa: PLR0913  (the public surface)
    current_logprobs: Tensor,
    behavior_logprobs: Tensor,
    teacher_logprobs: Tensor,
    *,
    advantage: Advantage | str,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = 3.0,
) -> Tensor:
    """Return each sampled token's loss; p is the student, q the teacher, ratio = p_current / p_behaviour.

    `frozen` (the base loss of arXiv 2606.24084; arXiv 2603.25562, equation 5, as its code trains it): A = log
    q - log p_behaviour, loss = max(-A ratio, -A clip(ratio, 1 - clip_low, 1 + clip_high)), and for A < 0 at
    most -dual_clip A.
    `recompute` (arXiv 2606.24143, the surrogate it recommends under staleness): A = log q - log p_current,
    detached, loss = -A ratio; the clips are not used. Its expected gradient is that of the reverse KL at the
    current student.

    Ratios are not clamped. Where an input is not finite, the loss is NaN and its gradient 0: the reduction
    drops it if it is masked, and lets it be seen if it is not.

    Args:
        current_logprobs: any shape, log-prob of the token under the student being trained, in nats; carries
            gradient.
        behavior_logprobs: same shape, under the weights that sampled it; constant.
        teacher_logprobs: same shape, under the teacher; constant.
        advantage: `frozen` or `recompute`.
        clip_low: in [0, 1].
        clip_high: at least 0.
        dual_clip: above 1, or None for no dual clip.

    Returns:
        Loss, same shape, float32 (float64 if an input is float64).

    Raises:
        ValueError: shapes differ, an unknown advantage, or a clip out of range.
    """
    require_same_shape(
        current_logprobs=current_logprobs,
        behavior_logprobs=behavior_logprobs,
        teacher_logprobs=teacher_logprobs,
    )
    require_name("advantage", advantage, Advantage)
    _require_clips(clip_low, clip_high, dual_clip)
    dtype = compute_dtype(current_logprobs, behavior_logprobs, teacher_logprobs)
    behavior, teacher = behavior_logprobs.detach().to(dtype), teacher_logprobs.detach().to(dtype)
    current = current_logprobs.to(dtype)
    usable = current.isfinite() & behavior.isfinite() & teacher.isfinite()
    current, behavior, teacher = (torch.where(usable, x, 0.0) for x in (current, behavior, teacher))
    ratio = _ratio(current - behavior)
    if advantage == "recompute":
        loss = -(teacher - current.detach()) * ratio
    else:
        gain = teacher - behavior
        loss = torch.maximum(-gain * ratio, -gain * ratio.clamp(1 - clip_low, 1 + clip_high))
        if dual_clip is not None:
            loss = torch.where(gain < 0, torch.minimum(loss, -gain * dual_clip), loss)
    return torch.where(usable, loss, math.nan)


def _ratio(log_ratio: Tensor) -> Tensor:
    """Return exp; an overflow is inf without gradient, so that a masked one's zero gradient stays zero."""
    overflows = log_ratio.detach().exp().isinf()
    return torch.where(overflows, math.inf, torch.where(overflows, 0.0, log_ratio).exp())


def _require_clips(clip_low: float, clip_high: float, dual_clip: float | None) -> None:
    if not 0 <= clip_low <= 1:
        raise ValueError(f"clip_low is {clip_low}; use a number in [0, 1]")
    if not clip_high >= 0:
        raise ValueError(f"clip_high is {clip_high}; use a number of at least 0")
    if dual_clip is not None and not dual_clip > 1:
        raise ValueError(f"dual_clip is {dual_clip}; use a number above 1, or None for no dual clip")
