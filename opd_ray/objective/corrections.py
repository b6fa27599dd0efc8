"""Baselines to compare the drift gate with: other methods' corrections for stale rollouts.

rho = exp(current - behaviour log-prob) is how much likelier the student of now makes a token than the weights
that sampled it. Weights multiply a token's loss and carry no gradient. They are not normalised.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from opd_ray.objective.inputs import compute_dtype, require_rank, require_same_shape


def truncated_is_weights(current_logprobs: Tensor, behavior_logprobs: Tensor, *, cap: float) -> Tensor:
    """Truncated importance sampling: min(rho, cap) of each token.

    Source: Ionides, "Truncated importance sampling" (2008); for rollouts of another engine than the learner's,
    Yao et al., "Your efficient RL framework secretly brings you off-policy RL training" (2025).

    Args:
        current_logprobs: any shape, log-prob of each token under the student being trained, in nats.
        behavior_logprobs: same shape, under the weights that sampled it.
        cap: the largest weight, above 0; also what an overflowing rho gets.

    Returns:
        Weights, same shape, detached, float32 (float64 if an input is float64); 0 where an input is not finite.

    Raises:
        ValueError: shapes differ, or a cap that is not finite and above 0.
    """
    if not 0 < cap < math.inf:
        raise ValueError(f"cap is {cap}; use a finite number above 0")
    rho, usable = _ratio(current_logprobs, behavior_logprobs)
    return torch.where(usable, rho.clamp(max=cap), 0.0)


def icepop_weights(current_logprobs: Tensor, behavior_logprobs: Tensor, *, low: float, high: float) -> Tensor:
    """IcePop: rho where low <= rho <= high, both included, else 0.

    Source: IcePop, Ring-1T technical report, arXiv 2510.18855. Some code bounds the inverse ratio instead.

    Args:
        current_logprobs: any shape, log-prob of each token under the student being trained, in nats.
        behavior_logprobs: same shape, under the weights that sampled it.
        low: smallest ratio that is kept, at least 0.
        high: largest ratio that is kept, finite, at least `low`.

    Returns:
        Weights, same shape, detached, float32 (float64 if an input is float64); 0 where an input is not finite.

    Raises:
        ValueError: shapes differ, or bounds out of order.
    """
    _require_bounds(low, high)
    rho, usable = _ratio(current_logprobs, behavior_logprobs)
    return torch.where(usable & (rho >= low) & (rho <= high), rho, 0.0)


def geometric_sequence_mask(  # noqa: PLR0913  (the public surface)
    current_logprobs: Tensor, behavior_logprobs: Tensor, response_mask: Tensor, *, low: float, high: float
) -> Tensor:
    """Tell which responses to keep: those whose geometric mean of rho lies in [low, high], both included.

    The geometric mean is exp(mean of current - behaviour) over the valid tokens; it does not shrink with the
    response's length as the product of rho does. A token is valid where its mask is above 0 and both log-probs
    are finite. A response without valid tokens is kept, which changes nothing: it has no loss.

    Source: the sequence ratio of GSPO, arXiv 2507.18071, used as a mask.

    Args:
        current_logprobs: `[B,T]`, log-prob of each response token under the student being trained, in nats.
        behavior_logprobs: `[B,T]`, the same under the weights that sampled it.
        response_mask: `[B,T]`, bool or 0/1.
        low: smallest mean ratio that is kept, at least 0.
        high: largest mean ratio that is kept, finite, at least `low`.

    Returns:
        `[B]` bool.

    Raises:
        ValueError: shapes differ or are not `[B,T]`, or bounds out of order.
    """
    _require_bounds(low, high)
    require_rank("current_logprobs", current_logprobs, 2, "[B,T]")
    require_same_shape(
        current_logprobs=current_logprobs, behavior_logprobs=behavior_logprobs, response_mask=response_mask
    )
    current, behavior = current_logprobs.detach().double(), behavior_logprobs.detach().double()
    valid = (response_mask > 0) & current.isfinite() & behavior.isfinite()
    total = torch.where(valid, current - behavior, 0.0).sum(dim=1)
    tokens = valid.sum(dim=1)
    ratio = (total / tokens.clamp(min=1)).exp().to(compute_dtype(current_logprobs, behavior_logprobs))
    return (tokens == 0) | ((ratio >= low) & (ratio <= high))


def hard_drop_gate(segment_drift: Tensor, *, limit: float) -> Tensor:
    """All-or-nothing gate: 1 where a segment's drift is at most `limit`, else 0. A control for exp(-tau |s|).

    Args:
        segment_drift: `[B,S]` (any shape), statistic of each segment in nats, see `drift_gate`.
        limit: largest magnitude that is kept, in nats, at least 0; itself included.

    Returns:
        Gate, same shape, detached, float32 (float64 if the drift is); 0 where the drift is NaN.

    Raises:
        ValueError: a limit that is negative or NaN.
    """
    if not limit >= 0:
        raise ValueError(f"limit is {limit}; use a number of nats of at least 0")
    return (segment_drift.detach().abs() <= limit).to(compute_dtype(segment_drift))


def _ratio(current_logprobs: Tensor, behavior_logprobs: Tensor) -> tuple[Tensor, Tensor]:
    """Return rho (inf where it overflows) and where both inputs are finite."""
    require_same_shape(current_logprobs=current_logprobs, behavior_logprobs=behavior_logprobs)
    dtype = compute_dtype(current_logprobs, behavior_logprobs)
    current, behavior = current_logprobs.detach().double(), behavior_logprobs.detach().double()
    # Rounded to the inputs' precision before it meets a bound, which is no more exact than they are.
    return (current - behavior).exp().to(dtype), current.isfinite() & behavior.isfinite()


def _require_bounds(low: float, high: float) -> None:
    if not 0 <= low <= high < math.inf:
        raise ValueError(f"low is {low} and high {high}; use finite numbers with 0 <= low <= high")
