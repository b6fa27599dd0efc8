"""How far the student is from the teacher: local support matching, and three one-sample estimators.

p is the student, q the teacher. All quantities are in nats.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from opd_ray.objective.inputs import compute_dtype, require_same_shape


def lsm_loss(student_topk_logits: Tensor, teacher_topk_logprobs: Tensor) -> Tensor:
    """Local support matching: reverse KL of student to teacher, both renormalised on the teacher's top-K.

    Source: arXiv 2603.25562, equations 6-8: sum over the support of p' (log p' - log q'), where p' and q' are
    p and q divided by their mass on the support. Only the student carries gradient: p'_v ((log p'_v - log
    q'_v) - loss) for logit v, nothing outside the support. With K = V it is the full reverse KL.

    The sum is taken in the equal form p' (log p' - log q') - p' + q', whose terms cannot be negative, so that
    rounding does not push a small loss below 0. Teacher entries of -inf leave the support and both sides
    renormalise over the rest; a support without any finite entry gives loss 0 and gradient 0. Duplicate ids
    count as separate entries. Where a position holds a NaN or +inf, the loss is NaN and its gradient 0: the
    reduction drops it if it is masked.

    Args:
        student_topk_logits: `[...,K]`, the student's logits (or log-probs) at the support's ids; K >= 2.
        teacher_topk_logprobs: `[...,K]`, the teacher's log-probs (or logits) at the same ids.

    Returns:
        Loss per position `[...]` in nats, float32 (float64 if an input is float64).

    Raises:
        ValueError: shapes differ, or K < 2 (one renormalised entry is always 1: no loss, no gradient).
    """
    require_same_shape(student_topk_logits=student_topk_logits, teacher_topk_logprobs=teacher_topk_logprobs)
    size = student_topk_logits.shape[-1] if student_topk_logits.dim() else 0
    if size < 2:
        raise ValueError(
            f"the support has K = {size} entries; use K >= 2, because a renormalised K = 1 teaches nothing"
        )
    dtype = compute_dtype(student_topk_logits, teacher_topk_logprobs)
    student, teacher = student_topk_logits.to(dtype), teacher_topk_logprobs.detach().to(dtype)
    usable = ((student < math.inf) & (teacher < math.inf)).all(dim=-1)  # false for NaN as well
    support = (teacher > -math.inf) & usable.unsqueeze(-1)
    log_p = _log_softmax_on(support, student)
    log_q = _log_softmax_on(support, teacher)
    counts = support & (log_p != -math.inf)
    log_ratio = torch.where(counts, log_p - log_q, 0.0)
    p = torch.where(counts, log_p, -math.inf).exp()
    q = torch.where(support, log_q, -math.inf).exp()
    near = log_ratio.abs() < 1
    near_terms = p * _expm1_residue(torch.where(near, -log_ratio, 0.0))
    loss = torch.where(near & counts, near_terms, p * (log_ratio - 1) + q).sum(dim=-1)
    return torch.where(usable, loss, math.nan)


def k1(current_logprobs: Tensor, teacher_logprobs: Tensor) -> Tensor:
    """Estimate reverse KL by r = log p - log q of a token sampled from p: unbiased, may be negative.

    Args:
        current_logprobs: any shape, log-prob of the sampled token under the student, in nats.
        teacher_logprobs: same shape, under the teacher.

    Returns:
        Same shape, float32 (float64 if an input is float64), differentiable in both.

    Raises:
        ValueError: shapes differ.

    Source: Schulman, "Approximating KL divergence" (2020); arXiv 2603.25562, equation 5.
    """
    return _log_ratio(current_logprobs, teacher_logprobs)


def k2(current_logprobs: Tensor, teacher_logprobs: Tensor) -> Tensor:
    """Estimate reverse KL by r^2 / 2: biased, never negative. Arguments and source as for `k1`."""
    return _log_ratio(current_logprobs, teacher_logprobs).square() / 2


def k3(current_logprobs: Tensor, teacher_logprobs: Tensor) -> Tensor:
    """Estimate reverse KL by exp(-r) - 1 + r: unbiased, never negative, not clamped.

    Computed in float64 and rounded, because the terms cancel where r is small. Arguments, source: see `k1`.
    """
    log_ratio = _log_ratio(current_logprobs, teacher_logprobs)
    return _expm1_residue(-log_ratio.double()).to(log_ratio.dtype)


def _log_ratio(current_logprobs: Tensor, teacher_logprobs: Tensor) -> Tensor:
    require_same_shape(current_logprobs=current_logprobs, teacher_logprobs=teacher_logprobs)
    dtype = compute_dtype(current_logprobs, teacher_logprobs)
    return current_logprobs.to(dtype) - teacher_logprobs.to(dtype)


def _expm1_residue(x: Tensor) -> Tensor:
    """Return exp(x) - 1 - x, which is never negative."""
    return torch.expm1(x) - x


def _log_softmax_on(support: Tensor, logits: Tensor) -> Tensor:
    """Log-softmax over the entries in `support`, -inf elsewhere; a row without support is finite filler."""
    inside = torch.where(support, logits, -math.inf)
    return torch.where(support.any(dim=-1, keepdim=True), inside, 0.0).log_softmax(dim=-1)
