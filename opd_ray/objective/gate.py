"""The blockwise policy-drift gate: trust a segment less the further the student has moved since sampling it.

Source: arXiv 2606.24084, section 3, equation 1. With token drift d = current - behaviour log-prob, segment
statistic s and gate g = exp(-tau * |s|), a token's weight is its segment's gate, scaled to mean 1 over the
valid tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from opd_ray.config.choices import GateNormalize as Normalize
from opd_ray.config.registry import STATISTICS
from opd_ray.objective.inputs import compute_dtype, require_name, require_rank, require_same_shape
from opd_ray.objective.step_weights import require_max_weight, unit_mean_weights


@dataclass(frozen=True)
class GateResult:
    """What the gate decided. Tensors are detached; floats are float32, or float64 for float64 inputs.

    Attributes:
        token_weights: `[B,T]`, the weight of each token's loss; 0 where a token is not valid.
        segment_gate: `[B,S]`, the raw gate in [0, 1] before normalisation; 1 for a segment without valid
            tokens.
        segment_drift: `[B,S]`, the statistic in nats after calibration (signed for `signed_mean`); 0 for a
            segment without valid tokens.
        segment_tokens: `[B,S]` int64, valid tokens of each segment.
        segment_log_gate: `[B,S]` float64, log of the raw gate, for `segment_weights` of a sharded step; it
            does not underflow.
    """

    token_weights: Tensor
    segment_gate: Tensor
    segment_drift: Tensor
    segment_tokens: Tensor
    segment_log_gate: Tensor

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
    statistic: str,
    normalize: Normalize | str,
    drift_floor: float | Tensor = 0.0,
    measured_mask: Tensor | None = None,
    max_weight: float | None = None,
) -> GateResult:
    """Compute the drift gate of each segment and the weight of each token (arXiv 2606.24084, equation 1).

    A token is valid where its mask is above 0, its segment id is not negative and both log-probs are finite;
    the others take no part and get weight 0. A caller that counts loss tokens itself must take non-finite
    ones out of its mask too.

    ``normalize="step"`` scales to mean 1 over all valid tokens handed in, ``"sequence"`` over each row's, and
    ``"none"`` leaves the raw gates. Normalisation is in the log domain, so it is right even when every raw
    gate underflows. When all gates are equal (tau = 0, no drift), normalised weights are exactly 1.0; with no
    drift raw ones are too.

    Calibration: `drift_floor` is what the statistic shows where the policy has not moved, such as the mismatch
    between the engine that sampled and the learner. The statistic's magnitude is lowered by it, not below 0,
    before tau sees it.

    Sampled drift: with `measured_mask`, a segment's statistic is taken over its measured tokens, and its other
    valid tokens get its weight; only measured tokens need finite log-probs. A segment of which nothing was
    measured has statistic 0.

    Sharded steps (several microbatches, several ranks) know the normaliser only after the last shard. They
    use ``"none"`` and either gather `segment_log_gate` and `segment_tokens` of all shards for
    `segment_weights`, which is right for any drift, or add up the gradients of ``gated_token_mean(...,
    num_loss_tokens=1)`` and `GateResult.weight_sum` over the shards and divide once: sum(m g l) / sum(m g) is
    the loss that ``"step"`` gives on the whole batch. In that second way raw gates are not rescued from
    underflow: in float32 a gate loses precision from tau * |s| = 87 on and is 0 from 104 on (708 in float64);
    weight_sum is 0 if *every* segment is that far off, and the caller must stop, because the policy has
    diverged.

    Args:
        current_logprobs: `[B,T]`, log-prob of each response token under the student being trained, in nats.
        behavior_logprobs: `[B,T]`, the same under the weights that sampled it.
        response_mask: `[B,T]`, bool or 0/1.
        segment_ids: `[B,T]` integers, numbered from 0 in each row, negative = no segment (`segments`).
        tau: how hard the gate bites, in 1/nats, >= 0: one number, or `[B,S]` for a value per segment, where
            S = ``segment_ids.max() + 1``.
        statistic: of d over a segment's valid tokens: `signed_mean` (the paper), `mean_abs`, `rms`, `k3` =
            mean(exp(d) - 1 - d), or another module of `statistics`.
        normalize: `step`, `sequence` or `none`.
        drift_floor: in nats, finite, >= 0: one number, or `[B,S]`.
        measured_mask: `[B,T]`, bool or 0/1, tokens whose log-probs were computed; None = all of them.
        max_weight: largest token weight after normalisation, above 1; the mean stays 1 (see
            `segment_weights`). None = no limit.

    Returns:
        GateResult, detached. Statistics and sums are accumulated in float64, then rounded to the result's
        dtype.

    Raises:
        ValueError: shapes that differ, a tau or drift_floor that is negative, not finite or of another shape,
            an unknown name, a max_weight of 1 or less or one without normalisation.
    """
    require_rank("current_logprobs", current_logprobs, 2, "[B,T]")
    require_same_shape(
        current_logprobs=current_logprobs,
        behavior_logprobs=behavior_logprobs,
        response_mask=response_mask,
        segment_ids=segment_ids,
    )
    require_name("statistic", statistic, STATISTICS.names)
    require_name("normalize", normalize, Normalize)
    _require_cap(max_weight, normalize)
    dtype = compute_dtype(current_logprobs, behavior_logprobs)
    with torch.no_grad():
        current, behavior = current_logprobs.to(dtype), behavior_logprobs.to(dtype)
        finite = current.isfinite() & behavior.isfinite()
        valid, measured = _valid_and_measured((response_mask > 0) & (segment_ids >= 0), finite, measured_mask)
        drift = torch.where(measured, current - behavior, 0.0).double()
        segment = segment_ids.clamp(min=0).long()
        shape = (segment_ids.shape[0], int(segment_ids.max()) + 1 if segment_ids.numel() else 0)
        tokens = _segment_sum(valid.long(), segment, shape)
        count = _segment_sum(measured.long(), segment, shape).clamp(min=1)

        def mean(values: Tensor) -> Tensor:
            return _segment_sum(torch.where(measured, values, 0.0), segment, shape) / count

        score = _above_floor(STATISTICS.load(statistic).statistic(drift, mean), drift_floor)
        log_gate = _log_gate(score, tau)
        weights = _normalised(log_gate, tokens, normalize, max_weight).to(dtype)
        token_weights = torch.where(valid, weights.gather(1, segment), 0.0) if shape[1] else valid.to(dtype)
    return GateResult(token_weights, log_gate.exp().to(dtype), score.to(dtype), tokens, log_gate)


def _valid_and_measured(inside: Tensor, finite: Tensor, measured_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Which tokens get a weight, and which of them the statistic is taken over."""
    if measured_mask is None:
        return inside & finite, inside & finite
    require_same_shape(measured_mask=measured_mask, response_mask=inside)
    measured = measured_mask > 0
    return inside & (finite | ~measured), inside & finite & measured


def _segment_sum(values: Tensor, segment: Tensor, shape: tuple[int, int]) -> Tensor:
    if shape[1] == 0:
        return values.new_zeros(shape)
    return values.new_zeros(shape).scatter_add_(1, segment, values)


def _above_floor(score: Tensor, drift_floor: float | Tensor) -> Tensor:
    """Lower the magnitude by the floor, not below 0; the sign stays."""
    return score.sign() * (score.abs() - _per_segment("drift_floor", drift_floor, score)).clamp(min=0)


def _log_gate(score: Tensor, tau: float | Tensor) -> Tensor:
    """Return -tau * |s| in float64; 0 where tau is 0, even if a statistic has overflowed."""
    strength = _per_segment("tau", tau, score)
    return torch.where(strength == 0, 0.0, -strength * score.abs())


def _per_segment(name: str, value: float | Tensor, score: Tensor) -> Tensor:
    """Return one number, or one a segment, as float64; both must be finite and not negative."""
    wide = torch.as_tensor(value, dtype=torch.float64, device=score.device).detach()
    if wide.dim() and wide.shape != score.shape:
        raise ValueError(
            f"{name} has shape {tuple(wide.shape)}, expected one number or [B,S] = {tuple(score.shape)}; "
            "give one value for each segment"
        )
    if not bool((wide >= 0).all()) or bool(wide.isinf().any()):
        raise ValueError(f"{name} holds a negative, NaN or infinite value; use finite numbers of at least 0")
    return wide


def _normalised(log_gate: Tensor, tokens: Tensor, normalize: str, max_weight: float | None) -> Tensor:
    """Return g, or g / mean(g) over valid tokens of the step or the row, `[B,S]` float64."""
    if normalize == "none" or log_gate.numel() == 0:
        return log_gate.exp()
    if normalize == "sequence":
        return unit_mean_weights(log_gate, tokens, max_weight)
    return unit_mean_weights(log_gate.reshape(1, -1), tokens.reshape(1, -1), max_weight).reshape(log_gate.shape)


def _require_cap(max_weight: float | None, normalize: str) -> None:
    require_max_weight(max_weight)
    if max_weight is not None and normalize == "none":
        raise ValueError(f'max_weight is {max_weight} but normalize is "none"; cap weights of mean 1, not raw gates')
