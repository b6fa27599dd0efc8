"""Reduction of per-token losses to one number, and the effective number of tokens of a set of weights."""

from __future__ import annotations

import torch
from torch import Tensor

from opd_ray.objective.inputs import compute_dtype, require_same_shape


def gated_token_mean(
    token_loss: Tensor,
    token_weights: Tensor,
    response_mask: Tensor,
    *,
    num_loss_tokens: float | Tensor | None = None,
) -> Tensor:
    """Return sum(m w l) / N, the weighted token mean (arXiv 2606.24084, sec. 3; arXiv 2603.25562, eq. 8).

    N is a plain count: with weights of mean 1 this is the gate-weighted mean, with weights of 1 the ordinary
    one. A shard of a step passes the step's number (or 1, and divides the gradients once at the end, see
    `gate.drift_gate`). What is masked counts for nothing, whatever it holds, NaN included; a NaN at a valid
    position shows in the result. Without any valid token the result is 0 and keeps its graph, so that
    backward gives zeros.

    Args:
        token_loss: `[B,T]` (any shape), loss of each token in nats.
        token_weights: same shape, detached weights.
        response_mask: same shape, bool or 0/1.
        num_loss_tokens: the divisor N, >= 0 (0 only if nothing is valid); by default the valid tokens of
            `response_mask`.

    Returns:
        Scalar, float32 (float64 if loss or weights are float64).

    Raises:
        ValueError: shapes differ, or a negative divisor.
    """
    require_same_shape(token_loss=token_loss, token_weights=token_weights, response_mask=response_mask)
    dtype = compute_dtype(token_loss, token_weights)
    valid = response_mask > 0
    loss = torch.where(valid, token_loss.to(dtype), 0.0)
    weights = torch.where(valid, token_weights.to(dtype), 0.0)
    count = torch.as_tensor(valid.sum() if num_loss_tokens is None else num_loss_tokens, device=loss.device)
    if not bool(count >= 0):
        raise ValueError(f"num_loss_tokens is {count.item()}; give the step's number of valid tokens")
    divisor = torch.where(count > 0, count, 1).to(dtype)
    return (loss * weights).sum() / divisor


def effective_sample_size(weights: Tensor, mask: Tensor) -> Tensor:
    """Return Kish's effective sample size (sum w)^2 / sum(w^2) over valid entries, in tokens.

    It equals the number of valid entries when their weights are equal and goes down to 1 when one weight
    outweighs all others; 0 when no entry is valid or all weights are 0. Scale does not matter. Source: Kish,
    "Survey Sampling" (1965).

    Args:
        weights: any shape, >= 0.
        mask: same shape, bool or 0/1; entries where it is 0 may hold anything.

    Returns:
        Scalar, detached, float32 (float64 if `weights` is float64).

    Raises:
        ValueError: shapes differ.
    """
    require_same_shape(weights=weights, mask=mask)
    valid = torch.where(mask > 0, weights.detach().double(), 0.0)
    if valid.numel() == 0:
        return valid.new_zeros((), dtype=compute_dtype(weights))
    largest = valid.max()
    scaled = valid / torch.where(largest > 0, largest, 1.0)
    squares = scaled.square().sum()
    size = scaled.sum().square() / torch.where(squares > 0, squares, 1.0)
    return size.to(compute_dtype(weights))
