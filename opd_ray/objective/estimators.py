"""Three estimates of the reverse KL from one sampled token: k1, k2, k3.

p is the student, q the teacher. All quantities are in nats. Source: Schulman, "Approximating KL divergence"
(2020).
"""

from __future__ import annotations

import torch
from torch import Tensor

from opd_ray.objective.inputs import compute_dtype, require_same_shape


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
    wide = log_ratio.double()
    return (torch.expm1(-wide) + wide).to(log_ratio.dtype)


def _log_ratio(current_logprobs: Tensor, teacher_logprobs: Tensor) -> Tensor:
    require_same_shape(current_logprobs=current_logprobs, teacher_logprobs=teacher_logprobs)
    dtype = compute_dtype(current_logprobs, teacher_logprobs)
    return current_logprobs.to(dtype) - teacher_logprobs.to(dtype)
