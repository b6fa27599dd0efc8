"""What a learner rank reports of its part of a step, and how the ranks' reports become metrics. numpy only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from opd_ray.errors import DivergedError

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


@dataclass(slots=True)
class SegmentStats:
    """One entry for each gate segment with valid tokens: drift (nats), raw gate, valid tokens, staleness (steps)."""

    drift: FloatArray = field(default_factory=lambda: np.empty(0))
    gate: FloatArray = field(default_factory=lambda: np.empty(0))
    num_tokens: IntArray = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    staleness: IntArray = field(default_factory=lambda: np.empty(0, dtype=np.int64))

    @classmethod
    def join(cls, parts: Sequence[SegmentStats]) -> SegmentStats:
        """The entries of all parts."""
        names = ("drift", "gate", "num_tokens", "staleness")
        return cls(*(np.concatenate([getattr(part, name) for part in [cls(), *parts]]) for name in names))


@dataclass(slots=True)
class RankReport:
    """Sums over one rank's tokens, its segments, and its times in seconds."""

    loss_sum: float = 0.0  # sum of m * g * loss
    ungated_loss_sum: float = 0.0  # sum of m * loss
    weight_sum: float = 0.0  # sum of m * g
    weight_square_sum: float = 0.0
    num_tokens: int = 0  # sum of m
    num_masked: int = 0  # response tokens that left the mask
    kl_sum: float = 0.0  # sum of m * (behaviour - teacher log-prob): k1 of KL(student || teacher)
    mismatch_sum: float = 0.0  # learner - engine log-prob at staleness 0
    mismatch_square_sum: float = 0.0
    mismatch_tokens: int = 0
    engine_behavior_tokens: int = 0  # tokens whose drift is measured against the engine's log-probs
    segments: SegmentStats = field(default_factory=SegmentStats)
    grad_norm: float = 0.0
    lr: float = 0.0
    padded_tokens: int = 0
    model_tokens: int = 0
    forward_s: float = 0.0
    backward_s: float = 0.0
    step_s: float = 0.0


def step_metrics(reports: Sequence[RankReport], measured: bool) -> dict[str, float]:
    """Metrics of one step from all ranks; gate metrics only where the step's drift was `measured` or defined.

    Raises `DivergedError` when the loss or the gradient norm is not finite.
    """

    def total(name: str) -> float:
        return float(sum(getattr(report, name) for report in reports))

    weights = total("weight_sum")
    tokens = total("num_tokens")
    loss = total("loss_sum") / weights if weights else 0.0
    grad_norm = reports[0].grad_norm
    if not (np.isfinite(loss) and np.isfinite(grad_norm)):
        raise DivergedError(f"loss {loss} and gradient norm {grad_norm} must be finite: lower learner.lr")
    metrics = {
        "learner/loss/mean": loss,
        "learner/loss/ungated_mean": total("ungated_loss_sum") / max(tokens, 1),
        "learner/kl_to_teacher/mean": total("kl_sum") / max(tokens, 1),
        "learner/grad_norm": grad_norm,
        "learner/lr": reports[0].lr,
        "learner/tokens/loss": tokens,
        "learner/tokens/masked": total("num_masked"),
        "learner/tokens/padding_share": 1 - total("model_tokens") / max(total("padded_tokens"), 1),
        "time/learner_forward_s": max(report.forward_s for report in reports),
        "time/learner_backward_s": max(report.backward_s for report in reports),
        "time/learner_step_s": max(report.step_s for report in reports),
    }
    if total("mismatch_tokens"):
        count = total("mismatch_tokens")
        metrics["gate/engine_mismatch/mean"] = total("mismatch_sum") / count
        metrics["gate/engine_mismatch/rms"] = float(np.sqrt(total("mismatch_square_sum") / count))
    if measured:
        metrics |= gate_metrics(SegmentStats.join([report.segments for report in reports]), weights, tokens)
        metrics["gate/effective_sample_share"] = weights**2 / max(total("weight_square_sum") * tokens, 1e-300)
        metrics["gate/engine_behavior_share"] = total("engine_behavior_tokens") / max(tokens, 1)
    return metrics


def gate_metrics(segments: SegmentStats, weight_sum: float, num_tokens: float) -> dict[str, float]:
    """`gate/value/*`: the raw gate over segments; `gate/weight/*`: the normalised one; `gate/drift_abs/*`: |drift|."""
    if not len(segments.gate):
        return {}
    gate, drift = segments.gate, np.abs(segments.drift)
    metrics = {
        "gate/value/min": float(gate.min()),
        "gate/value/p05": float(np.quantile(gate, 0.05)),
        "gate/value/mean": float(gate.mean()),
        "gate/value/max": float(gate.max()),
        "gate/value/share_under_half": float((gate < 0.5).mean()),
        "gate/drift_abs/mean": float(drift.mean()),
        "gate/drift_abs/p95": float(np.quantile(drift, 0.95)),
        "gate/drift_abs/max": float(drift.max()),
        "gate/segments": float(len(gate)),
    }
    if weight_sum:
        weight = gate * num_tokens / weight_sum
        metrics["gate/weight/min"] = float(weight.min())
        metrics["gate/weight/max"] = float(weight.max())
    for staleness in np.unique(segments.staleness):
        chosen = drift[segments.staleness == staleness]
        metrics[f"gate/drift_abs/staleness_{staleness}"] = float(chosen.mean())
    return metrics
