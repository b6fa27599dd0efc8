"""From rank reports to metrics: hand-made numbers. What the diagnostics make of them is in their own test."""

from __future__ import annotations

import math

import numpy as np
import pytest

from opd_ray.errors import DivergedError
from opd_ray.learner.diagnostics import SegmentFacts, StepDiagnostics, TokenStats
from opd_ray.learner.step_report import RankReport, step_metrics


def diagnostics(gate: float, num_tokens: int, weight_scale: float) -> StepDiagnostics:
    """One segment of equal tokens, one step old."""
    ones = np.ones(num_tokens)
    tokens = TokenStats(0.5 * ones, gate * ones, ones, ones.astype(np.int64), 0 * ones.astype(np.int64))
    segments = SegmentFacts(
        np.array([-math.log(gate)]), np.array([gate]), np.array([num_tokens]), np.array([1]), np.array([True])
    )
    return StepDiagnostics.of([tokens], [segments], [], weight_scale=weight_scale)


def test_hand_made_step_of_two_ranks() -> None:
    # Weights 8 * 0.75 and 8 * 0.25 sum to 8 over 16 tokens: normalised, 1.5 and 0.5.
    first = RankReport(
        loss_sum=3.0,
        ungated_loss_sum=4.0,
        weight_sum=6.0,
        divisor=8.0,
        num_tokens=8,
        removed={"not_finite": 1, "special_tokens": 2},
        kl_sum=1.6,
        diagnostics=diagnostics(0.75, 8, 2.0),
        grad_norm=2.0,
        lr=0.1,
        padded_tokens=20,
        model_tokens=15,
        mismatch_sum=0.2,
        mismatch_square_sum=0.04,
        mismatch_tokens=2,
        sampling_error_square_sum=0.18,
        sampled_segments=2,
        times={"forward": 1.0, "backward": 2.0},
    )
    second = RankReport(
        loss_sum=1.0,
        ungated_loss_sum=4.0,
        weight_sum=2.0,
        divisor=8.0,
        num_tokens=8,
        removed={"special_tokens": 5},
        diagnostics=diagnostics(0.25, 8, 2.0),
        grad_norm=2.0,
        lr=0.1,
        padded_tokens=20,
        model_tokens=15,
        engine_behavior_tokens=4,
        times={"forward": 1.5, "plan": 0.5},
    )
    metrics = step_metrics([first, second], is_gated=True, min_support_mass=0.5)
    assert metrics["learner/loss/mean"] == pytest.approx(4.0 / 8.0)
    assert metrics["learner/loss/ungated_mean"] == pytest.approx(8.0 / 16.0)
    assert metrics["learner/kl_to_teacher/mean"] == pytest.approx(0.1)
    assert metrics["learner/tokens/masked"] == 8
    assert metrics["learner/masked/special_tokens"] == 7
    assert metrics["learner/masked/not_finite"] == 1
    assert metrics["learner/tokens/padding_share"] == pytest.approx(0.25)
    assert metrics["time/learner_forward_s"] == 1.5
    assert metrics["time/learner_plan_s"] == 0.5
    assert metrics["gate/engine_behavior_share"] == 0.25
    assert metrics["gate/engine_mismatch/mean"] == pytest.approx(0.1)
    assert metrics["gate/engine_mismatch/rms"] == pytest.approx(math.sqrt(0.02))
    assert metrics["gate/drift_sampling_error/rms"] == pytest.approx(0.3)
    assert metrics["gate/value/min"] == 0.25
    assert metrics["gate/weight/min"] == pytest.approx(0.5)
    assert metrics["gate/weight/max"] == pytest.approx(1.5)
    # Kish: (sum w)^2 / (n sum w^2).
    assert metrics["gate/effective_sample_share"] == pytest.approx(16**2 / (16 * 8 * (1.5**2 + 0.5**2)))


def test_ungated_steps_report_no_gate() -> None:
    report = RankReport(loss_sum=1.0, weight_sum=2.0, divisor=2.0, num_tokens=2, grad_norm=1.0)
    metrics = step_metrics([report], is_gated=False, min_support_mass=0.5)
    assert not [key for key in metrics if key.startswith("gate/")]


@pytest.mark.parametrize("change", [{"loss_sum": math.nan}, {"grad_norm": math.inf}])
def test_a_diverged_step_is_an_error(change: dict[str, float]) -> None:
    values = {"loss_sum": 1.0, "weight_sum": 1.0, "divisor": 1.0, "num_tokens": 1, "grad_norm": 1.0} | change
    with pytest.raises(DivergedError, match=r"lower learner\.lr"):
        step_metrics([RankReport(**values)], is_gated=False, min_support_mass=0.5)  # type: ignore[arg-type]


def test_a_step_without_tokens_is_zero() -> None:
    assert step_metrics([RankReport()], is_gated=True, min_support_mass=0.5)["learner/loss/mean"] == 0.0
