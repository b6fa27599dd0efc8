"""The token weights of a step: what is remembered from earlier steps, and what needs the whole step at once.

Most gates are weighed one microbatch at a time, as the step's normaliser divides the summed gradients at the end.
Controls and a bound on the normalised weight need all segments of the step first: `plan` gets them from all ranks.
Imports torch: learner workers only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from opd_ray.config.choices import BehaviorSource, GateControl, GateKind, GateNormalize, TauMode
from opd_ray.config.schema import GateConfig
from opd_ray.errors import DivergedError
from opd_ray.learner.microbatch import Microbatch, Segmentation
from opd_ray.learner.old_logprobs import Behavior
from opd_ray.learner.token_weights import (
    GateParams,
    baseline_weights,
    drifting_rows,
    gate_by_drift,
    gate_without_drift,
    measured_tokens,
    sampling_error,
    segment_ids,
)
from opd_ray.objective import (
    GateResult,
    RunningQuantile,
    drift_gate,
    quantile_tau,
    resampled,
    segment_weights,
    shuffled,
)


@dataclass(frozen=True, slots=True)
class TokenWeights:
    """Weights of a microbatch: the gate, its segments [B, T], and which trajectories have a measured drift.

    `sampling_error` [B, S] is the standard error of a drift that was measured on some of its segment's tokens, in nats.
    """

    gate: GateResult
    segments: Tensor
    measured: tuple[bool, ...]
    sampling_error: Tensor | None = None


@dataclass(frozen=True, slots=True)
class _Segments:
    """One value for each segment with valid tokens of a trajectory, on the CPU.

    `member` is the trajectory's place in the step's batch; the value is a log-gate, or |drift| in nats.
    """

    member: int
    values: Tensor  # [S] float64
    num_tokens: Tensor  # [S] int64


@dataclass(slots=True)
class _Seen:
    """|drift| of the segments that a rank measured in a step, and the engine mismatch of fresh ones."""

    drift: list[_Segments] = field(default_factory=list)
    mismatch: list[_Segments] = field(default_factory=list)


class StepGate:
    """Weighs the microbatches of a rank's steps; its memory is the same on all ranks."""

    def __init__(self, cfg: GateConfig, newline_tokens: Tensor, *, seed: int, loss_has_ratio: bool) -> None:
        self._cfg = cfg
        self._newline_tokens = newline_tokens
        self._seed = seed
        self._loss_has_ratio = loss_has_ratio
        self._drift_quantile = RunningQuantile(cfg.tau_quantile, cfg.memory)
        self._mismatch = RunningQuantile(0.5, cfg.memory)
        self._seen = _Seen()

    @property
    def strength(self) -> GateParams:
        """tau and the mismatch to take off, as they are in this step."""
        cfg = self._cfg
        tau = quantile_tau(cfg.tau, self._drift_quantile.value) if cfg.tau_mode is TauMode.quantile else cfg.tau
        return GateParams(tau, (self._mismatch.value or 0.0) if cfg.calibrate else 0.0)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs between two steps, the same on all ranks; JSON-able."""
        return {name: memory.state_dict() for name, memory in self._memories().items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a saved state."""
        for name, memory in self._memories().items():
            memory.load_state_dict(state[name])

    def _memories(self) -> dict[str, RunningQuantile]:
        return {"drift_quantile": self._drift_quantile, "mismatch": self._mismatch}

    def segmented(self, batch: Microbatch) -> Microbatch:
        """The microbatch with its segments."""
        ids = segment_ids(batch, self._cfg, self._newline_tokens)
        return replace(batch, segmentation=Segmentation(ids, measured_tokens(batch, self._cfg, ids)))

    def weigh(self, batch: Microbatch, current: Tensor | None, behavior: Behavior) -> TokenWeights:
        """Weights before the step's normaliser; `current` [N] log-probs, None if nothing can have drifted."""
        segments, error = batch.segments.ids, None
        if self._cfg.kind is GateKind.off or current is None:
            return TokenWeights(gate_without_drift(batch), segments, (False,) * len(batch.infos))
        if not self._cfg.kind.is_drift_gate:
            gate = baseline_weights(batch, self._cfg, current, behavior, loss_has_ratio=self._loss_has_ratio)
        else:
            rows = drifting_rows(batch, current, behavior)
            gate = gate_by_drift(batch, self._cfg, rows, behavior, self.strength)
            error = sampling_error(batch, rows)
            self._remember_mismatch(batch, current)
        measured = tuple(not fresh for fresh in batch.fresh)
        self._remember_drift(batch, gate, measured)
        return TokenWeights(gate, segments, measured, error)

    @property
    def weighs_fresh(self) -> bool:
        """Whether fresh trajectories need log-probs too: for ratios to the engine, or to measure its mismatch."""
        cfg = self._cfg
        by_ratio = cfg.kind in (GateKind.tis, GateKind.icepop, GateKind.geometric_mask)
        return cfg.calibrate or (by_ratio and cfg.behavior_source is BehaviorSource.rollout)

    def needs_plan(self, is_fresh: bool) -> bool:
        """Whether the step's weights need all its segments first; `is_fresh`: all its trajectories are."""
        cfg = self._cfg
        return (cfg.control is not GateControl.none or cfg.max_weight > 0) and not is_fresh

    def plan(
        self, drafts: Sequence[tuple[Microbatch, TokenWeights] | None], policy_version: int
    ) -> list[TokenWeights | None]:
        """Final weights of this rank's microbatches from all ranks' drafts (None: a placeholder's).

        Every rank must call it. Independent of how trajectories are spread over ranks and microbatches.
        """
        mine = [
            entry
            for batch, weighed in filter(None, drafts)
            for entry in _used_segments(batch, weighed.gate, weighed.gate.segment_log_gate)
        ]
        weights = self._planned(_gathered(mine), policy_version)
        return [None if draft is None else _with_weights(*draft, weights) for draft in drafts]

    def _planned(self, entries: Sequence[_Segments], policy_version: int) -> dict[int, Tensor]:
        """Weights [S] of each trajectory's used segments."""
        cfg = self._cfg
        sizes = [len(entry.num_tokens) for entry in entries]
        log_gate = torch.cat([entry.values for entry in entries])
        num_tokens = torch.cat([entry.num_tokens for entry in entries])
        seed = self._seed * 1_000_003 + policy_version
        if cfg.control is GateControl.shuffle:
            log_gate = shuffled(log_gate, num_tokens, seed=seed)
        elif cfg.control is GateControl.noise:
            log_gate = resampled(log_gate, num_tokens, seed=seed)
        bound = cfg.max_weight or None
        if cfg.normalize is GateNormalize.none:
            weights = log_gate.exp()
        elif cfg.normalize is GateNormalize.step:
            weights = segment_weights(log_gate, num_tokens, max_weight=bound)
        else:
            pairs = zip(torch.split(log_gate, sizes), torch.split(num_tokens, sizes), strict=True)
            weights = torch.cat([segment_weights(gate, count, max_weight=bound) for gate, count in pairs])
        return {entry.member: part for entry, part in zip(entries, torch.split(weights, sizes), strict=True)}

    def divisor(self, weight_sum: float, num_tokens: float) -> float:
        """What the summed gradients are divided by, from sums over all ranks.

        Raises `DivergedError` where every drift gate of the step is zero in float32.
        """
        if self._cfg.kind is GateKind.off or self._cfg.normalize is GateNormalize.none:
            return num_tokens
        if weight_sum == 0 and num_tokens > 0 and self._cfg.kind.is_drift_gate:
            raise DivergedError(
                "every gate of the step is zero, tau times drift is above 100 everywhere: lower learner.lr, "
                "replay.reuse or gate.tau"
            )
        return weight_sum

    def end_step(self) -> None:
        """Take this step's drift and mismatch into the memory; every rank must call it."""
        cfg = self._cfg
        seen, self._seen = self._seen, _Seen()
        if cfg.tau_mode is TauMode.quantile:
            _update(self._drift_quantile, seen.drift)
        if cfg.calibrate:
            _update(self._mismatch, seen.mismatch)

    def _remember_drift(self, batch: Microbatch, gate: GateResult, measured: Sequence[bool]) -> None:
        if self._cfg.tau_mode is not TauMode.quantile:
            return
        entries = _used_segments(batch, gate, gate.segment_drift.abs())
        self._seen.drift += [entry for entry, is_measured in zip(entries, measured, strict=True) if is_measured]

    def _remember_mismatch(self, batch: Microbatch, current: Tensor) -> None:
        """What the gate would take for drift where learner and engine hold the same weights."""
        if not self._cfg.calibrate or not any(batch.fresh):
            return
        valid = batch.to_rows(batch.valid) & batch.fresh_rows & batch.to_rows(current.isfinite())
        gate = drift_gate(
            batch.to_rows(current.detach().float()),
            batch.to_rows(batch.engine_logprobs),
            valid,
            batch.segments.ids,
            tau=0.0,
            statistic=self._cfg.statistic,
            normalize="none",
        )
        self._seen.mismatch += _used_segments(batch, gate, gate.segment_drift.abs())


def _used_segments(batch: Microbatch, gate: GateResult, values: Tensor) -> list[_Segments]:
    """The `values` [B, S] of each trajectory's segments that have valid tokens."""
    values, tokens = values.double().cpu(), gate.segment_tokens.cpu()
    used = tokens > 0
    return [
        _Segments(member, values[row][used[row]], tokens[row][used[row]]) for row, member in enumerate(batch.members)
    ]


def _with_weights(batch: Microbatch, weighed: TokenWeights, weights: dict[int, Tensor]) -> TokenWeights:
    """The draft with the planned weights in place of its own."""
    gate = weighed.gate
    table = torch.zeros_like(gate.segment_gate)
    for row, member in enumerate(batch.members):
        table[row, gate.segment_tokens[row] > 0] = weights[member].to(table)
    by_token = table.gather(1, weighed.segments.clamp(min=0))
    token_weights = torch.where(batch.to_rows(batch.valid), by_token, 0.0)
    return replace(weighed, gate=replace(gate, token_weights=token_weights))


def _gathered(mine: list[_Segments]) -> list[_Segments]:
    """The entries of all ranks, in the order of the step's batch."""
    parts: list[list[_Segments]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(parts, mine)
    return sorted((entry for part in parts for entry in part), key=lambda entry: entry.member)


def _update(memory: RunningQuantile, mine: list[_Segments]) -> None:
    """Take the values of all ranks into `memory`."""
    everyone = _gathered(mine)
    if everyone:
        memory.update(
            torch.cat([entry.values for entry in everyone]), torch.cat([entry.num_tokens for entry in everyone])
        )
