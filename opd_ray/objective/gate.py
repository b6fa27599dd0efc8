"""The blockwise policy-drift gate: trust a segment less the further the student has moved since sampling it.

Source: arXiv 2606.24084, section 3, equation 1. With token drift d = current - behaviour log-prob, segment
statistic s and gate g = exp(-tau * |s|), a token's weight is its segment's gate, scaled to mean 1 over the
valid tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from opd_ray.objective.inputs import compute_dtype, require_rank, require_same_shape

Statistic = Literal["signed_mean", "mean_abs", "rms", "k3"]
Normalize = Literal["step", "sequence", "none"]


@dataclass(frozen=True)
class GateResult:
    """What the gate decided. Tensors are detached; floats are float32, or float64 for float64 inputs.

    Attributes:
        token_weights: `[B,T]`, the weight of each token's loss; 0 where a token is not valid.
        segment_gate: `[B,S]`, the raw gate in [0, 1] before normalisation; 1 for a segment without valid
            tokens.
        segment_drift: `[B,S]`, the statistic in nats (signed for `signed_mean`); 0 for a segment without
            valid tokens.
        segment_tokens: `[B,S]` int64, valid tokens of each segment.
    """

    token_weights: Tensor
    segment_gate: Tensor
    segment_drift: Tensor
    segment_tokens: Tensor

    @property
    def weight_sum(self) -> Tensor:
        """Sum of the token weights, a float64 scalar; a sharded step divides by it (see `drift_gate`)."""
        return self.token_weights.sum(dtype=torch.float64)

    @property
    def num_tokens(self) -> Tensor:
        """Number of valid tokens, an int64 scalar."""
        return self.segment_tokens.sum()


def drift_gate(  # noqa: PLR0913  (the public surface)
    current_logprobs: Tensor,
    behavior_logprobs: Tensor,
    response_mask: Tensor,
    segment_ids: Tensor,
    *,
    tau: float | Tensor,
    statistic: Statistic,
    normalize: Normalize,
) -> GateResult:
    """Compute the drift gate of each segment and the weight of each token (arXiv 2606.24084, equation 1).

    A token is valid where its mask is above 0, its segment id is not negative and both log-probs are finite;
    the others take no part and get weight 0. A caller that counts loss tokens itself must take non-finite
    ones out of its mask too.

    ``normalize="step"`` scales to mean 1 over all valid tokens handed in, ``"sequence"`` over each row's, and
    ``"none"`` leaves the raw gates. Normalisation is in the log domain, so it is right even when every raw
    gate underflows. When all gates are equal (tau = 0, no drift), normalised weights are exactly 1.0; with no
    drift raw ones are too.

    Sharded steps (several microbatches, several ranks) know the normaliser only after the last shard. They
    use ``"none"``, add up the gradients of ``gated_token_mean(..., num_loss_tokens=1)`` and
    `GateResult.weight_sum` over the shards, and divide once: sum(m g l) / sum(m g) is the loss that
    ``"step"`` gives on the whole batch. Raw gates are not rescued from underflow: in float32 a gate loses
    precision from tau * |s| = 87 on and is 0 from 104 on. Next to any segment of smaller drift such a gate is
    0 for all purposes; only if *every* segment of the step is that far off is weight_sum 0, and the caller
    must stop, because the policy has diverged. `weight_sum` is added up in float64; float64 log-probs move
    the limit to 708.

    Args:
        current_logprobs: `[B,T]`, log-prob of each response token under the student being trained, in nats.
        behavior_logprobs: `[B,T]`, the same under the weights that sampled it.
        response_mask: `[B,T]`, bool or 0/1.
        segment_ids: `[B,T]` integers, numbered from 0 in each row, negative = no segment (`segments`).
        tau: how hard the gate bites, in 1/nats, >= 0: one number, or `[B,S]` for a value per segment, where
            S = ``segment_ids.max() + 1``.
        statistic: of d over a segment's valid tokens: `signed_mean` (the paper), `mean_abs`, `rms`, or `k3` =
            mean(exp(d) - 1 - d).
        normalize: `step`, `sequence` or `none`.

    Returns:
        GateResult, detached. Statistics and sums are accumulated in float64, then rounded to the result's
        dtype.

    Raises:
        ValueError: shapes that differ, a negative or NaN tau or one of another shape, an unknown name.
    """
    require_rank("current_logprobs", current_logprobs, 2, "[B,T]")
    require_same_shape(
        current_logprobs=current_logprobs,
        behavior_logprobs=behavior_logprobs,
        response_mask=response_mask,
        segment_ids=segment_ids,
    )
    _require_name("statistic", statistic, get_args(Statistic))
    _require_name("normalize", normalize, get_args(Normalize))
    dtype = compute_dtype(current_logprobs, behavior_logprobs)
    with torch.no_grad():
        current, behavior = current_logprobs.to(dtype), behavior_logprobs.to(dtype)
        valid = (response_mask > 0) & (segment_ids >= 0) & current.isfinite() & behavior.isfinite()
        drift = torch.where(valid, current - behavior, 0.0).double()
        segment = segment_ids.clamp(min=0).long()
        shape = (segment_ids.shape[0], int(segment_ids.max()) + 1 if segment_ids.numel() else 0)
        tokens = _segment_sum(valid.long(), segment, shape)
        score = _segment_statistic(drift, segment, tokens, statistic)
        log_gate = _log_gate(score, tau)
        weights = _segment_weights(log_gate, tokens, normalize).to(dtype)
        token_weights = torch.where(valid, weights.gather(1, segment), 0.0) if shape[1] else valid.to(dtype)
    return GateResult(token_weights, log_gate.exp().to(dtype), score.to(dtype), tokens)


def _segment_sum(values: Tensor, segment: Tensor, shape: tuple[int, int]) -> Tensor:
    if shape[1] == 0:
        return values.new_zeros(shape)
    return values.new_zeros(shape).scatter_add_(1, segment, values)


def _segment_statistic(drift: Tensor, segment: Tensor, tokens: Tensor, statistic: Statistic) -> Tensor:
    if statistic == "signed_mean":
        values = drift
    elif statistic == "mean_abs":
        values = drift.abs()
    elif statistic == "rms":
        values = drift.square()
    else:
        values = torch.expm1(drift) - drift
    mean = _segment_sum(values, segment, (tokens.shape[0], tokens.shape[1])) / tokens.clamp(min=1)
    return mean.sqrt() if statistic == "rms" else mean


def _log_gate(score: Tensor, tau: float | Tensor) -> Tensor:
    """Return -tau * |s| in float64; 0 where tau is 0, even if a statistic has overflowed."""
    strength = torch.as_tensor(tau, dtype=torch.float64, device=score.device).detach()
    if strength.dim() and strength.shape != score.shape:
        raise ValueError(
            f"tau has shape {tuple(strength.shape)}, expected one number or [B,S] = {tuple(score.shape)}; "
            "give one value for each segment"
        )
    if not bool((strength >= 0).all()) or bool(strength.isinf().any()):
        raise ValueError("tau holds a negative, NaN or infinite value; use finite numbers of at least 0")
    return torch.where(strength == 0, 0.0, -strength * score.abs())


def _segment_weights(log_gate: Tensor, tokens: Tensor, normalize: Normalize) -> Tensor:
    """Return g, or g / mean(g) over valid tokens, `[B,S]` float64; the largest gate is shifted to 1 first."""
    if normalize == "none" or log_gate.numel() == 0:
        return log_gate.exp()
    dims = (0, 1) if normalize == "step" else (1,)
    used = torch.where(tokens > 0, log_gate, -math.inf)
    largest = used.amax(dim=dims, keepdim=True)
    gate = torch.where(used == largest, 1.0, (used - largest).exp())
    total = (gate * tokens).sum(dim=dims, keepdim=True)
    count = tokens.sum(dim=dims, keepdim=True)
    return gate * count / torch.where(count > 0, total, 1.0)


def _require_name(what: str, name: str, known: tuple[str, ...]) -> None:
    if name not in known:
        raise ValueError(f"{what} is {name!r}; use one of {', '.join(known)}")
