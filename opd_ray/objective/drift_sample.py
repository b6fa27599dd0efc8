"""Measure drift on a sample of each segment's tokens, and how far off the sampled mean may be.

The gate needs the mean drift of a segment, not every token's; where no loss needs the current log-probs, a full
pass of the LM head over each token can be replaced by one over a sample.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from opd_ray.objective.inputs import require_rank, require_same_shape


def stratified_sample(
    valid_mask: Tensor, segment_ids: Tensor, *, tokens_per_segment: int, seeds: Sequence[int]
) -> Tensor:
    """Choose the tokens of each segment whose drift is measured.

    A segment with more than n valid tokens is cut, by rank among its valid tokens, into n strata of near-equal
    length (they differ by one token at most); one token is drawn uniformly from each. A smaller segment is
    measured whole. The draws of a row depend on its seed and its own tokens only: not on the batch around it,
    its padding or the device.

    Args:
        valid_mask: `[B,T]`, bool or 0/1, tokens that may be measured.
        segment_ids: `[B,T]` integers, numbered from 0 in each row, negative = no segment.
        tokens_per_segment: n, at least 1.
        seeds: one a row; a trajectory that keeps its seed keeps its sample.

    Returns:
        measured_mask `[B,T]` bool, on the device of `valid_mask`. Drawn on the CPU.

    Raises:
        ValueError: shapes differ or are not `[B,T]`, n below 1, or another number of seeds than rows.
    """
    require_rank("valid_mask", valid_mask, 2, "[B,T]")
    require_same_shape(valid_mask=valid_mask, segment_ids=segment_ids)
    if tokens_per_segment < 1:
        raise ValueError(f"tokens_per_segment is {tokens_per_segment}; use at least 1")
    if len(seeds) != valid_mask.shape[0]:
        raise ValueError(f"there are {len(seeds)} seeds but {valid_mask.shape[0]} rows; give one seed a row")
    ids = segment_ids.cpu().long()
    valid = (valid_mask.cpu() > 0) & (ids >= 0)
    measured = torch.zeros_like(valid)
    for row, seed in enumerate(seeds):
        where = valid[row].nonzero().flatten()
        measured[row, where[_sampled(ids[row, where], tokens_per_segment, seed)]] = True
    return measured.to(valid_mask.device)


def drift_standard_error(
    current_logprobs: Tensor,
    behavior_logprobs: Tensor,
    measured_mask: Tensor,
    valid_mask: Tensor,
    segment_ids: Tensor,
) -> Tensor:
    """Estimate the standard error of each segment's sampled signed mean drift, as an estimate of the full mean.

    With one token a stratum the variance inside a stratum cannot be seen; neighbours stand in for it. With
    the n measured drifts of a segment of m valid tokens in order, the estimate of the variance is

        (1 - n/m) / n * sum of (d_{j+1} - d_j)^2 / (2 (n - 1)).

    Its expectation is right where neighbouring strata have the same mean and spread. It is too high where
    their means differ, by the squared steps between them, so it errs on the safe side; the plain variance in
    its place would add all of a segment's trend to the error that stratification has removed. The strata are
    weighted alike although their lengths may differ by one token; that biases the mean by at most n/(4 m) of
    the range of the strata's means (by nothing if n divides m) and is not in here.

    Source: Wolter, "Introduction to Variance Estimation" (2007), chapter 8, successive differences.

    Args:
        current_logprobs: `[B,T]`, log-prob of each token under the student being trained, in nats.
        behavior_logprobs: `[B,T]`, the same under the weights that sampled it.
        measured_mask: `[B,T]`, bool or 0/1, the sample; where a log-prob is not finite, its token leaves the
            valid ones.
        valid_mask: `[B,T]`, bool or 0/1.
        segment_ids: `[B,T]` integers, negative = no segment.

    Returns:
        `[B,S]` float64 in nats, detached; 0 where all valid tokens are measured or there are none, NaN where
        fewer than two of several are.

    Raises:
        ValueError: shapes differ or are not `[B,T]`.
    """
    require_rank("current_logprobs", current_logprobs, 2, "[B,T]")
    require_same_shape(
        current_logprobs=current_logprobs,
        behavior_logprobs=behavior_logprobs,
        measured_mask=measured_mask,
        valid_mask=valid_mask,
        segment_ids=segment_ids,
    )
    drift = current_logprobs.detach().double() - behavior_logprobs.detach().double()
    chosen = (valid_mask > 0) & (segment_ids >= 0) & (measured_mask > 0)
    valid = (valid_mask > 0) & (segment_ids >= 0) & ~(chosen & ~drift.isfinite())
    batch = segment_ids.shape[0]
    size = int(segment_ids.max()) + 1 if segment_ids.numel() else 0
    key = torch.arange(batch, device=drift.device).unsqueeze(1) * size + segment_ids.long()
    population = torch.bincount(key[valid], minlength=batch * size).double()
    key, values = key[chosen & valid], drift[chosen & valid]
    count = torch.bincount(key, minlength=batch * size).double()
    order = key.argsort(stable=True)
    key, values = key[order], values[order]
    steps = torch.where(key.diff() == 0, values.diff().square(), 0.0)
    squares = torch.zeros_like(count).scatter_add_(0, key[1:], steps)
    spread = squares / (2 * (count - 1).clamp(min=1))
    variance = (1 - count / population.clamp(min=1)) * spread / count.clamp(min=1)
    error = torch.where(count < 2, math.nan, variance.sqrt())
    return torch.where(count == population, 0.0, error).reshape(batch, size)


def _sampled(ids: Tensor, tokens_per_segment: int, seed: int) -> Tensor:
    """Return which of a row's valid tokens, whose segments are `ids [n]`, are measured, as indices."""
    if ids.numel() == 0:
        return ids
    counts = torch.bincount(ids)
    draws = torch.rand(
        counts.numel(), tokens_per_segment, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    edges = torch.arange(tokens_per_segment + 1) * counts.unsqueeze(1) // tokens_per_segment
    first, length = edges[:, :-1], edges.diff(dim=1)
    rank = first + torch.minimum((draws * length).long(), length - 1)
    large = counts > tokens_per_segment
    order = ids.argsort(stable=True)  # a segment's tokens side by side, in their order
    begin = (counts.cumsum(0) - counts).unsqueeze(1)
    return torch.cat([order[(begin + rank)[large].flatten()], order[~large[ids[order]]]])
