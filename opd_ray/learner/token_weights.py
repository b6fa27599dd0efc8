"""Token weights from drift: the gates and the baselines, for one microbatch.

Imports torch: learner workers only.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from opd_ray.config.choices import BehaviorSource, GateKind, GateNormalize
from opd_ray.config.schema import GateConfig
from opd_ray.learner.columns import needs_token_versions
from opd_ray.learner.microbatch import Microbatch
from opd_ray.learner.old_logprobs import Behavior
from opd_ray.objective import (
    GateResult,
    block_segments,
    drift_gate,
    drift_standard_error,
    geometric_sequence_mask,
    hard_drop_gate,
    icepop_weights,
    newline_segments,
    segment_staleness,
    staleness_tau,
    stratified_sample,
    truncated_is_weights,
)

# Kinds whose segments are single tokens, and whole responses.
_TOKEN_KINDS = (GateKind.token, GateKind.tis, GateKind.icepop)
_SEQUENCE_KINDS = (GateKind.sequence, GateKind.geometric_mask)


@dataclass(frozen=True, slots=True)
class GateParams:
    """How hard the drift gate bites now: `tau` in 1/nats, and `floor` in nats, the engine mismatch to take off."""

    tau: float
    floor: float = 0.0


def segment_ids(batch: Microbatch, cfg: GateConfig, newline_tokens: Tensor) -> Tensor:
    """[B, T] int64 segment of every response token; `newline_tokens` [V] bool."""
    if cfg.kind is GateKind.newline:
        return newline_segments(
            batch.to_rows(newline_tokens[batch.sampled_ids]),
            batch.lengths,
            min_len=cfg.min_span,
            max_len=cfg.max_span,
            fallback_block=cfg.block_size,
        )
    size = 1 if cfg.kind in _TOKEN_KINDS else None if cfg.kind in _SEQUENCE_KINDS else cfg.block_size
    return block_segments(batch.lengths, max(batch.block.lengths), size)


def measured_tokens(batch: Microbatch, cfg: GateConfig, segments: Tensor) -> Tensor | None:
    """[B, T] bool: the tokens whose drift is measured; None for all of them. The same at each use."""
    if not cfg.drift_tokens:
        return None
    # The raw window, not what is valid at this use: a selection by entropy changes from use to use.
    in_response = segments >= 0
    seeds = [info.trajectory_id for info in batch.infos]
    return stratified_sample(in_response, segments, tokens_per_segment=cfg.drift_tokens, seeds=seeds)


def gate_without_drift(batch: Microbatch) -> GateResult:
    """The gate where all trajectories are fresh or nothing is gated: every valid token weighs one."""
    zero = batch.to_rows(torch.zeros_like(batch.engine_logprobs))
    valid, segments = batch.to_rows(batch.valid), batch.segments.ids
    return drift_gate(zero, zero, valid, segments, tau=0.0, statistic="signed_mean", normalize="none")


def gate_by_drift(
    batch: Microbatch, cfg: GateConfig, rows: tuple[Tensor, Tensor], behavior: Behavior, strength: GateParams
) -> GateResult:
    """The drift gate of a microbatch; `rows` as `drifting_rows` gives them.

    Weights are raw unless normalised by sequence: the step's normaliser is known after its last microbatch.
    """
    now, then = rows
    segments = batch.segments.ids
    tau: float | Tensor = strength.tau
    valid = batch.to_rows(batch.valid)
    if needs_token_versions(cfg):
        if batch.token_staleness is None:
            raise ValueError("tau_mode=staleness needs token_staleness: read the version columns")
        tau = staleness_tau(strength.tau, segment_staleness(batch.to_rows(batch.token_staleness), valid, segments))
    floor = torch.tensor([[strength.floor if engine else 0.0] for engine in behavior.from_engine], device=now.device)
    return drift_gate(
        now,
        then,
        valid,
        segments,
        tau=tau,
        statistic=cfg.statistic,
        normalize="sequence" if cfg.normalize is GateNormalize.sequence else "none",
        drift_floor=floor.expand(-1, int(segments.max()) + 1),
        measured_mask=batch.segments.measured,
    )


def baseline_weights(
    batch: Microbatch,
    cfg: GateConfig,
    current: Tensor,
    behavior: Behavior,
    *,
    loss_has_ratio: bool,
) -> GateResult:
    """Weights of the baselines in the gate's form; `segment_gate` is the weight (mean) of each segment.

    A loss that already carries the ratio current / behaviour (`loss_has_ratio`) gets only what turns this ratio into
    the baseline's weight, so that the ratio does not count twice.
    """
    if cfg.kind is GateKind.hard_drop or cfg.behavior_source is BehaviorSource.learner:
        now, then = drifting_rows(batch, current, behavior)
    else:
        # Against the engine's log-probs, ratios correct the engine mismatch of fresh trajectories too.
        now, then = batch.to_rows(current), batch.to_rows(behavior.logprobs)
    valid, segments = batch.to_rows(batch.valid), batch.segments.ids
    drift = drift_gate(now, then, valid, segments, tau=0.0, statistic="signed_mean", normalize="none")
    if cfg.kind is GateKind.hard_drop:
        gate = hard_drop_gate(drift.segment_drift, limit=cfg.drop_above)
        weights = gate.gather(1, segments.clamp(min=0))
    elif cfg.kind is GateKind.geometric_mask:
        kept = geometric_sequence_mask(now, then, valid, low=cfg.low, high=cfg.high)
        weights = kept[:, None].float().expand_as(now)
    elif cfg.kind is GateKind.tis:
        weights = truncated_is_weights(now, then, cap=cfg.cap)
    else:
        weights = icepop_weights(now, then, low=cfg.low, high=cfg.high)
    weights = torch.where(drift.token_weights > 0, weights, 0.0)
    if cfg.kind in _TOKEN_KINDS:
        gate = weights
        if loss_has_ratio:
            weights = torch.where(weights > 0, (weights.log() - (now - then)).exp(), 0.0)
    elif cfg.kind is GateKind.geometric_mask:
        gate = kept[:, None].float()
    return GateResult(weights, gate, drift.segment_drift, drift.segment_tokens, gate.double().log())


def sampling_error(batch: Microbatch, rows: tuple[Tensor, Tensor]) -> Tensor | None:
    """[B, S] standard error of each segment's signed mean drift in nats; None where every token is measured.

    `rows` as `drifting_rows` gives them.
    """
    segments = batch.segments
    if segments.measured is None:
        return None
    now, then = rows
    return drift_standard_error(now, then, segments.measured, batch.to_rows(batch.valid), segments.ids)


def drifting_rows(batch: Microbatch, current: Tensor, behavior: Behavior) -> tuple[Tensor, Tensor]:
    """Current and behaviour log-probs [B, T], both zero in fresh trajectories."""
    fresh = batch.fresh_rows
    now, then = batch.to_rows(current.detach().float()), batch.to_rows(behavior.logprobs)
    return torch.where(fresh, 0.0, now), torch.where(fresh, 0.0, then)
