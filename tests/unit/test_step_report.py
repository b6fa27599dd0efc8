"""From rank reports to metrics: hand-made numbers, and independence of how the work was split."""

from __future__ import annotations

import math

import numpy as np
import pytest

from opd_ray.actors.step_report import RankReport, SegmentStats, step_metrics
from opd_ray.errors import DivergedError


def segments(drift: list[float], gate: list[float], tokens: list[int], staleness: list[int]) -> SegmentStats:
    return SegmentStats(np.array(drift), np.array(gate), np.array(tokens), np.array(staleness))


def test_hand_made_step_of_two_ranks() -> None:
    first = RankReport(
        loss_sum=3.0,
        ungated_loss_sum=4.0,
        weight_sum=6.0,
        weight_square_sum=4.5,
        num_tokens=8,
        num_masked=1,
        kl_sum=1.6,
        segments=segments([0.5, -0.1], [0.5, 1.0], [4, 4], [1, 1]),
        grad_norm=2.0,
        lr=0.1,
        padded_tokens=20,
        model_tokens=15,
        mismatch_sum=0.2,
        mismatch_square_sum=0.04,
        mismatch_tokens=2,
    )
    second = RankReport(
        loss_sum=1.0,
        ungated_loss_sum=4.0,
        weight_sum=2.0,
        weight_square_sum=0.5,
        num_tokens=8,
        kl_sum=0.0,
        segments=segments([2.0], [0.25], [8], [3]),
        grad_norm=2.0,
        lr=0.1,
        padded_tokens=20,
        model_tokens=15,
    )
    metrics = step_metrics([first, second], measured=True)
    assert metrics["learner/loss/mean"] == pytest.approx(4.0 / 8.0)
    assert metrics["learner/loss/ungated_mean"] == pytest.approx(8.0 / 16.0)
    assert metrics["learner/kl_to_teacher/mean"] == pytest.approx(0.1)
    assert metrics["learner/tokens/masked"] == 1
    assert metrics["learner/tokens/padding_share"] == pytest.approx(0.25)
    assert metrics["gate/value/min"] == 0.25
    assert metrics["gate/value/max"] == 1.0
    assert metrics["gate/value/mean"] == pytest.approx(1.75 / 3)
    assert metrics["gate/value/share_under_half"] == pytest.approx(1 / 3)
    assert metrics["gate/drift_abs/staleness_1"] == pytest.approx(0.3)
    assert metrics["gate/drift_abs/staleness_3"] == pytest.approx(2.0)
    # Normalised: 16 tokens share a weight sum of 8.
    assert metrics["gate/weight/min"] == pytest.approx(0.5)
    assert metrics["gate/weight/max"] == pytest.approx(2.0)
    # Kish: (sum w)^2 / (n sum w^2).
    assert metrics["gate/effective_sample_share"] == pytest.approx(64 / (16 * 5.0))
    assert metrics["gate/engine_mismatch/mean"] == pytest.approx(0.1)
    assert metrics["gate/engine_mismatch/rms"] == pytest.approx(math.sqrt(0.02))


def test_ungated_steps_report_no_gate() -> None:
    report = RankReport(loss_sum=1.0, weight_sum=2.0, num_tokens=2, grad_norm=1.0)
    assert not [key for key in step_metrics([report], measured=False) if key.startswith("gate/")]


@pytest.mark.parametrize("change", [{"loss_sum": math.nan}, {"grad_norm": math.inf}])
def test_a_diverged_step_is_an_error(change: dict[str, float]) -> None:
    values = {"loss_sum": 1.0, "weight_sum": 1.0, "num_tokens": 1, "grad_norm": 1.0} | change
    with pytest.raises(DivergedError, match=r"lower learner\.lr"):
        step_metrics([RankReport(**values)], measured=False)  # type: ignore[arg-type]


def test_a_step_without_tokens_is_zero() -> None:
    assert step_metrics([RankReport()], measured=True)["learner/loss/mean"] == 0.0
