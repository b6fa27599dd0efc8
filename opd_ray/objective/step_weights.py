"""Weights of mean 1 over a step's tokens from the gates of its segments, and two controls.

A sharded step gathers (log-gate, tokens) of all its segments, here as `[S]`, and every rank computes the same.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from opd_ray.objective.inputs import require_rank, require_same_shape


def segment_weights(log_gate: Tensor, num_tokens: Tensor, *, max_weight: float | None = None) -> Tensor:
    """Scale the gates of a step to mean 1 over its tokens: each segment's weight.

    Computed in the log domain, so it is right even when every gate underflows. Equal gates give exactly 1.0;
    that holds for gates that are all 0 (-inf) too, while 0 beside a positive gate stays 0. The result does not
    depend on the order of the segments, nor on segments without tokens among them, to the last bit.

    With `max_weight`, no weight is above it and the mean is still 1: weights are min(c g, max_weight) with the
    c that makes it so. As many segments as it takes reach the cap.

    Args:
        log_gate: `[S]`, log of each segment's gate, <= 0; float64 keeps the digits of far-off gates.
        num_tokens: `[S]` integers >= 0, valid tokens of each segment.
        max_weight: largest weight, above 1, or None for no limit.

    Returns:
        `[S]` float64; 0 for a segment without tokens (all of them, if the step has none).

    Raises:
        ValueError: shapes that differ or are not `[S]`, a NaN, or a `max_weight` of 1 or less.
    """
    _require_segments(log_gate, num_tokens)
    if bool(log_gate.isnan().any()):
        raise ValueError("log_gate holds a NaN; leave the non-finite log-probs out of the segments' drift")
    used = (num_tokens > 0).nonzero().flatten()
    # One order for the sums, whatever order the shards came in.
    order = used[num_tokens[used].argsort(stable=True)]
    order = order[log_gate[order].argsort(stable=True)]
    weights = torch.zeros(log_gate.shape, dtype=torch.float64, device=log_gate.device)
    unit = unit_mean_weights(log_gate[order].double().unsqueeze(0), num_tokens[order].unsqueeze(0), max_weight)
    return weights.index_put((order,), unit.squeeze(0))


def shuffled(log_gate: Tensor, num_tokens: Tensor, *, seed: int) -> Tensor:
    """Control: the gates of a step's segments, permuted over these segments.

    Whatever gain is left was not due to the gate being on the right segment. Segments without tokens keep
    theirs. The permutation follows the order in which the segments are given: gather them in one fixed order.

    Args:
        log_gate: `[S]`, log of each segment's gate.
        num_tokens: `[S]` integers >= 0, valid tokens of each segment.
        seed: same seed, same permutation, on any device.

    Returns:
        `[S]`, dtype and device of `log_gate`.

    Raises:
        ValueError: shapes that differ or are not `[S]`.
    """
    _require_segments(log_gate, num_tokens)
    used = (num_tokens > 0).nonzero().flatten()
    order = torch.randperm(used.numel(), generator=torch.Generator().manual_seed(seed)).to(used.device)
    return log_gate.index_put((used,), log_gate[used[order]])


def resampled(log_gate: Tensor, num_tokens: Tensor, *, seed: int) -> Tensor:
    """Control: each segment's gate drawn again, with replacement, from the gates of the step's tokens.

    A draw picks a token of the step and takes its segment's gate, so a segment is picked with a chance in
    proportion to its tokens. Each token's gate then has the distribution that gates have over the step's
    tokens, also when long and short segments are gated differently. Segments without tokens keep theirs.

    Args:
        log_gate: `[S]`, log of each segment's gate.
        num_tokens: `[S]` integers >= 0, valid tokens of each segment.
        seed: same seed, same draws, on any device.

    Returns:
        `[S]`, dtype and device of `log_gate`.

    Raises:
        ValueError: shapes that differ or are not `[S]`.
    """
    _require_segments(log_gate, num_tokens)
    used = (num_tokens > 0).nonzero().flatten()
    if used.numel() == 0:
        return log_gate.clone()
    ends = num_tokens[used].long().cumsum(0)
    generator = torch.Generator().manual_seed(seed)
    token = torch.randint(int(ends[-1]), (used.numel(),), generator=generator).to(ends.device)
    return log_gate.index_put((used,), log_gate[used[torch.searchsorted(ends, token, right=True)]])


def unit_mean_weights(log_gate: Tensor, num_tokens: Tensor, max_weight: float | None = None) -> Tensor:
    """Scale each row's gates to mean 1 over the row's tokens; `segment_weights` for rows `[R,S]`, as given.

    Returns `[R,S]` float64; 0 for a segment without tokens.
    """
    require_max_weight(max_weight)
    used = num_tokens > 0
    count = num_tokens.sum(dim=1, keepdim=True)
    weights = _share(log_gate, num_tokens, used, count)
    if max_weight is None:
        return weights
    capped = torch.zeros_like(used)
    # What a capped segment gives up goes to the rest, which may lift others over the cap: at most S rounds.
    while bool((over := used & ~capped & (weights > max_weight)).any()):
        capped |= over
        budget = count - max_weight * torch.where(capped, num_tokens, 0).sum(dim=1, keepdim=True).double()
        weights = torch.where(capped, max_weight, _share(log_gate, num_tokens, used & ~capped, budget))
    return weights


def require_max_weight(max_weight: float | None) -> None:
    """Raise ValueError unless `max_weight` is None or above 1."""
    if max_weight is not None and not max_weight > 1:
        raise ValueError(f"max_weight is {max_weight}; use a number above 1, because the mean weight is 1")


def _share(log_gate: Tensor, num_tokens: Tensor, among: Tensor, budget: Tensor) -> Tensor:
    """Split `budget [R,1]` over the tokens of the segments in `among`, in proportion to their gates.

    The largest gate is shifted to 1 first, so that it cannot underflow.
    """
    if log_gate.numel() == 0:
        return log_gate.exp()
    inside = torch.where(among, log_gate, -math.inf)
    largest = inside.amax(dim=1, keepdim=True)
    gate = torch.where(among, torch.where(inside == largest, 1.0, (inside - largest).exp()), 0.0)
    tokens = torch.where(among, num_tokens, 0)
    total = (gate * tokens).sum(dim=1, keepdim=True)
    return gate * budget / torch.where(total > 0, total, 1.0)


def _require_segments(log_gate: Tensor, num_tokens: Tensor) -> None:
    require_rank("log_gate", log_gate, 1, "[S]")
    require_same_shape(log_gate=log_gate, num_tokens=num_tokens)
