"""A rank's report of its part of a step, and the metrics made of all ranks' reports. numpy only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from opd_ray.errors import DivergedError
from opd_ray.learner.diagnostics import Metrics, StepDiagnostics


@dataclass(slots=True)
class RankReport:
    """Sums over one rank's tokens, its diagnostics, and its times in seconds by part of the step."""

    loss_sum: float = 0.0  # sum of m * g * loss
    ungated_loss_sum: float = 0.0  # sum of m * loss
    weight_sum: float = 0.0  # sum of m * g
    num_tokens: int = 0  # sum of m
    divisor: float = 0.0  # what the step's sums were divided by, the same on all ranks
    removed: dict[str, int] = field(default_factory=dict)  # response tokens that left the mask, by rule
    kl_sum: float = 0.0  # sum of m * (behaviour - teacher log-prob): k1 of KL(student || teacher)
    mismatch_sum: float = 0.0  # learner - engine log-prob at staleness 0
    mismatch_square_sum: float = 0.0
    mismatch_tokens: int = 0
    engine_behavior_tokens: int = 0  # tokens whose drift is measured against the engine's log-probs
    sampling_error_square_sum: float = 0.0  # squared standard errors of sampled segment drifts
    sampled_segments: int = 0
    tau: float = 0.0
    diagnostics: StepDiagnostics = field(default_factory=StepDiagnostics)
    grad_norm: float = 0.0
    lr: float = 0.0
    padded_tokens: int = 0
    model_tokens: int = 0
    computed_tokens: int = 0  # fewer than model tokens where trajectories begin alike, else more by the padding
    times: dict[str, float] = field(default_factory=dict)


def step_metrics(reports: Sequence[RankReport], *, is_gated: bool, min_support_mass: float) -> Metrics:
    """Metrics of one step from all ranks.

    Raises `DivergedError` when the loss or the gradient norm is not finite.
    """

    def total(name: str) -> float:
        return float(sum(getattr(report, name) for report in reports))

    first = reports[0]
    tokens = total("num_tokens")
    loss = total("loss_sum") / first.divisor if first.divisor else 0.0
    if not (math.isfinite(loss) and math.isfinite(first.grad_norm)):
        raise DivergedError(f"loss {loss} and gradient norm {first.grad_norm} must be finite: lower learner.lr")
    metrics: Metrics = {
        "learner/loss/mean": loss,
        "learner/loss/ungated_mean": total("ungated_loss_sum") / max(tokens, 1),
        "learner/kl_to_teacher/mean": total("kl_sum") / max(tokens, 1),
        "learner/grad_norm": first.grad_norm,
        "learner/lr": first.lr,
        "learner/tokens/loss": tokens,
        "learner/tokens/computed_share": total("computed_tokens") / max(total("model_tokens"), 1),
        "learner/tokens/padding_share": 1 - total("model_tokens") / max(total("padded_tokens"), 1),
    }
    removed = _summed([report.removed for report in reports])
    metrics["learner/tokens/masked"] = float(sum(removed.values()))
    metrics |= {f"learner/masked/{rule}": float(number) for rule, number in removed.items()}
    for part in sorted({part for report in reports for part in report.times}):
        metrics[f"time/learner_{part}_s"] = max(report.times.get(part, 0.0) for report in reports)
    if total("mismatch_tokens"):
        count = total("mismatch_tokens")
        metrics["gate/engine_mismatch/mean"] = total("mismatch_sum") / count
        metrics["gate/engine_mismatch/rms"] = math.sqrt(total("mismatch_square_sum") / count)
    if is_gated:
        metrics["gate/tau"] = first.tau
        metrics["gate/engine_behavior_share"] = total("engine_behavior_tokens") / max(tokens, 1)
    if total("sampled_segments"):
        mean_square = total("sampling_error_square_sum") / total("sampled_segments")
        metrics["gate/drift_sampling_error/rms"] = math.sqrt(mean_square)
    joined = StepDiagnostics.join([report.diagnostics for report in reports])
    return metrics | joined.metrics(min_support_mass=min_support_mass)


def _summed(counts: Sequence[dict[str, int]]) -> dict[str, int]:
    result: dict[str, int] = {}
    for part in counts:
        for name, number in part.items():
            result[name] = result.get(name, 0) + number
    return result
